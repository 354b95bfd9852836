"""Data that breaks mixture code: constant, equal, far away, too few, too large."""

import copy
import pickle
import warnings

import numpy as np
import pytest

from cases import assert_close, blobs
from conftest import INSTALLED
from gaussmix import GaussianMixture, KMeans
from gaussmix._arrays import to_numpy
from gaussmix._parameters import SingularCovarianceError
from gaussmix.sklearn import GaussianMixture as SklearnMixture

pytestmark = pytest.mark.usefixtures("unconverged")


def fit(x, k, covariance, **settings):
    return GaussianMixture(k, covariance_type=covariance.name, **{"random_state": 0, **settings}).fit(x)


def assert_sane(mixture, x):
    """Finite parameters, weights with sum 1, valid labels and probabilities."""
    for name in ("weights_", "means_", "covariances_", "precisions_cholesky_"):
        assert np.all(np.isfinite(to_numpy(getattr(mixture, name)))), name
    assert_close(to_numpy(mixture.weights_).sum(), 1, 1e-6)
    labels, proba = to_numpy(mixture.predict(x)), to_numpy(mixture.predict_proba(x))
    assert labels.min() >= 0
    assert labels.max() < mixture.num_components
    assert_close(proba.sum(axis=1), np.ones(len(proba)), 1e-6)
    assert np.all(np.isfinite(to_numpy(mixture.score_samples(x))))


def test_mean_far_larger_than_spread(library, covariance, dtype):
    base = blobs(n=2000, d=4, k=2, seed=1)
    offset = (1e6 + base).astype(dtype)
    shifted_back = (offset.astype(np.float64) - 1e6).astype(np.float64)
    found, expected = fit(library.asarray(offset), 2, covariance), fit(shifted_back, 2, covariance)
    assert_close(to_numpy(found.covariances_), expected.covariances_, 1e-6 if dtype == "float32" else 1e-9)
    # The means, and so the probabilities, are rounded to the resolution of the dtype at 1e6.
    resolution = np.spacing(np.asarray(1e6, dtype=dtype))
    assert np.abs(to_numpy(found.means_).astype(np.float64) - 1e6 - expected.means_).max() <= resolution
    tolerance = 0.05 if dtype == "float32" else 1e-6
    assert_close(
        to_numpy(found.predict_proba(library.asarray(offset))), expected.predict_proba(shifted_back), tolerance
    )
    assert_close(found.nll_, expected.nll_, 1e-6)


def test_constant_feature(library, covariance, dtype):
    x = blobs(n=300, d=3, k=2, seed=2).astype(dtype)
    x[:, 0] = 3
    mixture = fit(library.asarray(x), 2, covariance)
    assert_sane(mixture, library.asarray(x))
    variances = to_numpy(mixture.covariances_)
    if covariance.name == "diag":
        assert_close(variances[:, 0], [1e-6, 1e-6], 1e-9)
    elif covariance.has_matrices:
        assert_close(np.atleast_3d(variances.reshape(-1, 3, 3))[:, 0, 0], 1e-6 * np.ones(variances.size // 9), 1e-9)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_all_rows_equal(library, covariance, dtype, k):
    x = library.asarray(np.ones((50, 3)), dtype)
    assert_sane(fit(x, k, covariance), x)


@pytest.mark.parametrize("strategy", ["kmeans", "kmeans++", "random", "random_from_data"])
def test_fewer_distinct_rows_than_components(library, covariance, dtype, strategy):
    x = library.asarray(np.repeat([[0.0, 0.0], [1.0, 1.0]], 100, axis=0), dtype)
    mixture = fit(x, 5, covariance, init_strategy=strategy)
    assert_sane(mixture, x)
    assert to_numpy(mixture.means_).min() >= -1e-6
    assert to_numpy(mixture.means_).max() <= 1 + 1e-6


def test_as_many_components_as_rows(library, covariance, dtype):
    x = library.asarray([[0.0, 1.0], [5.0, 3.0], [9.0, -4.0]], dtype)
    assert_sane(fit(x, 3, covariance), x)


def test_more_features_than_rows(library, covariance):
    x = library.asarray(np.random.RandomState(0).normal(size=(30, 40)))
    assert_sane(fit(x, 2, covariance), x)


def test_far_outlier(library, covariance, dtype):
    x = blobs(n=300, d=2, k=2, seed=3).astype(dtype)
    x[0] = 1e10
    assert_sane(fit(library.asarray(x), 3, covariance), library.asarray(x))


def test_zero_weight_component(library, covariance):
    d, shape = 2, covariance.shape(2, 2)
    identity = np.broadcast_to(np.eye(d) if covariance.has_matrices else 1.0, shape).copy()
    mixture = GaussianMixture.from_parameters(
        *map(library.asarray, ([1.0, 0.0], [[0.0, 0.0], [1.0, 1.0]], identity)), covariance_type=covariance.name
    )
    x = library.asarray([[1.0, 1.0], [0.0, 0.0]])
    assert_close(to_numpy(mixture.predict_proba(x)), [[1, 0], [1, 0]], 0)
    assert_close(to_numpy(mixture.score_samples(x)), np.log(2 * np.pi) + np.array([1.0, 0.0]), 1e-12)
    assert set(to_numpy(mixture.sample(50))[:, 0] > -10) == {True}


def test_features_of_very_different_scale(library, covariance):
    x = blobs(n=400, d=2, k=2, seed=4) * np.array([1e-4, 1e4])
    mixture = fit(library.asarray(x), 2, covariance, covariance_regularization=0.0)
    assert_sane(mixture, library.asarray(x))


def test_half_precision_is_computed_without_overflow():
    torch = pytest.importorskip("torch")
    x = 300 + blobs(n=200, d=2, k=2, seed=5)
    for half in (
        x.astype(np.float16),
        torch.as_tensor(x, dtype=torch.float16),
        torch.as_tensor(x, dtype=torch.bfloat16),
    ):
        mixture = GaussianMixture(2, random_state=0).fit(half)
        assert str(mixture.means_.dtype).endswith("float32")
        assert_sane(mixture, half)


def test_integers_and_booleans_become_float64(library, covariance):
    x = np.round(10 * blobs(n=200, d=2, k=2, seed=6)).astype(np.int32)
    found, expected = fit(library.asarray(x), 2, covariance), fit(x.astype(np.float64), 2, covariance)
    assert str(found.means_.dtype).endswith("float64")
    assert_close(to_numpy(found.means_), expected.means_, 1e-12)
    flags = library.asarray(x > 0)
    assert_sane(fit(flags, 2, covariance), flags)


@pytest.mark.parametrize("name", ["DataFrame of pandas", "DataFrame of polars", "list"])
def test_data_frames_and_lists(covariance, name):
    x = blobs(n=200, d=2, k=2, seed=7)
    if name == "list":
        data = x.tolist()
    else:
        data = pytest.importorskip(name.split()[-1]).DataFrame({"a": x[:, 0], "b": x[:, 1]})
    found, expected = fit(data, 2, covariance), fit(x, 2, covariance)
    assert_close(found.means_, expected.means_, 1e-12)
    assert type(found.predict(data)) is np.ndarray
    if name != "list":
        assert found.feature_names_in_.tolist() == ["a", "b"]


def test_tensors_that_require_a_gradient_are_detached(covariance):
    torch = pytest.importorskip("torch")
    x = torch.as_tensor(blobs(n=100, k=2)).requires_grad_()
    mixture = fit(x, 2, covariance)
    for out in (mixture.means_, mixture.predict_proba(x), mixture.score_samples(x)):
        assert not out.requires_grad


SINGULAR = {
    "full": np.repeat([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], 5, axis=0),
    "tied": np.repeat([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], 5, axis=0),
    "diag": np.repeat([[0.0, 0.0], [0.0, 1.0]], 5, axis=0),
    "tied_diag": np.repeat([[0.0, 0.0], [0.0, 1.0]], 5, axis=0),
    "spherical": np.zeros((10, 2)),
}


def test_a_singular_covariance_names_component_count_and_remedy(library, covariance):
    x = SINGULAR[covariance.name]
    with pytest.raises(np.linalg.LinAlgError, match=r"not positive definite.*increase the regularisation") as caught:
        fit(library.asarray(x), 1, covariance, covariance_regularization=0.0)
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.count == len(x)
    assert error.component == (None if covariance.shares_moments else 0)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert isinstance(again, SingularCovarianceError)
        assert str(again) == str(error)
    if "torch" in INSTALLED:
        import torch

        with pytest.raises(torch.linalg.LinAlgError):
            fit(library.asarray(x), 1, covariance, covariance_regularization=0.0)


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
def test_the_singular_component_is_the_one_that_is_named(library, covariance_type):
    good = np.random.RandomState(0).normal(size=(20, 2))
    x = np.concatenate([good, np.full((7, 2), 50.0)])
    with pytest.raises(np.linalg.LinAlgError, match=r"covariance of component 1 .*7 rows"):
        GaussianMixture(
            2, covariance_type=covariance_type, init_means=[[0.0, 0.0], [50.0, 50.0]], covariance_regularization=0.0
        ).fit(library.asarray(x))


@pytest.mark.parametrize("estimator", [GaussianMixture(2), SklearnMixture(2), KMeans(2)])
@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "contains NaN.*row 5"), (np.inf, "infinity.*row 5"), (-np.inf, "infinity.*row 5")]
)
def test_data_that_is_not_finite(library, dtype, estimator, value, message):
    x = blobs(n=20, d=2).astype(dtype)
    good = library.asarray(x)
    x[5, 1] = value
    bad = library.asarray(x)
    with pytest.raises(ValueError, match=message):
        estimator.fit(bad)
    fitted = copy.deepcopy(estimator).set_params(random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted.fit(good)
    for method in ("predict", "score_samples"):
        with pytest.raises(ValueError, match=message):
            getattr(fitted, method)(bad)


def test_values_too_large_to_square(library, covariance, dtype):
    x = blobs(n=20, d=2).astype(dtype)
    x[3] = 1e160 if dtype == "float64" else 1e19
    with pytest.raises(ValueError, match=r"too large to square.*row 3.*rescale"):
        fit(library.asarray(x), 2, covariance)
