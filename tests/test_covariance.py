"""One contract that every covariance type fulfils, in every library, against matrices."""

import numpy as np
import pytest

import oracle
from cases import assert_close
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES


def example(covariance, k, d, seed=0):
    """Positive definite covariances in the stored form."""
    rng = np.random.RandomState(seed)
    shape = covariance.shape(k, d)
    if covariance.has_matrices:
        factor = rng.normal(size=shape) + 2 * np.eye(d)
        return factor @ np.swapaxes(factor, -1, -2)
    return rng.uniform(0.5, 3, size=shape)


@pytest.mark.parametrize(("k", "d"), [(1, 1), (3, 1), (1, 4), (2, 2), (3, 5)])
def test_the_contract(covariance, library, k, d):
    covariances = example(covariance, k, d)
    sigmas = oracle.matrices(covariances, covariance.name, k, d)
    stored = library.asarray(covariances)
    covariance.validate(stored, k, d, "covariances")

    factor = covariance.precision_cholesky(stored)
    assert factor.shape == stored.shape
    precisions = oracle.matrices(to_numpy(covariance.square(factor)), covariance.name, k, d)
    assert_close(precisions, np.linalg.inv(sigmas), 1e-12, "precisions")
    assert_close(to_numpy(covariance.covariances(factor)), covariances, 1e-12, "covariances")
    log_det = np.broadcast_to(to_numpy(covariance.log_det(factor, d)), k)
    assert_close(log_det, -0.5 * np.linalg.slogdet(sigmas)[1], 1e-12, "log_det")

    rng = np.random.RandomState(1)
    centred = rng.normal(size=(k, 6, d))
    expected = np.einsum("knd,kde,kne->kn", centred, np.linalg.inv(sigmas), centred)
    assert_close(to_numpy(covariance.mahalanobis(library.asarray(centred), factor)), expected, 1e-12, "mahalanobis")

    noise = rng.normal(size=(4, d))
    for component in range(k):
        coloured = to_numpy(covariance.colorize(library.asarray(noise), factor, component))
        whitened = np.einsum("nd,de,ne->n", coloured, np.linalg.inv(sigmas[component]), coloured)
        assert_close(whitened, (noise**2).sum(axis=1), 1e-11, "colorize")

    regular = oracle.matrices(to_numpy(covariance.regularize(stored, 0.5)), covariance.name, k, d)
    assert_close(regular, sigmas + 0.5 * np.eye(d), 1e-14, "regularize")


@pytest.mark.parametrize(("k", "d"), [(1, 1), (2, 3), (3, 3)])
def test_moments_about_any_origin_estimate_the_same(covariance, library, k, d):
    rng = np.random.RandomState(2)
    x, r = rng.normal(size=(20, d)), rng.dirichlet(np.ones(k), size=20)
    counts, means, scatters = oracle.statistics(x, r)
    expected = oracle.maximize(counts, means, scatters, covariance.name, 0.0)[2]
    for origin in (means, means + rng.normal(size=(k, d))):
        centred = x[None] - origin[:, None]
        weighted = r.T[:, :, None] * centred
        moments = covariance.second_moments(library.asarray(weighted), library.asarray(centred))
        shifts, counts_ = library.asarray(means - origin), library.asarray(counts)
        found = covariance.estimate(covariance.recentre(moments, counts_, shifts), counts_, d)
        assert_close(to_numpy(found), expected, 1e-12)


@pytest.mark.parametrize(
    ("name", "k", "d", "expected"),
    [("full", 3, 4, 30), ("tied", 3, 4, 10), ("diag", 3, 4, 12), ("spherical", 3, 4, 3), ("full", 1, 1, 1)],
)
def test_free_parameters(name, k, d, expected):
    assert COVARIANCES[name].n_parameters(k, d) == expected


def test_what_is_not_positive_definite_has_no_factor(covariance, library):
    covariances = example(covariance, 3, 2)
    bad = -covariances if covariance.shares_moments else np.concatenate([covariances[:2], -covariances[2:]])
    factor = covariance.precision_cholesky(library.asarray(bad))
    assert covariance.first_singular(factor) == (None if covariance.shares_moments else 2)
    assert not np.all(np.isfinite(to_numpy(factor)))
    if not covariance.shares_moments:
        assert np.all(np.isfinite(to_numpy(factor)[:2]))


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_what_lies_below_the_diagonal_of_a_factor_is_nothing(covariance, library, unit):
    # A factor that another library inverted has rounding there, in units of the precisions.
    covariances = unit**2 * example(covariance, 3, 5)
    factor = to_numpy(covariance.precision_cholesky(library.asarray(covariances)))
    if covariance.has_matrices:
        factor = factor + 1e-16 * np.abs(factor).max() * np.tril(np.ones((5, 5)), -1)
    assert covariance.is_factor(library.asarray(factor))
    assert_close(to_numpy(covariance.covariances(library.asarray(factor))) / unit**2, covariances / unit**2, 1e-12)
