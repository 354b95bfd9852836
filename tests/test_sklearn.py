"""The estimator with scikit-learn's signature: its own checks, and behaviour compared with the original."""

import inspect
import pickle

import numpy as np
import pytest
import sklearn
from sklearn.mixture import GaussianMixture as Reference
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks

from cases import PARAMETER_TOLERANCE, assert_close, blobs, start_for
from gaussmix import GaussianMixture as PyCaveMixture
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix.sklearn import GaussianMixture

X = blobs(n=300, d=3, k=3, seed=1)


@parametrize_with_checks([GaussianMixture(covariance_type=name) for name in COVARIANCES])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@parametrize_with_checks([PyCaveMixture()])
def test_scikit_learns_checks_of_the_other_estimator(estimator, check):
    check(estimator)


def test_signature_and_defaults_are_scikit_learns():
    ours, theirs = (inspect.signature(cls).parameters for cls in (GaussianMixture, Reference))
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind


def test_every_fitted_attribute_of_scikit_learn_is_there(covariance):
    theirs, ours = (
        cls(3, covariance_type=covariance.name, random_state=0).fit(X) for cls in (Reference, GaussianMixture)
    )
    for name, value in vars(theirs).items():
        if name.endswith("_"):
            found = getattr(ours, name)
            assert np.shape(found) == np.shape(value) or name == "lower_bounds_", name
            assert isinstance(found, type(value)) or isinstance(value, np.generic), name


def test_known_parameters_predict_as_scikit_learn_does(library, covariance, dtype):
    reference = Reference(3, covariance_type=covariance.name, random_state=0).fit(X)
    mixture = GaussianMixture.from_parameters(
        *(library.asarray(getattr(reference, name), dtype) for name in ("weights_", "means_", "covariances_")),
        covariance_type=covariance.name,
    )
    x = library.asarray(X, dtype)
    tolerance = 1e-9 if dtype == "float64" else 1e-4
    assert_close(to_numpy(mixture.score_samples(x)), reference.score_samples(X), tolerance)
    assert_close(to_numpy(mixture.precisions_), reference.precisions_, tolerance)
    assert np.array_equal(to_numpy(mixture.predict(x)), reference.predict(X))


def test_attributes_set_by_hand_make_a_model(covariance):
    reference = Reference(3, covariance_type=covariance.name, random_state=0).fit(X)
    mixture = GaussianMixture(3, covariance_type=covariance.name)
    for name in ("weights_", "means_", "covariances_", "precisions_cholesky_"):
        setattr(mixture, name, getattr(reference, name))
    assert_close(mixture.score_samples(X), reference.score_samples(X), 1e-9)


def test_n_init_keeps_the_best_start():
    settings = dict(init_params="random_from_data", tol=1e-6, max_iter=500)
    generator = np.random.RandomState(0)
    single = [GaussianMixture(3, **settings, random_state=generator).fit(X) for _ in range(5)]
    best = GaussianMixture(3, **settings, n_init=5, random_state=0).fit(X)
    assert_close(best.lower_bound_, max(mixture.lower_bound_ for mixture in single), 1e-9)
    assert len({mixture.lower_bound_ for mixture in single}) > 1


def test_warm_start_goes_on_where_the_last_fit_ended(covariance, unconverged):
    start = start_for(X, 3, covariance.name)
    settings = dict(covariance_type=covariance.name, tol=0, **start)
    whole = GaussianMixture(3, max_iter=10, **settings).fit(X)
    parts = GaussianMixture(3, max_iter=4, warm_start=True, **settings).fit(X)
    parts.set_params(max_iter=6).fit(X)
    assert_close(parts.means_, whole.means_, 1e-12)
    assert_close(parts.covariances_, whole.covariances_, 1e-12)
    assert parts.n_iter_ == 6
    with pytest.raises(ValueError, match="warm_start goes on from means of shape"):
        parts.set_params(n_components=4, weights_init=None, means_init=None, precisions_init=None).fit(X)


def test_sample_has_labels_and_the_moments_of_the_mixture(library, covariance):
    mixture = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(library.asarray(X))
    rows, labels = mixture.sample(60_000)
    assert library.owns(rows)
    assert library.owns(labels)
    rows, labels = to_numpy(rows), to_numpy(labels)
    assert labels.dtype == np.int64
    assert_close(np.bincount(labels) / len(labels), to_numpy(mixture.weights_), 0.01)
    sigmas = to_numpy(mixture.covariances_)
    for k in range(3):
        expected = {
            "full": lambda k: sigmas[k],
            "tied": lambda k: sigmas,
            "diag": lambda k: np.diag(sigmas[k]),
            "spherical": lambda k: sigmas[k] * np.eye(3),
        }[covariance.name](k)
        group = rows[labels == k]
        assert_close(group.mean(axis=0), to_numpy(mixture.means_)[k], 0.03)
        assert_close(np.cov(group.T), expected, 0.05 * max(1.0, 1 / np.abs(expected).max()))
    again, _ = mixture.sample(60_000)
    assert np.array_equal(to_numpy(again), rows)


def test_sampling_many_components_of_float32_weights():
    k = 1000
    mixture = GaussianMixture.from_parameters(
        np.full(k, 1 / k, dtype=np.float32),
        np.arange(k, dtype=np.float32)[:, None],
        np.ones(k, dtype=np.float32),
        covariance_type="spherical",
    )
    rows, labels = mixture.sample(5000)
    assert rows.dtype == np.float64
    assert np.all(np.diff(labels) >= 0)


def test_pipelines_and_grid_search():
    grid = {"n_components": [1, 2, 3, 4], "covariance_type": ["full", "diag"]}
    ours, theirs = (
        GridSearchCV(cls(init_params="random", max_iter=500, random_state=0), grid, cv=3).fit(X)
        for cls in (GaussianMixture, Reference)
    )
    assert ours.best_params_ == theirs.best_params_
    assert_close(ours.cv_results_["mean_test_score"], theirs.cv_results_["mean_test_score"], 1e-6)
    pipelines = [make_pipeline(StandardScaler(), cls(3, random_state=0)).fit(X) for cls in (GaussianMixture, Reference)]
    for method in ("predict", "predict_proba", "score_samples", "score", "fit_predict"):
        found, expected = (getattr(pipeline, method)(X) for pipeline in pipelines)
        assert_close(found, expected, 1e-9, method)


def test_pickled_mixtures_predict_the_same(library, covariance):
    x = library.asarray(X)
    mixture = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(x)
    copied = pickle.loads(pickle.dumps(mixture))
    expected = Reference(3, covariance_type=covariance.name, random_state=0).fit(X)
    assert library.owns(copied.means_)
    assert_close(to_numpy(copied.score_samples(x)), expected.score_samples(X), 1e-9)


def test_tags_and_the_lack_of_set_output_are_scikit_learns():
    ours, theirs = (get_tags(cls()) for cls in (GaussianMixture, Reference))
    assert ours.array_api_support
    ours.array_api_support = theirs.array_api_support
    assert ours == theirs
    assert not hasattr(GaussianMixture(), "set_output")
    assert not hasattr(Reference(), "set_output")


def test_parameters_are_not_checked_where_scikit_learn_is_told_so():
    settings = dict(random_state=0, verbose=np.float64(0))
    for cls in (GaussianMixture, Reference):
        with pytest.raises(ValueError, match="The 'verbose' parameter of GaussianMixture must be"):
            cls(2, **settings).fit(X)
        with sklearn.config_context(skip_parameter_validation=True):
            assert cls(2, **settings).fit(X).n_iter_ > 0


def device_of(x):
    return getattr(x, "device", "cpu")


@pytest.mark.parametrize("init_params", ["kmeans", "k-means++", "random", "random_from_data"])
def test_array_api_dispatch_keeps_library_and_device(library, covariance, dtype, init_params):
    x = library.asarray(X, dtype)
    if library.name == "array_api_strict":
        import array_api_strict

        x = array_api_strict.asarray(x, device=array_api_strict.Device("device1"))
    settings = dict(covariance_type=covariance.name, init_params=init_params, random_state=0)
    expected = GaussianMixture(3, **settings).fit(X.astype(dtype))
    with sklearn.config_context(array_api_dispatch=True):
        mixture = GaussianMixture(3, **settings).fit(x)
        outputs = [mixture.predict(x), mixture.predict_proba(x), mixture.score_samples(x), *mixture.sample(5)]
        numbers = [mixture.score(x), mixture.aic(x), mixture.bic(x)]
    arrays = [getattr(mixture, name) for name in ("weights_", "means_", "covariances_", "precisions_")]
    for value in (*arrays, mixture.precisions_cholesky_, *outputs):
        assert library.owns(value)
        assert device_of(value) == device_of(x)
    assert all(type(number) is float for number in numbers)
    tolerance = PARAMETER_TOLERANCE[dtype]
    assert_close(to_numpy(mixture.means_), expected.means_, tolerance)
    assert_close(to_numpy(mixture.covariances_), expected.covariances_, tolerance)
    assert np.array_equal(to_numpy(outputs[0]), expected.predict(X.astype(dtype)))
    if init_params == "kmeans":
        reference = Reference(3, **settings).fit(X.astype(dtype).astype(np.float64))
        assert_close(to_numpy(mixture.means_), reference.means_, tolerance)


def test_the_two_estimators_have_opposite_signs(covariance):
    ours = PyCaveMixture(3, covariance_type=covariance.name, random_state=0).fit(X)
    theirs = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(X)
    assert ours.score(X) == -theirs.score(X)
    assert np.array_equal(ours.score_samples(X), -theirs.score_samples(X))
    assert ours.score_samples(X).shape == (300,)
    assert np.array_equal(ours.fit_predict(X), theirs.fit_predict(X))
    assert ours.sample(10).shape == (10, 3)
    assert np.array_equal(ours.model_.means, ours.means_)
    assert np.array_equal(ours.model_.component_probs, ours.weights_)


def test_a_model_fitted_in_one_library_predicts_in_another(library, covariance):
    mixture = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(X)
    proba = mixture.predict_proba(library.asarray(X))
    assert library.owns(proba)
    assert_close(to_numpy(proba), mixture.predict_proba(X), 1e-12)
