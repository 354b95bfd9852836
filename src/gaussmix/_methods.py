"""What methods of estimators have in common, as decorators."""

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, cast

import numpy as np
from array_api_compat import is_dask_array

from gaussmix.rows._group import process_group
from gaussmix.rows._validation import validate_lazy

Method = TypeVar("Method", bound=Callable[..., Any])


def takes_data(method: Method) -> Method:
    """The method, whose X may also be passed as `data`, PyCave's name for it."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "data" in kwargs:
            if args or "X" in kwargs:
                raise TypeError(f"{method.__name__}() got both X and data, which are the same argument; pass one")
            args = (kwargs.pop("data"),)
        return method(self, *args, **kwargs)

    return cast(Method, call)


def in_group(method: Method) -> Method:
    """The method, `fit`, for which `distributed` is a `Group`: its processes are told the same, and fail together."""

    @wraps(method)
    def call(self: Any, *args: Any, distributed: Any = None, **kwargs: Any) -> Any:
        if distributed is None:
            return method(self, *args, **kwargs)
        device = None
        with suppress(TypeError, ValueError):  # said below, where all processes can hear it
            device = self._placement().device
        group = process_group(distributed, args[0] if args else kwargs.get("X"), device)
        with group.together():
            arguments = signature(method).bind(self, *args, **kwargs)
            arguments.apply_defaults()
            group.compare(self._told_to_fit(arguments.arguments) | {"the device": group.device.partition(":")[0]})
            return method(self, *args, distributed=group, **kwargs)

    return cast(Method, call)


def whole_or_not_at_all(method: Method) -> Method:
    """The method of an estimator, which is as it was before where the method raises."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = dict(vars(self))
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    return cast(Method, call)


def numpy_defaults(method: Method) -> Method:
    """The method, whose arithmetic NumPy reports on as it does by default, whatever the caller's `numpy.seterr` says.

    Responsibilities underflow in every fit; what overflows is computed again in a form with more room. Callbacks, and
    what gives blocks of rows, have the defaults as well.
    """

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"):
            return method(*args, **kwargs)

    return cast(Method, call)


def by_block(method: Method) -> Method:
    """The method, which gives for a Dask array what it gives for each block, computed when it is asked for."""

    @wraps(method)
    def call(self: Any, X: Any) -> Any:
        if not is_dask_array(X):
            return method(self, X)
        # Imports dask, whose array it is.
        from gaussmix.rows import _dask

        return _dask.predictions(self, method.__name__, validate_lazy(X))

    return cast(Method, call)


def averaged(method: Method) -> Method:
    """The method, a mean over rows, which for a Dask array adds up the blocks."""

    @wraps(method)
    def call(self: Any, X: Any, y: Any = None) -> Any:
        if not is_dask_array(X):
            return method(self, X)
        total, n = sum_of_blocks(self, method.__name__, X)
        return total / n

    return cast(Method, call)


def sum_of_blocks(estimator: Any, method: str, X: Any) -> tuple[float, int]:
    """The sum over the rows of a Dask array of what the method gives the mean of, and the number of rows."""
    from gaussmix.rows import _dask

    total, n = _dask.total_of(estimator, method, validate_lazy(X))
    if not n:
        raise ValueError("Found array with 0 sample(s) while a minimum of 1 is required; pass at least one row")
    return total, n
