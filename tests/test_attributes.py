"""Fitted attributes that are set by hand, and those that are missing."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture as Reference

import oracle
from cases import PARAMETER_TOLERANCE, assert_close, blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix._arrays import to_numpy
from gaussmix.sklearn import GaussianMixture as SklearnMixture

X = blobs(n=60, d=3, k=2, seed=4)
MEANS = X[:2]
ROOT = np.array([[0.9, 0.2, -0.1], [0.0, 1.2, 0.3], [0.0, 0.0, 0.7]])
FACTORS = {
    "full": np.stack([ROOT, 2 * ROOT]),
    "tied": ROOT,
    "diag": np.array([[0.9, 1.2, 0.7], [1.1, 0.8, 2.0]]),
    "tied_diag": np.array([0.9, 1.2, 0.7]),
    "spherical": np.array([0.9, 1.2]),
}


def expected_covariances(covariance_type):
    """The inverse of U U^T, in the form of the type."""
    factor = FACTORS[covariance_type]
    if factor.shape[-2:] != (3, 3):
        return 1 / factor**2
    return np.linalg.inv(factor @ np.swapaxes(factor, -1, -2))


def by_hand(cls, covariance_type, convert=np.asarray):
    """A mixture with the attributes that scikit-learn predicts from, and no others."""
    name = "num_components" if cls is GaussianMixture else "n_components"
    mixture = cls(**{name: 2}, covariance_type=covariance_type, random_state=0)
    mixture.weights_, mixture.means_ = convert(np.array([0.25, 0.75])), convert(MEANS)
    mixture.precisions_cholesky_ = convert(FACTORS[covariance_type])
    return mixture


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
def test_predictions_of_attributes_set_by_hand(cls, library, covariance, dtype, implementation):
    mixture = by_hand(cls, covariance.name, lambda value: library.asarray(value, dtype))
    sigmas = oracle.matrices(expected_covariances(covariance.name), covariance.name, 2, 3)
    joint, evidence = oracle.evidence(X, [0.25, 0.75], MEANS, sigmas)
    x, tolerance = library.asarray(X, dtype), 1e-9 if dtype == "float64" else 1e-4
    sign = -1 if cls is GaussianMixture else 1
    assert_close(to_numpy(mixture.score_samples(x)), sign * evidence, tolerance)
    assert mixture.score(x) == pytest.approx(sign * evidence.mean(), rel=tolerance)
    assert np.array_equal(to_numpy(mixture.predict(x)), joint.argmax(axis=1))
    assert_close(to_numpy(mixture.predict_proba(x)), oracle.responsibilities(X, [0.25, 0.75], MEANS, sigmas), tolerance)
    assert_close(to_numpy(mixture.covariances_), expected_covariances(covariance.name), tolerance)
    assert library.owns(mixture.covariances_)
    assert mixture.covariances_.dtype == mixture.means_.dtype


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
def test_samples_of_attributes_set_by_hand(cls, library, covariance):
    mixture = by_hand(cls, covariance.name, library.asarray)
    whole = cls.from_parameters(
        [0.25, 0.75], MEANS, expected_covariances(covariance.name), covariance_type=covariance.name
    ).set_params(random_state=0)
    drawn, expected = mixture.sample(7), whole.sample(7)
    if cls is SklearnMixture:
        (drawn, labels), (expected, expected_labels) = drawn, expected
        assert np.array_equal(to_numpy(labels), expected_labels)
    assert_close(to_numpy(drawn), expected, 1e-9)
    stored = np.broadcast_to(
        expected_covariances(covariance.name), covariance.for_sklearn(FACTORS[covariance.name], 2).shape
    )
    assert_close(mixture.to_sklearn().covariances_, stored, 1e-9)


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
def test_going_on_from_attributes_set_by_hand(cls, covariance, tmp_path):
    mixture = by_hand(cls, covariance.name)
    scores = mixture.score_samples(X)
    mixture.save(tmp_path)
    assert_close(cls.load(tmp_path).score_samples(X), scores, 1e-12)
    assert_close(cls.from_sklearn(by_hand(Reference, covariance.name)).score_samples(X), scores, 1e-12)
    whole = cls.from_parameters(
        [0.25, 0.75], MEANS, expected_covariances(covariance.name), covariance_type=covariance.name
    )
    assert_close(mixture.partial_fit(X).means_, whole.partial_fit(X).means_, PARAMETER_TOLERANCE["float64"])
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3"):
        by_hand(cls, covariance.name).predict(X[:, :2])


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
@pytest.mark.parametrize("name", ["weights_", "precisions_cholesky_"])
def test_a_missing_attribute_is_named(cls, name):
    mixture = by_hand(cls, "full")
    delattr(mixture, name)
    calls = [lambda: mixture.predict(X), lambda: mixture.partial_fit(X), lambda: mixture.sample(3)]
    if cls is GaussianMixture:
        calls.append(lambda: mixture.model_)
    for call in calls:
        with pytest.raises(NotFittedError, match=f"GaussianMixture has no {name} before it is fitted"):
            call()


def test_an_error_within_a_property_is_shown():
    class Broken(KMeans):
        @property
        def radius_(self):
            return self.centroid_.max()

    with pytest.raises(NotFittedError, match="Broken has no radius_ before it is fitted"):
        Broken().radius_  # noqa: B018 (it raises)
    with pytest.raises(AttributeError, match="'Broken' object has no attribute 'centroid_'"):
        clone(Broken()).fit(X).radius_  # noqa: B018 (it raises)
