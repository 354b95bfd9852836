"""The edge: what users pass in is checked here, and an error names the cause, the value and the remedy."""

from collections.abc import Collection
from numbers import Integral
from typing import Any

import numpy as np
from array_api_compat import is_array_api_obj, is_torch_array
from sklearn import get_config
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data

from gaussmix._arrays import array_namespace, asarray_like, device, floating_dtype, to_numpy, working_dtype
from gaussmix._covariance import COVARIANCES, Covariance
from gaussmix._data import Rows, slices
from gaussmix._parameters import Parameters
from gaussmix._typing import Array

# Elements of a block of the finite check.
BLOCK_ELEMENTS = 2**20


def validate_rows(
    estimator: Any,
    X: Any,
    *,
    reset: bool,
    min_rows: int = 1,
    sample_weight: Any = None,
    batch_size: int | None = None,
) -> Rows:
    """The rows of whatever X is, checked; sets `n_features_in_` with `reset` and compares with it without."""
    if isinstance(X, np.ndarray):
        # What scikit-learn would pass on as it is, it takes longer to look at than a small prediction does.
        own = isinstance(X, np.memmap) or (
            type(X) is np.ndarray
            and X.ndim == 2
            and X.dtype in (np.float32, np.float64)
            and not hasattr(estimator, "feature_names_in_")
        )
    else:
        own = is_array_api_obj(X)
    if own:
        X = _validate_array(estimator, X, reset, min_rows)
    else:
        if isinstance(X, np.ndarray) and X.dtype == np.float16:
            X = X.astype(np.float32)
        # Lists, data frames and NumPy arrays: scikit-learn's own rules and messages.
        X = validate_data(
            estimator,
            X,
            reset=reset,
            dtype=[np.float64, np.float32],
            ensure_all_finite=False,
            ensure_min_samples=min_rows,
        )
    if batch_size is not None:
        check_integer("batch_size", batch_size, 1)
    check_finite(X)
    return Rows(X, None if sample_weight is None else validate_weights(sample_weight, X), batch_size)


def _validate_array(estimator: Any, X: Array, reset: bool, min_rows: int) -> Array:
    """The same rules for arrays that need no conversion, memory maps (not to be read whole) and other libraries."""
    name = type(estimator).__name__
    if is_torch_array(X):
        X = X.detach()
    xp = array_namespace(X)
    if X.ndim != 2:
        raise ValueError(
            f"Expected 2D array, got {X.ndim}D array of shape {tuple(X.shape)}; reshape your data to (n, 1) for a "
            "single feature or (1, d) for a single row"
        )
    if xp.isdtype(X.dtype, "complex floating"):
        raise ValueError(f"Complex data not supported: X has dtype {X.dtype}; pass real numbers")
    if not xp.isdtype(X.dtype, ("real floating", "integral", "bool")):
        raise ValueError(f"X has dtype {X.dtype}; pass floating-point numbers or integers")
    n, d = X.shape
    if n < min_rows:
        raise ValueError(f"Found array with {n} sample(s) (shape={n, d}) while a minimum of {min_rows} is required.")
    if d < 1:
        raise ValueError(f"Found array with 0 feature(s) (shape={n, d}) while a minimum of 1 is required.")
    if reset:
        estimator.n_features_in_ = d
        vars(estimator).pop("feature_names_in_", None)
    elif d != estimator.n_features_in_:
        raise ValueError(f"X has {d} features, but {name} is expecting {estimator.n_features_in_} features as input.")
    if isinstance(X, np.memmap) or X.dtype in (xp.float32, xp.float64):
        return X
    return xp.astype(X, floating_dtype(X))


def check_finite(X: Array) -> None:
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
        row, values = rows.start + index, to_numpy(block[index, :]).astype(np.float64)
        worst = values[~(np.abs(values) <= limit)][0]
        if np.isnan(worst):
            raise ValueError(f"Input X contains NaN (first in row {row}); remove or impute such rows")
        if np.isinf(worst):
            raise ValueError(f"Input X contains infinity (first in row {row}); remove or clip such rows")
        raise ValueError(
            f"Input X contains a value too large to square, {worst:g} (first in row {row}); rescale the data or pass "
            "float64"
        )


def validate_weights(sample_weight: Any, X: Array) -> Array:
    """Weights of the rows of X (n,), in its library, on its device and in the working dtype."""
    n = X.shape[0]
    weight = to_numpy(sample_weight)
    if weight.ndim == 0 and np.issubdtype(weight.dtype, np.number):
        weight = np.full(n, weight)
    if weight.shape != (n,):
        raise ValueError(f"sample_weight has shape {weight.shape}; pass one weight for each of the {n} rows")
    try:
        weight = weight.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sample_weight has dtype {weight.dtype}; pass numbers") from error
    if not np.all(np.isfinite(weight)):
        raise ValueError("sample_weight contains NaN or infinity; pass finite weights")
    if weight.min() < 0:
        raise ValueError(f"sample_weight contains a negative value, {weight.min():g}; pass weights >= 0")
    if not weight.any():
        raise ValueError("sample_weight is zero for every row; at least one row needs a positive weight")
    return asarray_like(weight, X, working_dtype(X))


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


def check_enough_rows(rows: Rows, name: str, k: int) -> None:
    """Raise ValueError where there are fewer rows of positive weight than components."""
    n = rows.shape[0]
    if rows.sample_weight is not None:
        xp = array_namespace(rows.array)
        n = int(xp.sum(xp.astype(rows.sample_weight > 0, xp.int64)))
    if n < k:
        raise ValueError(f"{name}={k} is more than the number of rows, {n}; use fewer components or more data")


def random_generator(random_state: Any) -> np.random.RandomState:
    """The generator for a `random_state`: a fresh one for None, so that NumPy's global generator stays untouched."""
    return np.random.RandomState() if random_state is None else check_random_state(random_state)


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
    if not 0 <= value < np.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


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
    array = value if is_array_api_obj(value) else np.asarray(value)
    if is_torch_array(array):
        array = array.detach()
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(array.shape)}; expected {shape}")
    xp = array_namespace(array)
    if not xp.isdtype(array.dtype, ("real floating", "integral")):
        raise ValueError(f"{name} has dtype {array.dtype}; pass real numbers")
    array = xp.astype(array, floating_dtype(array), copy=False)
    if not bool(xp.all(xp.isfinite(array))):
        raise ValueError(f"{name} contains NaN or infinity; pass finite values")
    return array


def validate_mixture_weights(name: str, value: Any, k: int) -> Array:
    """Weights of k components, not negative, with sum 1."""
    weights = validate_array(name, value, (k,))
    xp = array_namespace(weights)
    if float(xp.min(weights)) < 0:
        raise ValueError(f"{name} should be in the range [0, 1], got a value of {float(xp.min(weights)):g}")
    total = float(xp.sum(weights))
    if abs(total - 1) > (1e-5 if weights.dtype == xp.float32 else 1e-8):
        raise ValueError(f"{name} should be normalized, but has the sum {total:.9g}; divide by it")
    return weights


def validate_parameters(weights: Any, means: Any, covariances: Any, covariance: Covariance) -> Parameters:
    """Parameters from a user's arrays, in the library, dtype and on the device of `means`."""
    shape = tuple(getattr(means, "shape", np.shape(means)))
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"means has shape {shape}; expected (number of components, number of features)")
    k, d = shape
    means = validate_array("means", means, shape)
    weights = validate_mixture_weights("weights", weights, k)
    covariances = validate_array("covariances", covariances, covariance.shape(k, d))
    # The factor is taken in full precision and only then rounded to the dtype of the means.
    exact = asarray_like(covariances, means, working_dtype(means))
    covariance.validate(exact, k, d, "covariances")
    parameters = Parameters(weights, means, exact, covariance.precision_cholesky(exact))
    return parameters.moved(means, means.dtype)
