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
from array_api_compat import is_array_api_obj, is_dask_array, is_pydata_sparse_array, is_torch_array
from scipy.sparse import issparse
from sklearn import get_config
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data

from gaussmix._arrays import array_namespace, asarray_like, device, floating_dtype, plain, to_numpy, working_dtype
from gaussmix._blocks import Blocks, readable
from gaussmix._covariance import COVARIANCES, Covariance
from gaussmix._data import Rows, Stream, fingerprint, slices
from gaussmix._parameters import Parameters
from gaussmix._typing import Array

# Elements of a block of the finite check.
BLOCK_ELEMENTS = 2**20
# Rows of a stream that are kept to look at.
KEPT_ROWS = 1024

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
        with _remedied():
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
        xp = array_namespace(x)
        if like is None:
            # A copy: a view would keep the whole block.
            like = xp.astype(x[: min(KEPT_ROWS, x.shape[0]), :], floating_dtype(x), copy=True)
            if sample_weight is not None:
                weight = validate_weights(sample_weight, None, like, may_be_zero=min_rows == 0)
        x = _as_first(x, like, number, n)
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
    middle = sum(totals[1:], totals[0]) / (total or 1)
    seen %= 2**64

    def read() -> Iterator[Array]:
        return blocks.ahead(_again(blocks, like, n, weight, seen))

    return Stream(read, (n, like.shape[1]), like, middle, lambda: seen, weight)


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
    from gaussmix import _dask

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
        with _remedied():
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
def _remedied() -> Iterator[None]:
    """Says what to do about an error of another library."""
    try:
        yield
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        remedy = next((remedy for beginning, remedy in REMEDIES.items() if str(error).startswith(beginning)), None)
        if remedy is None:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{str(error).rstrip('.')}; {remedy}") from None


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
    xp = array_namespace(X)
    # Squares, and sums of them where they are computed in X's own precision, have room up to here.
    room = 1e12 if working_dtype(X) != xp.float64 else 1e18 if X.dtype == xp.float32 else 1e100
    for rows in slices(X.shape[0], max(1, BLOCK_ELEMENTS // X.shape[1])):
        block = xp.asarray(X[rows, :])
        if not xp.isdtype(block.dtype, "real floating"):
            return
        limit = min(room, float(xp.finfo(block.dtype).max))
        # One reduction finds all three: a maximum with a NaN in it is NaN.
        if float(xp.max(block)) <= limit and float(xp.min(block)) >= -limit:
            continue
        bad = xp.any(~(xp.abs(block) <= limit), axis=1)
        index = int(xp.argmax(xp.astype(bad, xp.int64)))
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
        with _remedied():
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
