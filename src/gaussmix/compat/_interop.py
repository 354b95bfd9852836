"""To and from `sklearn.mixture.GaussianMixture`, which is imported only where it is needed."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
from array_api_compat import is_array_api_obj
from sklearn.utils.validation import check_is_fitted

from gaussmix._arrays import array_namespace, to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._parameters import Parameters

ARRAYS = ("weights_", "means_", "covariances_", "precisions_cholesky_")
# What else a fit leaves, under scikit-learn's names; all of it is copied, and reports of EM become plain Python values.
ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "converged_": bool,
    "n_iter_": int,
    "lower_bound_": float,
    "lower_bounds_": lambda bounds: [float(bound) for bound in bounds],
    "n_features_in_": int,
    "feature_names_in_": np.array,
}


def attributes(mixture: Any) -> dict[str, Any]:
    """Those of `ATTRIBUTES` that the mixture has."""
    return {name: plain(getattr(mixture, name)) for name, plain in ATTRIBUTES.items() if hasattr(mixture, name)}


def to_sklearn(mixture: Any, params: dict[str, Any], fitted: dict[str, Any]) -> Any:
    """A fitted `sklearn.mixture.GaussianMixture` with the arrays of `mixture`, in host memory."""
    from sklearn.mixture._gaussian_mixture import GaussianMixture  # not ours, which gaussmix.accel may have put there

    check_is_fitted(mixture, ARRAYS)
    on_host = {name: to_numpy(value) if is_array_api_obj(value) else value for name, value in params.items()}
    converted = GaussianMixture(**deepcopy(on_host))
    arrays = {name: np.array(to_numpy(getattr(mixture, name))) for name in ARRAYS}
    covariance = COVARIANCES[converted.covariance_type]
    converted.covariance_type = covariance.sklearn_name
    for name in ("covariances_", "precisions_cholesky_"):
        arrays[name] = np.array(covariance.for_sklearn(arrays[name], len(arrays["weights_"])))
    vars(converted).update({"n_features_in_": arrays["means_"].shape[1]} | fitted | arrays)
    factors = converted.precisions_cholesky_.astype(converted.covariances_.dtype)
    converted.precisions_ = covariance.square(factors)
    return converted


def from_sklearn(mixture: Any) -> tuple[dict[str, Any], Parameters, dict[str, Any]]:
    """Constructor parameters, fitted parameters and other attributes of a `sklearn.mixture.GaussianMixture`."""
    from sklearn.mixture._gaussian_mixture import GaussianMixture  # not ours, which gaussmix.accel may have put there

    if not isinstance(mixture, GaussianMixture):
        cls = type(mixture)
        raise TypeError(
            f"from_sklearn takes a fitted sklearn.mixture.GaussianMixture, got a {cls.__module__}.{cls.__qualname__}; "
            "from_parameters makes a mixture of any weights, means and covariances"
        )
    # scikit-learn predicts without covariances, where the other attributes were set by hand.
    check_is_fitted(mixture, [name for name in ARRAYS if name != "covariances_"])
    params = deepcopy({name: getattr(mixture, name) for name in GaussianMixture().get_params(deep=False)})
    xp = array_namespace(mixture.means_)
    arrays = {name: getattr(mixture, name) for name in ARRAYS if hasattr(mixture, name)}
    if "covariances_" not in arrays:
        arrays["covariances_"] = COVARIANCES[mixture.covariance_type].covariances(mixture.precisions_cholesky_)
    # Copies, as a mixture owns its arrays.
    parameters = Parameters(*(xp.asarray(arrays[name], copy=True) for name in ARRAYS))
    found = {"n_features_in_": parameters.means.shape[1]} | attributes(mixture)
    return params, parameters, found
