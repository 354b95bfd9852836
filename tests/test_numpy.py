"""The fused CPU path: its forms against each other and against exact arithmetic, its guard, its determinism."""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

import oracle
from cases import PARAMETER_TOLERANCE, OnRows, assert_close, blobs, start_for
from conftest import INSTALLED, Library
from gaussmix import GaussianMixture as PyCaveMixture
from gaussmix import _guard, _threads
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._guard import CENTRED
from gaussmix._objective import density_of
from gaussmix._parameters import Parameters
from gaussmix.backends import _array_api, _numpy, _pruning
from gaussmix.backends._dispatch import choose
from gaussmix.rows._data import Rows
from gaussmix.sklearn import GaussianMixture
from strategies import cases

pytestmark = pytest.mark.usefixtures("unconverged")


@pytest.fixture(autouse=True)
def _without_forced_backend(monkeypatch):
    monkeypatch.delenv("GAUSSMIX_BACKEND", raising=False)


def parameters_for(x, k, covariance, seed=0):
    """Weights, means and covariances of different components, in float64."""
    rng = np.random.RandomState(seed)
    d = x.shape[1]
    shape = covariance.shape(k, d)
    if covariance.has_matrices:
        factor = np.eye(d) + 0.3 * rng.normal(size=shape)
        covariances = factor @ np.swapaxes(factor, -1, -2)
    else:
        covariances = rng.uniform(0.5, 2, size=shape)
    weights = rng.dirichlet(np.ones(k))
    means = np.asarray(x, dtype=np.float64)[rng.choice(len(x), k, replace=False)]
    return Parameters(weights, means, covariances, covariance.precision_cholesky(covariances))


FORMS = {form.precision: form for form in _numpy.forms_for(np.dtype(np.float32))}


def with_form(rows, covariance, precision):
    return OnRows(_numpy, rows, covariance, 1e-3, FORMS[precision])


@pytest.mark.usefixtures("e_step")
@given(cases(min_extra=4), st.sampled_from(sorted(FORMS)))
def test_every_form_takes_the_step_of_the_textbook(case, precision):
    covariance = COVARIANCES[case.covariance_type]
    covariances = np.asarray(case.covariances, dtype=np.float64)
    parameters = Parameters(
        *(np.asarray(a, dtype=np.float64) for a in (case.weights, case.means)),
        covariances,
        covariance.precision_cholesky(covariances),
    )
    engine = with_form(Rows(case.x, case.sample_weight), covariance, precision)
    statistics = engine.expect(parameters)
    assume(statistics.counts.min() > 1e-6)  # what is floored is no longer what the textbook has
    found = engine.objective.maximize(statistics, parameters.means)
    for valid in (parameters, found):
        offsets = valid.means - engine.block.shift
        kappa = covariance.kappa(valid.covariances, valid.precision_cholesky, offsets).max()
        exact = engine.form.features == "centred"
        assume(exact or np.finfo(engine.form.dtype).eps * kappa <= _guard.TOLERANCE[np.dtype(case.dtype)])
    expected = oracle.em_step(
        case.x, case.weights, case.means, case.covariances, case.covariance_type, 1e-3, case.sample_weight
    )
    tolerance = PARAMETER_TOLERANCE["float32" if precision == "expanded-float32" else "float64"]
    for name, value in zip(("weights", "means", "covariances"), expected, strict=True):
        assert_close(getattr(found, name), value, tolerance, name)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 127, 1), (300, 128, 3), (901, 135, 2), (700, 257, 2)])
def test_many_features_are_computed_with_triangles(covariance, dtype, n, d, k, weighted):
    x = (3 * np.random.RandomState(n).normal(size=(n + k, d))).astype(dtype)
    weight = np.random.RandomState(0).randint(3, size=n + k) + 0.0 if weighted else None
    parameters = parameters_for(x, k, covariance)
    fast, exact = (OnRows(module, Rows(x, weight), covariance) for module in (_numpy, _array_api))
    if covariance.name == "full" and (d > 255 or (d > 127 and dtype == "float64")):
        assert fast.form == _guard.CENTRED
    fast.form = _guard.CENTRED
    assert_close(fast.log_evidence(parameters), exact.log_evidence(parameters), 1e-5 if dtype == "float32" else 1e-11)
    found, expected = (engine.expect(parameters) for engine in (fast, exact))
    for name in ("counts", "first_moments", "second_moments", "log_likelihood"):
        assert_close(getattr(found, name), getattr(expected, name), 1e-11, name)
    for name in ("weights", "means", "covariances"):
        steps = (fast.objective.maximize(statistics, parameters.means) for statistics in (found, expected))
        assert_close(*(getattr(step, name) for step in steps), 1e-10, name)


def test_many_features_are_fitted_in_memory_for_few_matrices():
    d, k = 600, 3
    x = np.random.RandomState(0).normal(size=(3000, d))
    matrices = k * d * d * 8
    tracemalloc.start()
    GaussianMixture(k, max_iter=3, tol=0, reg_covar=0.1, init_params="random_from_data", random_state=0).fit(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Covariances and factors before and after an M-step, the statistics, and what one factorisation takes.
    assert peak < 7 * matrices


@pytest.mark.parametrize("method", ["predict", "predict_proba", "score_samples"])
def test_predictions_in_the_centred_form_make_no_features(method):
    x = np.random.RandomState(0).normal(size=(1000, 600))
    mixture = GaussianMixture(2, reg_covar=1.0, means_init=x[:2], max_iter=1).fit(x)
    assert mixture.precision_ == "centred-float64"
    tracemalloc.start()
    getattr(mixture, method)(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * x.nbytes


def test_probabilities_of_few_rows_lie_in_memory_as_those_of_many(covariance):
    x = np.random.RandomState(0).normal(size=(5000, 2))
    mixture = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(x)
    assert mixture.predict_proba(x[:3]).flags.c_contiguous
    assert mixture.predict_proba(x).flags.c_contiguous


@pytest.mark.usefixtures("e_step")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("n", "d", "k"), [(1, 1, 1), (7, 1, 3), (255, 5, 2), (257, 3, 17), (5000, 2, 5), (9001, 17, 3)]
)
def test_inference_and_statistics_equal_the_array_api(covariance, dtype, n, d, k, weighted):
    x = (3 * np.random.RandomState(n).normal(size=(n + k, d))).astype(dtype)
    weight = np.random.RandomState(0).uniform(0, 2, size=n + k) if weighted else None
    parameters = parameters_for(x, k, covariance)
    rows = Rows(x, weight)
    fast, exact = (OnRows(module, rows, covariance) for module in (_numpy, _array_api))
    assert fast.form.precision.startswith("expanded")
    tolerance = 1e-3 if dtype == "float32" else 1e-10
    assert np.abs(fast.log_evidence(parameters) - exact.log_evidence(parameters)).max() < tolerance
    proba = fast.responsibilities(parameters)
    assert np.abs(proba - exact.responsibilities(parameters)).max() < tolerance
    assert np.array_equal(fast.labels(parameters), proba.argmax(axis=1))
    found, expected = (engine.step(parameters) for engine in (fast, exact))
    for name in ("weights", "means", "covariances"):
        assert_close(getattr(found, name), getattr(expected, name), PARAMETER_TOLERANCE[dtype], name)


def test_tensors_are_read_without_a_copy(covariance, dtype):
    torch = pytest.importorskip("torch")
    x = torch.as_tensor(blobs(n=500, d=3, k=2).astype(dtype))
    assert np.shares_memory(_numpy.Block(Rows(x)).rows.array, x.numpy())
    mixture = PyCaveMixture(2, covariance_type=covariance.name, random_state=0).fit(x)
    assert mixture.backend_ == "numpy"
    assert isinstance(mixture.means_, torch.Tensor)


# (data and mixture, the form that float32 and float64 data end in)
def two_far_clusters(d=3, distance=1e4):
    rng = np.random.RandomState(0)
    return np.concatenate([rng.normal(size=(400, d)), distance + rng.normal(size=(400, d))])


@pytest.mark.usefixtures("e_step")
@pytest.mark.parametrize("library", [Library(name) for name in INSTALLED if name != "array_api_strict"], ids=str)
def test_clusters_far_apart_from_a_broad_start_switch_the_form(library, covariance, dtype, caplog):
    x = two_far_clusters().astype(dtype)
    exact = x.astype(np.float64).reshape(2, 400, 3)
    variances = exact.var(axis=1)
    wide = float(x.astype(np.float64).var())
    shape = covariance.shape(2, 3)
    precisions = np.broadcast_to(np.eye(3) / wide if covariance.has_matrices else 1 / wide, shape)
    mixture = GaussianMixture(
        2,
        covariance_type=covariance.name,
        tol=0,
        max_iter=10,
        weights_init=[0.5, 0.5],
        means_init=[[0.0] * 3, [1e4] * 3],
        precisions_init=precisions.copy(),
    )
    with caplog.at_level(logging.INFO, logger="gaussmix"):
        mixture.fit(library.asarray(x))
    # For float32 data 1e-3 nats are owed, for float64 data 1e-10.
    expected_form = "expanded-float64" if dtype == "float32" else "centred-float64"
    assert mixture.precision_ == expected_form
    assert f"left for {expected_form}: " in caplog.text
    found = np.asarray(to_numpy(mixture.covariances_), dtype=np.float64)
    expected = {
        "full": np.stack([np.cov(cluster.T, bias=True) for cluster in exact]),
        "tied": np.mean([np.cov(cluster.T, bias=True) for cluster in exact], axis=0),
        "diag": variances,
        "tied_diag": variances.mean(axis=0),
        "spherical": variances.mean(axis=1),
    }[covariance.name]
    assert_close(found, expected, 1e-3, "covariances")


@pytest.mark.usefixtures("e_step")
def test_moderate_distances_fall_back_to_float64_and_no_further(covariance):
    mixture = PyCaveMixture(2, covariance_type=covariance.name, random_state=0)
    mixture.fit(two_far_clusters(distance=300.0).astype(np.float32))
    assert mixture.precision_ == "expanded-float64"
    assert (
        PyCaveMixture(2, covariance_type=covariance.name, random_state=0)
        .fit(two_far_clusters(distance=6.0).astype(np.float32))
        .precision_
        == "expanded-float32"
    )


def test_kappa_predicts_the_error_of_the_expanded_form(covariance, monkeypatch):
    """The bound, not its sharpness: the error stays below ten times eps kappa."""
    for distance in (0, 10, 1e3, 1e5):
        x = two_far_clusters(d=4, distance=distance)
        parameters = parameters_for(x, 3, covariance, seed=1)
        engine = with_form(Rows(x), covariance, "expanded-float64")
        monkeypatch.setattr(_guard, "choose", lambda *told: ((FORMS["expanded-float64"],), ""))
        shift = parameters.weights @ parameters.means
        kappa = covariance.kappa(parameters.covariances, parameters.precision_cholesky, parameters.means - shift).max()
        exact = OnRows(_array_api, Rows(x), covariance).log_evidence(parameters)
        near = np.abs(exact) < 100  # the bound is for rows that a component holds
        error = np.abs(engine.log_evidence(parameters) - exact)[near].max()
        assert error <= 10 * np.finfo(np.float64).eps * (kappa + 100)


@pytest.mark.parametrize("is_empty", [False, True])
@pytest.mark.parametrize("distance", [3.0, 300.0, 1e6])
def test_the_guard_decides_alike_wherever_the_density_is(library, covariance, distance, is_empty):
    x = two_far_clusters(distance=distance)
    weights, *rest = vars(parameters_for(x, 3, covariance)).values()
    if is_empty:  # as far as it may be, it says nothing
        weights, rest[0] = np.asarray([0.4, 0.6, 0.0]), np.concatenate([rest[0][:2], [[1e9] * 3]])
    density = density_of(Parameters(weights, *rest), covariance)
    forms, shift, floor = _numpy.forms_for(np.dtype(np.float32)), x.mean(axis=0), np.full(3, 0.01)
    for lost in (None, (weights, weights)):
        expected = _guard.choose(forms, density, shift, floor, lost)[0]
        there = density.mapped(library.asarray)
        found, reason = _guard.choose(forms, there, shift, library.asarray(floor), lost)
        assert found == expected
        assert bool(reason) == (len(found) < len(forms))
    assert (found == forms) == (distance == 3)


@pytest.mark.usefixtures("e_step")
@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("distance", [20, 60, 100, 140, 200, 1000])
def test_float32_parameters_are_those_of_float64_up_to_the_guard_and_beyond(covariance, d, distance):
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.normal(size=(20_000, d)), distance + rng.normal(size=(20_000, d))]).astype(np.float32)
    start = start_for(x, 2, covariance.name) | {"means_init": np.outer([0.0, distance], np.ones(d))}
    settings = dict(covariance_type=covariance.name, tol=0, max_iter=5, **start)
    found, exact = (GaussianMixture(2, **settings).fit(data) for data in (x, x.astype(np.float64)))
    for name in ("weights_", "means_", "covariances_"):
        assert_close(getattr(found, name), getattr(exact, name), PARAMETER_TOLERANCE["float32"], name)


@pytest.mark.usefixtures("e_step")
@pytest.mark.parametrize("scale", [1e16, 1e17])
def test_values_too_large_to_square_in_float32(covariance, scale):
    x = np.random.RandomState(0).normal(size=(300, 2)).astype(np.float32)
    mixture = PyCaveMixture(2, covariance_type=covariance.name, random_state=0).fit(x)
    far = x[:5] * np.float32(scale)
    exact = OnRows(_array_api, Rows(far.astype(np.float64)), covariance).log_evidence(
        mixture._parameters.mapped(lambda value: value.astype(np.float64))
    )
    found = mixture.score_samples(np.concatenate([x, far]).astype(np.float64))[-5:]
    assert_close(found / exact, -np.ones(5), 1e-6)
    proba = mixture.predict_proba(np.concatenate([x, far]))
    assert_close(proba.sum(axis=1), np.ones(305), 1e-6)
    assert PyCaveMixture(2, covariance_type=covariance.name, random_state=0).fit(x * np.float32(scale)).converged_


@pytest.mark.usefixtures("e_step")
def test_precisions_far_beyond_those_of_float32(covariance):
    x = (1e-20 * np.random.RandomState(0).normal(size=(300, 2))).astype(np.float32)
    mixture = PyCaveMixture(2, covariance_type=covariance.name, covariance_regularization=0.0, random_state=0).fit(x)
    exact = 1e-20 * PyCaveMixture(2, covariance_type=covariance.name, random_state=0).fit(1e20 * x).means_
    assert np.all(np.isfinite(mixture.predict_proba(x)))
    assert_close(1e20 * mixture.means_, 1e20 * exact, 1e-3)


def separated(covariance, n=3000, d=6, k=20):
    """Rows of clusters far apart, and their mixture."""
    centres = 30 * np.random.RandomState(0).normal(size=(k, d))
    x = np.repeat(centres, n // k, axis=0) + np.random.RandomState(1).normal(size=(n, d))
    return x, dataclasses.replace(parameters_for(x, k, covariance), means=centres)


@pytest.mark.parametrize("weighted", [False, True])
def test_pruning_changes_nothing_but_rounding(dtype, weighted, monkeypatch):
    monkeypatch.setattr(_numpy.Block, "_most_left", lambda *_: np.inf)
    covariance = COVARIANCES["full"]
    x, parameters = separated(covariance)
    x = x.astype(dtype)
    weight = np.random.RandomState(0).uniform(0, 2, size=len(x)) if weighted else None
    density = density_of(parameters, covariance)
    engine = _numpy.Block(Rows(x, weight))
    pruned = engine._pruned(density, CENTRED)
    assert pruned is not None
    exact = OnRows(_array_api, Rows(x, weight), covariance).expect(parameters)
    for name in ("counts", "first_moments", "second_moments", "log_likelihood"):
        assert_close(getattr(pruned, name), getattr(exact, name), 1e-11, name)
    evidence = OnRows(_array_api, Rows(x), covariance).log_evidence(parameters)
    assert np.abs(OnRows(_numpy, Rows(x), covariance).log_evidence(parameters) - evidence).max() < 1e-9
    # Once more from labels that are all wrong.
    engine.hints = (engine.hints + 7) % 20
    again = engine._pruned(density, CENTRED)
    assert_close(again.second_moments, exact.second_moments, 1e-11)


@pytest.mark.parametrize("weighted", [False, True])
def test_pruned_statistics_of_many_blocks(dtype, weighted, monkeypatch):
    """Several slabs, groups and blocks of a component; rows that have one component beside rows that have more."""
    covariance = COVARIANCES["full"]
    for module, name, value in (
        (_pruning, "BLOCK_ROWS", 37),
        (_pruning, "GROUP_ROWS", 501),
        (_numpy, "PRUNING_ROWS", (35, 70)),
        (_numpy, "SLAB_FLOPS", 1),
        (_numpy.Block, "_most_left", lambda *_: np.inf),
    ):
        monkeypatch.setattr(module, name, value)
    x, parameters = separated(covariance)
    # Half of the clusters draw near to each other.
    shifts = np.where(np.arange(20)[:, None] < 10, 0.8 * parameters.means, 0)
    x = np.random.RandomState(2).permutation(x - np.repeat(shifts, 150, axis=0))[:2983]
    parameters = dataclasses.replace(parameters, means=parameters.means - shifts)
    weight = np.random.RandomState(0).randint(0, 3, len(x)).astype(float) if weighted else None
    rows = Rows(x.astype(dtype), weight)
    engine = _numpy.Block(rows)
    pruned, exact = (
        engine._pruned(density_of(parameters, covariance), CENTRED),
        OnRows(_array_api, rows, covariance).expect(parameters),
    )
    r = OnRows(_array_api, Rows(rows.array), covariance).responsibilities(parameters)
    several = np.mean(np.sum(r > 1e-40, axis=1) > 1)
    assert 0.05 < several < 0.95
    for name in ("counts", "first_moments", "second_moments", "log_likelihood"):
        assert_close(getattr(pruned, name), getattr(exact, name), 1e-11, name)
    assert np.array_equal(engine.hints, r.argmax(axis=1))


@pytest.mark.parametrize("spread", [30.0, 3.0])
def test_pruned_predictions_equal_the_array_api(dtype, spread, monkeypatch):
    monkeypatch.setattr(_numpy, "SLAB_FLOPS", 1)
    monkeypatch.setattr(_numpy.Block, "_most_left", lambda *_: np.inf)
    covariance = COVARIANCES["full"]
    x, parameters = separated(covariance)
    # The second component equals the first, and the third has no weight.
    twins = np.r_[0, 0, 2:20]
    parameters = parameters.mapped(lambda value: value[twins])
    weights = np.where(np.arange(20) == 2, 0, parameters.weights)
    parameters = dataclasses.replace(parameters, weights=weights / weights.sum(), means=parameters.means * spread / 30)
    rows = Rows((x * spread / 30).astype(dtype))
    fast, exact = (OnRows(module, rows, covariance) for module in (_numpy, _array_api))
    density = density_of(parameters, covariance)
    assert fast.block._bounds(density, density.middle, CENTRED) is not None
    proba, expected = fast.responsibilities(parameters), exact.responsibilities(parameters)
    assert proba.dtype == dtype
    assert np.abs(proba - expected).max() < (1e-6 if dtype == "float32" else 1e-11)
    assert np.array_equal(fast.labels(parameters), expected.argmax(axis=1))
    assert np.mean(proba == 0) > (0.8 if spread == 30 else 0)


def test_upper_bounds_are_upper_bounds(covariance, dtype):
    x, parameters = separated(covariance)
    x = (1e3 + x).astype(dtype)
    parameters = dataclasses.replace(parameters, means=1e3 + parameters.means)
    shift = x.mean(axis=0).astype(np.float64)
    density = density_of(parameters, covariance)
    upper = _pruning.Bounds.of_density(density, shift).of(x)
    assert np.all(upper >= _array_api.weighted_log_prob(x.astype(np.float64), density))


def test_a_component_that_lives_on_small_responsibilities_is_not_pruned():
    x, parameters = separated(COVARIANCES["full"])
    means = parameters.means.copy()
    means[0] = 1e4
    far = dataclasses.replace(parameters, means=means)
    assert _numpy.Block(Rows(x))._pruned(density_of(far, COVARIANCES["full"]), CENTRED) is None


def test_overlapping_components_are_not_pruned():
    x = np.random.RandomState(0).normal(size=(2000, 6))
    parameters = parameters_for(x, 20, COVARIANCES["full"])
    block, density = _numpy.Block(Rows(x)), density_of(parameters, COVARIANCES["full"])
    assert all(block._pruned(density, form) is None for form in block.forms(density.covariance))


def test_pruning_is_for_steps_that_take_long(dtype):
    """Centred ones, and those with many features: where features are few, a product with all of them takes less."""
    covariance = COVARIANCES["full"]
    is_pruned = {}
    for d in (6, 64):
        x, parameters = separated(covariance, d=d)
        identities = np.stack([np.eye(d)] * 20)
        parameters = dataclasses.replace(parameters, covariances=identities, precision_cholesky=identities)
        block, density = _numpy.Block(Rows(x.astype(dtype))), density_of(parameters, covariance)
        for form in block.forms(covariance):
            is_pruned[d, form.precision] = block._pruned(density, form) is not None
    assert is_pruned == {(d, form): d == 64 or form == CENTRED.precision for d, form in is_pruned}
    assert len(is_pruned) == (6 if dtype == "float32" else 4)


@pytest.mark.usefixtures("e_step")
def test_the_result_does_not_depend_on_the_number_of_threads(covariance, dtype, monkeypatch):
    monkeypatch.setattr(_numpy, "SLAB_FLOPS", 1)
    x = blobs(n=9000, d=4, k=5, seed=3).astype(dtype)
    start = start_for(x, 5, covariance.name)
    fits = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            fits.append(GaussianMixture(5, covariance_type=covariance.name, tol=0, max_iter=6, **start).fit(x))
    assert fits[0].lower_bounds_ == fits[1].lower_bounds_
    assert np.array_equal(fits[0].covariances_, fits[1].covariances_)


@pytest.mark.usefixtures("e_step")
@pytest.mark.parametrize("precision", FORMS)
def test_a_slab_whose_rows_have_no_weight(covariance, precision, monkeypatch):
    monkeypatch.setattr(_numpy, "SLAB_FLOPS", 1)
    x = blobs(n=5000, d=3, k=3, seed=4)
    weight = np.where(np.arange(5000) < 2500, 0.0, 1.0)
    parameters = parameters_for(x, 3, covariance)
    found = with_form(Rows(x, weight), covariance, precision).expect(parameters)
    exact = OnRows(_array_api, Rows(x[2500:]), covariance).expect(parameters)
    tolerance = 1e-5 if precision == "expanded-float32" else 1e-11
    assert_close(found.counts, exact.counts, tolerance)
    assert_close(found.lower_bound(), exact.lower_bound(), tolerance)


def test_the_setting_of_blas_is_restored():
    def threads():
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    before = threads()
    with _threads.one_blas_thread() as outer:
        with _threads.one_blas_thread() as inner:
            assert outer == inner == max(before)
            assert set(threads()) == {1}
        assert set(threads()) == {1}
    assert threads() == before


def test_blas_is_limited_by_one_thread_and_restored_by_another():
    def threads():
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    before = threads()
    entered, joined, left = threading.Event(), threading.Event(), threading.Event()

    def first():
        with _threads.one_blas_thread():
            entered.set()
            assert joined.wait(10)
        left.set()

    def second():
        assert entered.wait(10)
        with _threads.on_one_thread(), _threads.one_blas_thread() as found:
            joined.set()
            assert left.wait(10)
            return found, threads()

    with ThreadPoolExecutor(2) as pool:
        pool.submit(first)
        found, inside = pool.submit(second).result(20)
    assert (found, set(inside)) == (1, {1})
    assert threads() == before


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def in_child(function, seconds=10):
    """The exit status of a forked process: 0 where `function()` is true there; None where it has not ended in time."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            status = 0 if function() else 1
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
# Python 3.12 warns of every fork beside threads.
may_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@forks
@may_fork
def test_a_fork_while_other_threads_fit(monkeypatch):
    monkeypatch.setattr(_numpy, "SLAB_FLOPS", 10**5)
    x = blobs(n=2000, d=3, k=3, seed=4)

    def fitted():
        mixture = GaussianMixture(3, covariance_type="tied", tol=0, max_iter=2, random_state=0).fit(x)
        return mixture.means_, mixture.predict(x)

    def fits_alike():
        found = fitted()
        return blas_threads() == before and all(map(np.array_equal, found, expected))

    before, expected, ended = blas_threads(), fitted(), threading.Event()

    def fit_on():
        while not ended.is_set():
            fitted()

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(fit_on) for _ in range(2)]
        try:
            assert [in_child(fits_alike) for _ in range(25)] == [0] * 25
        finally:
            ended.set()
    assert [other.result() for other in others] == [None, None]
    assert blas_threads() == before


@forks
@may_fork
@pytest.mark.parametrize("is_inside", [False, True])
def test_the_setting_of_blas_in_a_forked_process(is_inside):
    """The thread that forks may be inside as well: in the child it is the last to leave."""
    before = blas_threads()
    entered, left = threading.Event(), threading.Event()

    def other():
        with _threads.one_blas_thread():
            entered.set()
            assert left.wait(20)

    def is_restored():
        return blas_threads() == before and _threads._blas.inside == 0

    def leaves():
        if set(blas_threads()) != {1}:
            return False
        inside.__exit__(None, None, None)
        return is_restored()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other)
        assert entered.wait(10)
        inside = _threads.one_blas_thread()
        if is_inside:
            inside.__enter__()
        try:
            assert in_child(leaves if is_inside else is_restored) == 0
        finally:
            if is_inside:
                inside.__exit__(None, None, None)
            left.set()
        waiting.result(20)
    assert is_restored()


LATE = """
import atexit, concurrent.futures.thread, sys, threading, time, warnings
import numpy as np
from threadpoolctl import threadpool_limits
from gaussmix import GaussianMixture, KMeans
from gaussmix.backends import _numpy
from gaussmix.sklearn import GaussianMixture as SklearnMixture

warnings.simplefilter("ignore")
_numpy.SLAB_FLOPS = 1
file = np.load(sys.argv[2], mmap_mode="r")
x = np.array(file)

def outcome():
    found = []
    for cls in (GaussianMixture, SklearnMixture, KMeans):
        for data in (x, file):
            estimator = cls(3, random_state=0).fit(data)
            found += [estimator.predict(data).tolist(), estimator.score(data)]
    return found

def late():
    assert concurrent.futures.thread._shutdown
    with threadpool_limits(2):
        print(outcome() == expected)

def outlive():
    while not concurrent.futures.thread._shutdown:
        time.sleep(0.01)
    late()

expected = outcome()
if sys.argv[1] == "atexit":
    atexit.register(late)
else:
    threading.Thread(target=outlive).start()
"""


@pytest.mark.parametrize("when", ["atexit", "thread"])
def test_what_runs_while_the_interpreter_shuts_down(when, tmp_path):
    np.save(tmp_path / "x.npy", blobs(n=2000, d=3, k=3, seed=4))
    script = [sys.executable, "-c", LATE, when, str(tmp_path / "x.npy")]
    job = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert (job.returncode, job.stdout, job.stderr) == (0, "True\n", "")


def test_a_system_without_threads_left(monkeypatch):
    monkeypatch.setattr(_numpy, "SLAB_FLOPS", 1)
    x = blobs(n=2000, d=3, k=3, seed=4)
    with threadpool_limits(2, user_api="blas"):
        expected = GaussianMixture(3, random_state=0).fit(x)
        started, begin = [], threading.Thread.start

        def start(thread):
            if len(started) % 2:
                raise RuntimeError("can't start new thread")
            started.append(thread)
            begin(thread)

        monkeypatch.setattr(threading.Thread, "start", start)
        found = GaussianMixture(3, random_state=0).fit(x)
    assert started
    assert found.lower_bounds_ == expected.lower_bounds_


def test_dispatch_says_why(monkeypatch):
    x = np.zeros((3, 1))
    assert choose(x) == ("numpy", "the data is in host memory")
    monkeypatch.setenv("GAUSSMIX_BACKEND", "array_api")
    assert choose(x)[0] == "array_api"
    strict = pytest.importorskip("array_api_strict")
    monkeypatch.setenv("GAUSSMIX_BACKEND", "numpy")
    with pytest.raises(ValueError, match="GAUSSMIX_BACKEND=numpy can not run: .* is no array in host memory"):
        PyCaveMixture(1).fit(strict.asarray([[0.0], [1.0]]))
    monkeypatch.setenv("GAUSSMIX_BACKEND", "auto")
    assert "neither a torch tensor nor a CuPy array" in choose(strict.asarray([[0.0]]))[1]
