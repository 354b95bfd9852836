"""Rows as users pass them, checked: what is wrong is said with its cause, its value and the remedy."""

import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from array_api_compat import is_array_api_obj, is_dask_array
from sklearn import get_config
from sklearn.utils.validation import validate_data

from gaussmix._arrays import array_namespace, as_host, asarray_like, device, floating_dtype, to_numpy, working_dtype
from gaussmix._checks import FLATTEN, check_integer, dense, remedied
from gaussmix._typing import Array
from gaussmix.rows._blocks import Blocks, readable
from gaussmix.rows._data import Rows, Stream, fingerprint, slices

# Elements of a block of the finite check.
BLOCK_ELEMENTS = 2**20
# Rows of a stream that are kept to look at.
KEPT_ROWS = 1024


def validate_rows(
    estimator: Any,
    X: Any,
    *,
    reset: bool,
    min_rows: int = 1,
    sample_weight: Any = None,
    batch_size: int | None = None,
    num_workers: int = 0,
) -> Rows | Stream:
    """The rows of whatever X is, checked; sets `n_features_in_` with `reset` and compares with it without."""
    if batch_size is not None:
        check_integer("batch_size", batch_size, 1)
    check_integer("num_workers", num_workers, 0)
    if is_dask_array(X):
        return _validate_dask(estimator, X, reset, min_rows, sample_weight)
    _refuse_dask(X)
    X = readable(dense("X", X), batch_size, num_workers)
    if isinstance(X, Blocks):
        return _validate_stream(estimator, X, reset, min_rows, sample_weight)
    if isinstance(X, np.ndarray):
        # What scikit-learn would pass on as it is, it takes longer to look at than a small prediction does.
        own = (
            type(X) is np.ndarray
            and X.ndim == 2
            and X.dtype in (np.float32, np.float64)
            and not hasattr(estimator, "feature_names_in_")
        )
    else:
        own = is_array_api_obj(X)
    if own:
        X = _validate_array(X)
        n, d = X.shape
        _check_shape(estimator, n, d, reset, min_rows)
    else:
        if isinstance(X, np.ndarray) and X.dtype == np.float16:
            X = X.astype(np.float32)
        # Lists, data frames and NumPy arrays: scikit-learn's own rules and messages.
        with remedied():
            X = validate_data(
                estimator,
                X,
                reset=reset,
                dtype=[np.float64, np.float32],
                ensure_all_finite=False,
                ensure_min_samples=min_rows,
            )
    check_finite(X)
    weight = None
    if sample_weight is not None:
        weight = validate_weights(sample_weight, X.shape[0], X, may_be_zero=min_rows == 0)
    return Rows(X, weight, batch_size)


def _validate_stream(estimator: Any, blocks: Blocks, reset: bool, min_rows: int, sample_weight: Any) -> Stream:
    """One pass over the blocks: each of them checked, their number of rows, their mean and their fingerprint."""
    _refuse_one_pass(blocks.source)
    if sample_weight is not None:
        _refuse_random_order(blocks.source)
    n, like, totals, seen = 0, None, [], 0
    weight = None
    for number, block in enumerate(blocks.ahead(blocks.raw())):
        x = _validate_array(block)
        if like is None:
            # A copy: a view would keep the whole block.
            like = array_namespace(x).astype(x[: min(KEPT_ROWS, x.shape[0]), :], floating_dtype(x), copy=True)
            if sample_weight is not None:
                weight = validate_weights(sample_weight, None, as_host(like), may_be_zero=min_rows == 0)
        x = as_host(_as_first(x, like, number, n))
        xp = array_namespace(x)
        if x.shape[1]:
            check_finite(x, first_row=n)
        part = slice(n, n + x.shape[0])
        n = part.stop
        values = x
        if weight is not None:
            if n > weight.shape[0]:
                shape = tuple(weight.shape)
                raise ValueError(
                    f"sample_weight has shape {shape}, and the data more rows; pass one weight for each row"
                )
            values = weight[part, None] * xp.astype(x, weight.dtype, copy=False)
        totals.append(xp.sum(values, axis=0, dtype=working_dtype(x)))
        seen += fingerprint(x, None if weight is None else weight[part])
    if like is None:
        raise ValueError(
            "the data gave no blocks; pass an object that gives blocks of rows each time it is iterated over"
        )
    _check_shape(estimator, n, like.shape[1], reset, min_rows)
    if weight is not None and weight.shape != (n,):
        raise ValueError(f"sample_weight has shape {tuple(weight.shape)}; pass one weight for each of the {n} rows")
    total = n if weight is None else float(array_namespace(weight).sum(weight))
    middle, own_weight = (
        None if value is None else asarray_like(value, like, working_dtype(like))
        for value in (sum(totals[1:], totals[0]) / (total or 1), weight)
    )
    seen %= 2**64

    def read() -> Iterator[Array]:
        return blocks.ahead(_again(blocks, like, n, weight, seen))

    return Stream(read, (n, like.shape[1]), like, middle, lambda: seen, own_weight)


def _again(blocks: Blocks, like: Array, n: int, weight: Array | None, seen: int) -> Iterator[Array]:
    """The blocks in a later pass; raises where they do not have the n rows, of this fingerprint, of the first one."""
    start, found = 0, 0
    for number, block in enumerate(blocks.raw()):
        x = _as_first(_validate_array(block), like, number, start)
        part = slice(start, start + x.shape[0])
        start = part.stop
        if start > n:
            break
        found += fingerprint(x, None if weight is None else weight[part])
        yield x
    same = "the same rows" if weight is None else "the same rows in the same order, which sample_weight goes by,"
    remedy = f"pass an object that gives {same} each time it is iterated over"
    if start != n:
        raise ValueError(f"the data gave {n} rows in the first pass and {start} in a later one; {remedy}")
    if found % 2**64 != seen:
        raise ValueError(
            f"the data gave other rows in a later pass than in the first one; {remedy}: without random augmentation "
            "and sampling, and not while it is written"
        )


def _as_first(x: Array, like: Array, number: int, start: int) -> Array:
    """A block in the dtype of the first one, which it has to be like."""
    if type(x) is not type(like) or x.shape[1] != like.shape[1]:
        raise ValueError(
            f"block {number} (after row {start}) is a {type(x).__name__} with {x.shape[1]} features, the first one a "
            f"{type(like).__name__} with {like.shape[1]}; all blocks need the same"
        )
    with np.errstate(over="ignore"):  # what a narrower dtype has no room for is not finite there
        return array_namespace(x).astype(x, like.dtype, copy=False)


def _refuse_one_pass(source: Any) -> None:
    """Raise ValueError for what can be gone through only once."""
    if isinstance(source, Iterator) and iter(source) is source:
        raise ValueError(
            f"X is a {type(source).__name__}, an iterator, which can be gone through only once; pass an object whose "
            "__iter__ begins anew each time, or an array: numpy.concatenate(list(X))"
        )


def _refuse_random_order(loader: Any) -> None:
    """Raise ValueError for a torch DataLoader in whose order no weights can be given."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(loader, torch.utils.data.DataLoader):
        return
    data = torch.utils.data
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)) or (
            isinstance(sampler, data.DistributedSampler) and sampler.shuffle
        ):
            raise ValueError(
                f"the DataLoader draws its rows by a {type(sampler).__name__}, and sample_weight has weights for rows "
                "in a fixed order; pass a loader with shuffle=False"
            )


def _refuse_dask(X: Any) -> None:
    """Raise TypeError for what holds Dask arrays: as an array in memory it would be computed, whatever its size."""
    dask = sys.modules.get("dask")
    if dask is not None and dask.base.is_dask_collection(X):
        raise TypeError(
            f"X is a {type(X).__module__}.{type(X).__qualname__}, which Dask has not computed; pass a Dask array: "
            "X.to_dask_array(lengths=True) of a data frame, X.data of xarray's arrays"
        )


def _validate_dask(estimator: Any, X: Any, reset: bool, min_rows: int, sample_weight: Any) -> Stream:
    """One pass over the blocks of a Dask array, for its mean and what is wrong with it."""
    # Imports dask, whose array it is.
    from gaussmix.rows import _dask

    X = validate_lazy(X)
    n, d = X.shape
    if math.isnan(n):
        raise ValueError(
            "the Dask array does not know the sizes of its chunks, and a fit needs them; pass X.compute_chunk_sizes(), "
            "or to_dask_array(lengths=True) of a data frame"
        )
    _check_shape(estimator, n, d, reset, min_rows)
    if isinstance(getattr(sample_weight, "_meta", None), np.ma.MaskedArray):
        sample_weight = sample_weight.map_blocks(partial(np.ma.filled, fill_value=0))
    if sample_weight is not None and not is_dask_array(sample_weight):
        sample_weight = validate_weights(sample_weight, n, np.empty(0))
    elif sample_weight is not None and not array_namespace(sample_weight).isdtype(
        sample_weight.dtype, ("real floating", "integral", "bool")
    ):
        raise ValueError(f"sample_weight has dtype {sample_weight.dtype}; pass numbers")
    elif sample_weight is not None and sample_weight.shape != (n,):
        raise ValueError(f"sample_weight has shape {sample_weight.shape}; pass one weight for each of the {n} rows")
    return _dask.rows_of(X, sample_weight, _check_block)


def validate_lazy(X: Any) -> Any:
    """A Dask array of two dimensions and real numbers, with whole rows in its chunks; nothing is computed."""
    X = _validate_array(X)
    if math.isnan(X.shape[1]):
        raise ValueError("the Dask array does not know its number of features; pass X.compute_chunk_sizes()")
    return X.rechunk({1: -1}) if X.numblocks[1] > 1 else X


def _check_block(x: Array, weight: Array | None, first_row: int) -> None:
    """Raise for rows that are not finite, and for weights that are no weights."""
    check_finite(_validate_array(x), first_row)
    if weight is not None:
        _checked_weights(to_numpy(weight))


def _validate_array(X: Array) -> Array:
    """Two dimensions of real numbers: for arrays that need no conversion, and other libraries."""
    X = dense("X", X)
    xp = array_namespace(X)
    if X.ndim != 2:
        remedy = "reshape your data to (n, 1) for a single feature or (1, d) for a single row"
        raise ValueError(
            f"Expected 2D array, got {X.ndim}D array of shape {tuple(X.shape)}; {FLATTEN if X.ndim > 2 else remedy}"
        )
    if xp.isdtype(X.dtype, "complex floating"):
        raise ValueError(f"Complex data not supported: X has dtype {X.dtype}; pass real numbers")
    if not xp.isdtype(X.dtype, ("real floating", "integral", "bool")):
        raise ValueError(f"X has dtype {X.dtype}; pass floating-point numbers or integers")
    return xp.astype(X, floating_dtype(X), copy=False)


def _check_shape(estimator: Any, n: int, d: int, reset: bool, min_rows: int) -> None:
    """Raise ValueError for too few rows and for another number of features than the estimator was fitted to."""
    if n < min_rows:
        raise ValueError(f"Found array with {n} sample(s) (shape={n, d}) while a minimum of {min_rows} is required.")
    if d < 1:
        raise ValueError(f"Found array with 0 feature(s) (shape={n, d}) while a minimum of 1 is required.")
    if reset:
        estimator.n_features_in_ = d
        vars(estimator).pop("feature_names_in_", None)
    elif d != estimator.n_features_in_:
        name = type(estimator).__name__
        raise ValueError(f"X has {d} features, but {name} is expecting {estimator.n_features_in_} features as input.")


def check_finite(X: Array, first_row: int = 0) -> None:
    """Raise ValueError for NaN, infinity and values whose squares would leave the range of the working precision."""
    is_narrow = working_dtype(X) != array_namespace(X).float64
    X = as_host(X)
    xp = array_namespace(X)
    # Squares, and sums of them where they are computed in X's own precision, have room up to here.
    room = 1e12 if is_narrow else 1e18 if X.dtype == xp.float32 else 1e100
    for rows in slices(X.shape[0], max(1, BLOCK_ELEMENTS // X.shape[1])):
        block = xp.asarray(X[rows, :])
        if not xp.isdtype(block.dtype, "real floating"):
            return
        limit = min(room, float(xp.finfo(block.dtype).max))
        # One reduction finds all three: a maximum with a NaN in it is NaN.
        if float(xp.max(block)) <= limit and float(xp.min(block)) >= -limit:
            continue
        bad = xp.any(~(xp.abs(block) <= limit), axis=1)
        index = int(xp.argmax(xp.astype(bad, xp.uint8)))
        row, values = first_row + rows.start + index, to_numpy(block[index, :]).astype(np.float64)
        worst = values[~(np.abs(values) <= limit)][0]
        if np.isnan(worst):
            raise ValueError(f"Input X contains NaN (first in row {row}); remove or impute such rows")
        if np.isinf(worst):
            raise ValueError(f"Input X contains infinity (first in row {row}); remove or clip such rows")
        raise ValueError(
            f"Input X contains a value too large to square, {worst:g} (first in row {row}); rescale the data or pass "
            "float64"
        )


def validate_weights(sample_weight: Any, n: int | None, like: Array, *, may_be_zero: bool = False) -> Array:
    """Weights of n rows (n,), in the library and on the device of `like`, in the working dtype.

    With n = None for rows that are yet to be counted. All of them zero is for a share of the rows alone.
    """
    if isinstance(sample_weight, np.ma.MaskedArray):
        sample_weight = sample_weight.filled(0)
    weight = to_numpy(dense("sample_weight", sample_weight))
    if weight.ndim == 0 and n is not None and np.issubdtype(weight.dtype, np.number):
        weight = np.full(n, weight)
    if weight.ndim != 1 or n not in (None, len(weight)):
        which = "row" if n is None else f"of the {n} rows"
        raise ValueError(f"sample_weight has shape {weight.shape}; pass one weight for each {which}")
    weight = _checked_weights(weight)
    if not (may_be_zero or weight.any()):
        raise ValueError("sample_weight is zero for every row; at least one row needs a positive weight")
    return asarray_like(weight, like, working_dtype(like))


def _checked_weights(weight: Array) -> Array:
    if weight.dtype.kind == "c":
        raise ValueError(f"sample_weight has dtype {weight.dtype}; pass real numbers")
    try:
        weight = weight.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"sample_weight has dtype {weight.dtype}; pass numbers") from error
    if not np.all(np.isfinite(weight)):
        raise ValueError("sample_weight contains NaN or infinity; pass finite weights")
    if weight.min(initial=0) < 0:
        raise ValueError(f"sample_weight contains a negative value, {weight.min():g}; pass weights >= 0")
    return weight


def check_same_library(X: Array, estimator: Any, fitted: Array, method: str) -> None:
    """Raise ValueError where X and the fitted arrays differ in library or device, if scikit-learn asks for it.

    Its array API dispatch makes that an error; without dispatch, predictions follow the library of X.
    """
    if not get_config()["array_api_dispatch"]:
        return
    found, expected = ((array_namespace(a).__name__, device(a)) for a in (X, fitted))
    if found != expected:
        raise ValueError(
            f"Inputs passed to {type(estimator).__name__}.{method}() must use the same namespace and device as those "
            f"passed to fit(): got {found}, fitted with {expected}; convert them or switch array_api_dispatch off"
        )


def check_enough_rows(n: int, name: str, k: int) -> None:
    """Raise ValueError where there are fewer rows of positive weight, n, than components."""
    if n < k:
        raise ValueError(
            f"Expected n_samples >= {name} but got {name} = {k}, n_samples = {n}; use fewer components or more data"
        )
