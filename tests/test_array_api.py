"""The array API implementation against the textbook, and the properties that EM has."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import oracle
from cases import LOG_PROB_TOLERANCE, PARAMETER_TOLERANCE, assert_close
from conftest import INSTALLED, Library
from gaussmix import GaussianMixture
from gaussmix._arrays import array_namespace, to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._guard import CENTRED
from gaussmix._objective import MaximumLikelihood, density_of
from gaussmix._parameters import Parameters, SufficientStatistics
from gaussmix.backends import _array_api
from gaussmix.backends._dispatch import engine
from gaussmix.rows._data import Rows
from strategies import cases

libraries = st.sampled_from(INSTALLED).map(Library)


def prepared(case, library):
    """Rows, weights and parameters in the working dtype of the library."""
    x = library.asarray(case.x)
    rows = Rows(x, None if case.sample_weight is None else library.asarray(case.sample_weight))
    covariance = COVARIANCES[case.covariance_type]
    covariances = np.asarray(case.covariances, dtype=np.float64)
    parameters = Parameters(case.weights, case.means, covariances, covariance.precision_cholesky(covariances))
    on_rows = engine(rows, covariance).rows
    return rows, parameters.moved(on_rows.array, on_rows.dtype), covariance


@given(cases(), libraries)
def test_inference_equals_the_textbook(case, library):
    k, d = case.means.shape
    sigmas = oracle.matrices(case.covariances, case.covariance_type, k, d)
    joint, evidence = oracle.evidence(case.x, case.weights, case.means, sigmas)
    tolerance = LOG_PROB_TOLERANCE[case.dtype]
    weights = np.asarray(case.weights, dtype=np.float64)
    mixture = GaussianMixture.from_parameters(
        library.asarray(weights / weights.sum()),
        library.asarray(case.means),
        library.asarray(case.covariances),
        covariance_type=case.covariance_type,
    )
    x = library.asarray(case.x)
    nll, proba, labels = mixture.score_samples(x), mixture.predict_proba(x), mixture.predict(x)
    for out in (nll, proba, labels, mixture.means_, mixture.covariances_, mixture.weights_):
        assert library.owns(out)
    assert str(nll.dtype).endswith(case.dtype)
    assert str(proba.dtype).endswith(case.dtype)
    assert str(labels.dtype).endswith("int64")

    # Absolute in nats, but no more digits than the output's dtype has.
    output_eps = 2 * np.finfo(case.dtype).eps
    assert_close(to_numpy(nll), -evidence, max(tolerance / max(1, np.abs(evidence).max()), output_eps), "nll")
    expected = np.exp(joint - evidence[:, None])
    assert_close(to_numpy(proba), expected, tolerance, "responsibilities")
    assert_close(to_numpy(proba).sum(axis=1), np.ones(len(case.x)), 1e-6 if case.dtype == "float32" else 1e-12)
    chosen = to_numpy(labels)
    assert np.all(expected[np.arange(len(chosen)), chosen] >= expected.max(axis=1) - 2 * tolerance)


@pytest.mark.parametrize("far", [1e3, 1e6, 1e8, 1e10])
@pytest.mark.parametrize("library", INSTALLED)
def test_responsibilities_of_rows_far_from_all_components_add_to_one(covariance, library, far):
    # Beside the large log-densities there, log 2, the logarithm of how many components are as likely, is lost.
    library, near = Library(library), np.random.RandomState(0).normal(size=(40, 3))
    x = np.concatenate([near, far * np.ones((7, 3))])
    unit = np.broadcast_to(np.eye(3) if covariance.has_matrices else 1.0, covariance.shape(2, 3)).copy()
    parameters = Parameters(np.full(2, 0.5), np.zeros((2, 3)), unit, unit)
    rows = Rows(library.asarray(x))
    on_rows = engine(rows, covariance)
    density = density_of(parameters.moved(on_rows.rows.array, on_rows.rows.dtype), covariance)
    assert_close(to_numpy(on_rows.responsibilities(density)).sum(axis=1), np.ones(len(x)), 1e-12)
    block, density = _array_api.Block(rows), density_of(parameters.moved(rows.array, rows.dtype), covariance)
    counts = to_numpy(block.expect(density, CENTRED).counts)
    assert abs(counts.sum() - len(x)) <= 1e-12 * len(x)


@given(cases(), libraries)
def test_log_prob_equals_the_textbook(case, library):
    rows, parameters, covariance = prepared(case, library)
    sigmas = oracle.matrices(case.covariances, case.covariance_type, *case.means.shape)
    expected = oracle.log_prob(case.x, case.means, sigmas)
    (x, _), *_ = rows.blocks(len(case.x))
    density = density_of(parameters.moved(x, x.dtype), covariance)
    with np.errstate(divide="ignore"):
        expected = expected + np.log(case.weights)
    found = to_numpy(_array_api.weighted_log_prob(x, density)).T
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= LOG_PROB_TOLERANCE[case.dtype]


@given(cases(min_extra=4), libraries)
def test_statistics_and_one_step_equal_the_textbook(case, library):
    rows, parameters, covariance = prepared(case, library)
    k, d = case.means.shape
    sigmas = oracle.matrices(case.covariances, case.covariance_type, k, d)
    r = oracle.responsibilities(case.x, case.weights, case.means, sigmas)
    counts, means, scatters = oracle.statistics(case.x, r, case.sample_weight)
    tolerance = PARAMETER_TOLERANCE[case.dtype]
    assume(counts.min() > 1e-6)  # responsibilities of exp(-80) and less are zero where the data is float32

    statistics = expected_sums(rows, parameters, covariance)
    assert_close(to_numpy(statistics.counts), counts, tolerance, "counts")
    evidence = oracle.evidence(case.x, case.weights, case.means, sigmas)[1]
    assert_close(
        statistics.lower_bound(),
        np.average(evidence, weights=case.sample_weight),
        LOG_PROB_TOLERANCE[case.dtype],
        "bound",
    )
    reg = 1e-3
    found = MaximumLikelihood(covariance, reg).maximize(statistics, parameters.means)
    expected = oracle.maximize(counts, means, scatters, case.covariance_type, reg)
    for name, value in zip(("weights", "means", "covariances"), expected, strict=True):
        assert_close(to_numpy(getattr(found, name)), value, tolerance, name)


def expected_sums(rows, parameters, covariance):
    on_rows = engine(rows, covariance)
    return on_rows.expect(density_of(parameters, covariance), on_rows.forms[0])


def about(origin, statistics, covariance):
    """The same statistics about another origin: an implementation chooses its own."""
    counts = statistics.counts
    xp = array_namespace(counts)
    shifts = statistics.first_moments / xp.where(counts > 0, counts, 1)[:, None]
    means = statistics.origin + shifts
    within = covariance.recentre(statistics.second_moments, counts, shifts)
    return SufficientStatistics(
        origin,
        counts,
        counts[:, None] * (means - origin),
        covariance.recentre(within, -counts, means - origin),
        statistics.log_likelihood,
    )


@given(cases(), libraries, st.data())
def test_statistics_of_any_split_add_to_the_whole(case, library, data):
    rows, parameters, covariance = prepared(case, library)
    n = len(case.x)
    cut = data.draw(st.integers(1, n - 1))
    parts = [
        Rows(rows.array[a:b, :], None if rows.sample_weight is None else rows.sample_weight[a:b])
        for a, b in ((0, cut), (cut, n))
    ]
    whole, first, second = (
        about(parameters.means, expected_sums(part, parameters, covariance), covariance) for part in (rows, *parts)
    )
    total = first + second
    # Each part is expanded about a middle of its own: float32 rounds them differently.
    tolerance = 1e-11 if case.dtype == "float64" else PARAMETER_TOLERANCE["float32"]
    for name in ("counts", "first_moments", "second_moments", "log_likelihood"):
        found, expected = to_numpy(getattr(total, name)), to_numpy(getattr(whole, name))
        assert_close(found, expected, tolerance, name)


def test_statistics_about_different_origins_do_not_add():
    zeros = np.zeros(1)
    one = SufficientStatistics(np.zeros((1, 1)), zeros, zeros[:, None], zeros, np.asarray(0.0))
    other = SufficientStatistics(np.ones((1, 1)), zeros, zeros[:, None], zeros, np.asarray(0.0))
    with pytest.raises(ValueError, match="different origins"):
        one + other


def test_a_device_without_float64_computes_in_float32(covariance):
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("no_float64")
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.normal(size=(60, 2)), 8 + rng.normal(size=(40, 2))]).astype(np.float32)
    on_device = strict.asarray(x, device=device)
    mixture = GaussianMixture(2, covariance_type=covariance.name, random_state=0).fit(on_device)
    exact = GaussianMixture(2, covariance_type=covariance.name, random_state=0).fit(x)
    assert mixture.precision_ == "centred-float32"
    assert mixture.means_.device == device
    assert mixture.predict_proba(on_device).device == device
    assert_close(to_numpy(mixture.means_), exact.means_, 1e-4, "means")
    assert np.array_equal(to_numpy(mixture.predict(on_device)), exact.predict(x))
