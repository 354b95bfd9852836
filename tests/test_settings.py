"""What NumPy, torch and `warnings` are told is the caller's: fits, predictions and samples do not depend on it."""

import inspect

import numpy as np
import pytest
from sklearn.base import clone

from cases import blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._estimator import numpy_defaults
from gaussmix.backends import _numpy
from gaussmix.sklearn import GaussianMixture as SklearnMixture

# Far apart, and squares of a feature have no room in float64: responsibilities and distances underflow.
X = blobs(n=600, d=5, k=3, seed=2)
X[:200] *= 60
X[:, 4] *= 1e-170
CLASSES = [GaussianMixture, SklearnMixture, KMeans]


def estimators(covariance):
    return [
        GaussianMixture(3, covariance_type=covariance.name, random_state=0, trainer_params={"max_epochs": 4}),
        SklearnMixture(3, covariance_type=covariance.name, random_state=0, max_iter=4),
        KMeans(3, random_state=0),
    ]


def results(estimator, x):
    """What the public methods give for these rows, as NumPy arrays."""
    fitted = clone(estimator).fit(x)
    names = ("weights_", "means_", "covariances_", "precisions_cholesky_", "centroids_")
    found = [getattr(fitted, name) for name in names if hasattr(fitted, name)]
    methods = ("predict", "predict_proba", "score_samples", "score", "transform", "bic", "aic")
    found += [getattr(fitted, name)(x) for name in methods if hasattr(fitted, name)]
    if hasattr(fitted, "sample"):
        drawn = fitted.sample(5)
        found.append(drawn[0] if isinstance(drawn, tuple) else drawn)
        found.append(clone(estimator).partial_fit(x).partial_fit(x).means_)
        found.append(type(estimator).from_sklearn(fitted.to_sklearn()).predict_proba(x))
        known = to_numpy(fitted.weights_), to_numpy(fitted.means_), to_numpy(fitted.covariances_)
        again = type(estimator).from_parameters(*known, covariance_type=estimator.covariance_type)
        found.append(again.score_samples(x))
    return [to_numpy(value) for value in found]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_unreported(estimator, x):
    """NumPy tells the caller nothing of what is computed here, and raises nothing."""
    expected = results(estimator, x)
    seen = []
    before = np.geterr(), np.geterrcall()
    with np.errstate(all="call", call=lambda *what: seen.append(what)):
        found = results(estimator, x)
        assert set(np.geterr().values()) == {"call"}
    assert before == (np.geterr(), np.geterrcall())
    assert seen == []
    with np.errstate(all="raise"):
        clone(estimator).fit_predict(x)
    assert_same(found, expected)


@pytest.mark.parametrize("index", range(2))
def test_numpy_is_told_to_report_errors(index, covariance, dtype, implementation, unconverged, monkeypatch):
    monkeypatch.setattr(_numpy, "SLAB_FLOPS", 10**4)  # in threads as well, which do not have the caller's settings
    assert_unreported(estimators(covariance)[index], X.astype(dtype))


def test_numpy_is_told_to_report_errors_of_kmeans(dtype, implementation, monkeypatch):
    monkeypatch.setattr(_numpy, "SLAB_FLOPS", 10**4)
    assert_unreported(KMeans(3, random_state=0), X.astype(dtype))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_method_that_computes_has_numpys_defaults(cls):
    # The wrapper of a method that does nothing has the code of all such wrappers.
    code = numpy_defaults(lambda: None).__code__
    computing = {"fit", "partial_fit", "predict", "predict_proba", "transform", "score_samples", "score", "bic", "aic"}
    computing |= {"sample", "from_parameters", "to_sklearn", "from_sklearn"}
    for name in computing & set(dir(cls)):
        method = inspect.unwrap(getattr(cls, name), stop=lambda function: function.__code__ is code)
        assert getattr(method, "__func__", method).__code__ is code, name


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
def test_a_warning_names_the_callers_line(cls):
    limit = {"trainer_params": {"max_epochs": 1}} if cls is GaussianMixture else {"max_iter": 1}
    for call in ("fit", "fit_predict"):
        with pytest.warns(match="did not converge") as caught:
            getattr(cls(3, random_state=0, **limit), call)(X)
        assert [warning.filename for warning in caught] == [__file__]


SETTINGS = {
    "default dtype": lambda torch: (torch.set_default_dtype, torch.float16, torch.get_default_dtype()),
    "default device": lambda torch: (torch.set_default_device, "meta", None),
    "deterministic": lambda torch: (torch.use_deterministic_algorithms, True, False),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("index", range(3))
def test_torch_is_told_otherwise(setting, index, implementation, unconverged):
    torch = pytest.importorskip("torch")
    estimator, x = estimators(COVARIANCES["full"])[index], torch.tensor(X[::6])
    expected = results(estimator, x)
    change, value, before = SETTINGS[setting](torch)
    change(value)
    try:
        found = results(estimator, x)
    finally:
        change(before)
    assert_same(found, expected)


@pytest.mark.parametrize("index", range(3))
def test_torch_records_no_gradients(index, implementation, unconverged):
    torch = pytest.importorskip("torch")
    estimator, x = estimators(COVARIANCES["full"])[index], torch.tensor(X[::6])
    expected = results(estimator, x)
    with torch.inference_mode():
        assert_same(results(estimator, x), expected)
