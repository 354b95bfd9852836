"""The edge: what users pass in is checked here, and an error names the cause, the value and the remedy."""

import array
import math
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
from array_api_compat import is_array_api_obj, is_pydata_sparse_array, is_torch_array
from scipy.sparse import issparse
from sklearn.utils import check_random_state

from gaussmix._arrays import array_namespace, asarray_like, floating_dtype, plain, working_dtype
from gaussmix._covariance import COVARIANCES, Covariance
from gaussmix._parameters import Parameters
from gaussmix._typing import Array

# What to do about X of three dimensions and more.
FLATTEN = (
    "X needs two dimensions, rows and features: X.reshape(-1, c) makes a row of each pixel of an image of shape "
    "(h, w, c), X.reshape(n, -1) one of each of n images"
)
# How messages of Python, NumPy, torch and scikit-learn begin, which scripts look for, and what to do about them.
REMEDIES = {
    "could not convert string": "encode text as numbers, or leave such columns out",
    "float() argument must be": "pass real numbers",
    "int too large": "rescale such integers",
    "setting an array element with a sequence": "pass rows of the same length, with a number in each place",
    "Can't call numpy()": "pass torch.stack of such tensors",
    "Got unsupported ScalarType": "pass torch.stack of such tensors",
    "Found array with dim": FLATTEN,
}
# How dtypes of dates, times and durations begin in pandas, Polars and pyarrow.
TIMES = ("date", "time", "duration", "period")


def dense(name: str, value: Any) -> Any:
    """`value`, or an array of what a list or a buffer holds; raises where a place has no number, or none yet.

    What the number is, other checks look at: they know what it is for.
    """
    if type(value) is np.ndarray and value.dtype.kind == "f":
        return value
    if isinstance(value, (memoryview, array.array)):
        value = np.asarray(value)
    elif isinstance(value, (list, tuple)) or _has_rows(value):
        is_masked = any(issubclass(kind, np.ma.MaskedArray) for kind in set(map(type, value)))
        with remedied():
            value = (np.ma.array if is_masked else np.asarray)(value)
    if is_torch_array(value):
        return _dense_tensor(name, value)
    kind = type(value)
    if kind.__module__.startswith("polars") and hasattr(value, "collect"):
        raise TypeError(f"{name} is a polars {kind.__name__}, which is not computed yet; pass its .collect()")
    is_pydata = is_pydata_sparse_array(value)
    if is_pydata or issparse(value) or kind.__module__.startswith("cupyx.scipy.sparse"):
        raise _sparse(name, value, ".todense()" if is_pydata else ".toarray()", value.dtype.itemsize)
    _check_dtypes(name, value)
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(
            f"{name} has {np.sum(value.mask)} masked values; leave such rows out, as numpy.ma.compress_rows does, or "
            "put values there with .filled(value)"
        )
    return plain(value)


def _check_dtypes(name: str, value: Any) -> None:
    """Raise TypeError for an array, or columns of a data frame, of what can be taken for numbers and is none."""
    has_columns = hasattr(value, "columns")
    dtypes: list[Any] = list(getattr(value, "dtypes", ())) if has_columns else [getattr(value, "dtype", None)]
    for number, dtype in enumerate(dtypes):
        is_numpy = isinstance(dtype, np.dtype)
        if dtype.kind in "mM" if is_numpy else str(dtype).lower().startswith(TIMES):
            where = f", in column {value.columns[number]!r}" if has_columns else ""
            raise TypeError(
                f"{name} has dtype {dtype}{where}: times are no numbers; divide differences of times by a unit, as "
                "numpy.timedelta64(1, 's')"
            )
        if is_numpy and dtype.names:
            raise TypeError(
                f"{name} has a structured dtype, of fields {dtype.names}; pass "
                "numpy.lib.recfunctions.structured_to_unstructured of it"
            )
    if has_columns and dtypes and all(str(dtype).startswith("Sparse") for dtype in dtypes):
        raise _sparse(name, value, ".sparse.to_dense()", 8)


def _has_rows(value: Any) -> bool:
    """Whether this is a deque of rows; one of blocks is read block by block."""
    if not isinstance(value, deque):
        return False
    first = value[0] if value else ()
    return getattr(first[0] if isinstance(first, tuple) and first else first, "ndim", 0) < 2


def _dense_tensor(name: str, value: Any) -> Any:
    """A tensor whose memory has the numbers of all places, as they are."""
    layout = str(value.layout)
    if hasattr(value, "get_mask"):
        raise TypeError(f"{name} is a masked tensor; put values in its masked places with .to_tensor(value)")
    if value.is_nested:
        raise TypeError(f"{name} is a nested tensor, without rows of its own; pass torch.cat of its .unbind()")
    if layout != "torch.strided":
        raise _sparse(name, value, ".to_dense()", value.dtype.itemsize)
    if value.is_quantized:
        raise TypeError(f"{name} has dtype {value.dtype}, of quantized numbers; pass its .dequantize()")
    if value.is_meta:
        raise ValueError(f"{name} is on torch's meta device, which keeps no numbers; pass a tensor that has some")
    return plain(value)


def _sparse(name: str, value: Any, method: str, itemsize: int) -> TypeError:
    size = math.prod(value.shape) * itemsize / 2**20
    memory = f"{math.ceil(size)} MiB" if size < 2**10 else f"{size / 2**10:.3g} GiB"
    return TypeError(
        f"Sparse data was passed for {name}, but dense data is required. Use its {method}, which takes {memory} of "
        "memory"
    )


@contextmanager
def remedied() -> Iterator[None]:
    """Says what to do about an error of another library."""
    try:
        yield
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        remedy = next((remedy for beginning, remedy in REMEDIES.items() if str(error).startswith(beginning)), None)
        if remedy is None:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{str(error).rstrip('.')}; {remedy}") from None


def random_generator(random_state: Any) -> np.random.RandomState:
    """The generator for a `random_state`: a fresh one for None, so that NumPy's global generator stays untouched."""
    if random_state is None:
        return np.random.RandomState()
    try:
        return check_random_state(random_state)
    except ValueError as error:
        raise ValueError(
            f"{error}; random_state takes an integer from 0 to 2**32 - 1, a numpy.random.RandomState or None, got "
            f"{random_state!r}"
        ) from None


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raise unless `value` is an integer of at least `minimum`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")


def check_real(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number that is not negative."""
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def check_callback(callback: Any) -> None:
    """Raise TypeError for what can not be called after an iteration."""
    if callback is not None and not callable(callback):
        raise TypeError(
            f"callback must be a function of (iteration, lower bound, parameters) or None, got {callback!r}"
        )


def check_option(name: str, value: Any, options: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{name} must be one of {sorted(options)}, got {value!r}")


def check_covariance_type(covariance_type: Any) -> Covariance:
    """The covariance type of this name."""
    check_option("covariance_type", covariance_type, COVARIANCES)
    return COVARIANCES[covariance_type]


def validate_array(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """A user's array of this shape, floating and finite, in its own library (NumPy for anything else)."""
    value = dense(name, value)
    array = np.asarray(value) if isinstance(value, np.ndarray) or not is_array_api_obj(value) else value
    if isinstance(array, np.ndarray) and array.dtype == object:
        with remedied():
            array = array.astype(np.float64)
    if tuple(array.shape) != shape:
        raise ValueError(
            f"The parameter '{name}' should have the shape of {shape}, but got {tuple(array.shape)}; reshape it or "
            "change the number of components"
        )
    xp = array_namespace(array)
    if not xp.isdtype(array.dtype, ("real floating", "integral")):
        raise ValueError(f"The parameter '{name}' has dtype {array.dtype}; pass real numbers")
    array = xp.astype(array, floating_dtype(array), copy=False)
    if not bool(xp.all(xp.isfinite(array))):
        bad = "NaN" if bool(xp.any(xp.isnan(array))) else "infinity"
        raise ValueError(f"Input contains {bad} in the parameter '{name}'; pass finite values")
    return array


def validate_mixture_weights(name: str, value: Any, k: int, tolerance: float | None = None) -> Array:
    """Weights of k components, not negative, with sum 1."""
    weights = validate_array(name, value, (k,))
    xp = array_namespace(weights)
    if tolerance is None:
        tolerance = 1e-5 if weights.dtype == xp.float32 else 1e-8
    smallest, largest, total = float(xp.min(weights)), float(xp.max(weights)), float(xp.sum(weights))
    if smallest < 0 or largest > 1 + tolerance:
        raise ValueError(
            f"The parameter '{name}' should be in the range [0, 1], but got max value {largest:.5f}, min value "
            f"{smallest:.5f}; divide weights that are not negative by their sum"
        )
    if abs(total - 1) > tolerance:
        raise ValueError(
            f"The parameter '{name}' should be normalized, but got sum({name}) = {total:.5f}, off by {total - 1:.2g}; "
            "divide by it"
        )
    return weights


def validate_precisions(value: Any, covariance: Covariance, k: int, d: int) -> Array:
    """Precisions of k components in the form of the covariance type, symmetric and positive definite."""
    name = f"{covariance.name} precision"
    precisions = validate_array(name, value, covariance.shape(k, d))
    xp = array_namespace(precisions)
    if covariance.has_matrices:
        # As much as scikit-learn lets pass: inverses of ill-conditioned matrices are less symmetric than these.
        transposed = xp.matrix_transpose(precisions)
        difference = xp.abs(precisions - transposed)
        if bool(xp.any(difference > 1e-8 + 1e-5 * xp.abs(transposed))):
            raise ValueError(
                f"'{name}' should be symmetric, positive-definite: precisions_init differs from its transpose by up to "
                f"{float(xp.max(difference)):.3g}; pass (P + P^T) / 2 if that is rounding"
            )
        precisions = (precisions + transposed) / 2
    precisions = xp.astype(precisions, working_dtype(precisions))
    try:
        covariance.validate(precisions, k, d, "precisions_init")
    except ValueError as error:
        kind = "symmetric, positive-definite" if covariance.has_matrices else "positive"
        raise ValueError(f"'{name}' should be {kind}: {error}") from None
    return precisions


def validate_parameters(weights: Any, means: Any, covariances: Any, covariance: Covariance) -> Parameters:
    """Parameters from a user's arrays, in the library and on the device of `means`, in the working dtype."""
    means = dense("means", means)
    shape = tuple(means.shape if hasattr(means, "shape") else np.shape(means))
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"means has shape {shape}; expected (number of components, number of features)")
    k, d = shape
    means = validate_array("means", means, shape)
    weights = validate_mixture_weights("weights", weights, k)
    covariances = validate_array("covariances", covariances, covariance.shape(k, d))
    dtype = working_dtype(means)
    exact = asarray_like(covariances, means, dtype)
    covariance.validate(exact, k, d, "covariances")
    return Parameters(weights, means, exact, covariance.precision_cholesky(exact)).moved(means, dtype)


def check_mixture(
    weights: Array, means: Array, precision_cholesky: Array, covariance: Covariance, tolerance: float = 1e-2
) -> None:
    """Raise ValueError unless a file's arrays are the parameters of a mixture, in whatever precision they were saved.

    The sum of the weights may be off by `tolerance`: PyCave's are float32 sums over all rows, and bfloat16, in which
    they may once have been, has 8 bits.
    The factors decide: covariances that were rounded to float32 may be singular where their factors are not.
    """
    if len(means.shape) != 2 or 0 in means.shape:
        raise ValueError(f"means has shape {tuple(means.shape)}; expected (number of components, number of features)")
    k, d = means.shape
    validate_array("means", means, (k, d))
    validate_mixture_weights("weights", weights, k, tolerance)
    factors = validate_array("precisions_cholesky", precision_cholesky, covariance.shape(k, d))
    if not bool(covariance.is_factor(factors)):
        raise ValueError(
            "The parameter 'precisions_cholesky' should be upper triangular with a positive diagonal; pass U with "
            "U U^T = Sigma^-1"
        )


def check_type(name: str, value: Any, kind: type) -> None:
    """Raise TypeError unless `value` is of this type."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")


def _check_bound(name: str, value: Any) -> None:
    """Raise unless `value` is a log-likelihood; without iterations it is infinite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"{name} is NaN: the fit had failed; fit again")


def _check_bounds(name: str, value: Any) -> None:
    check_type(name, value, list)
    for bound in value:
        _check_bound(name, bound)
        if math.isinf(bound):
            raise ValueError(f"{name} must be finite, got {value!r}")


# What a fit says of how it went, and the check of each.
REPORTS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(("n_iter_", "num_iter_", "n_steps_"), partial(check_integer, minimum=0)),
    **dict.fromkeys(("lower_bound_", "nll_"), _check_bound),
    **dict.fromkeys(("backend_", "precision_"), partial(check_type, kind=str)),
    "converged_": partial(check_type, kind=bool),
    "inertia_": check_real,
    "lower_bounds_": _check_bounds,
}
