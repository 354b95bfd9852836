"""The M-step on the device against `maximize`, its twin; what stops iterations; several iterations."""

import math

import numpy as np
import pytest
import torch

import gaussmix_kernels as kernels
from cases import PARAMETER_TOLERANCE, OnRows, assert_close
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._guard import CENTRED, Form, choose
from gaussmix._objective import MaximumLikelihood, density_of
from gaussmix._parameters import Parameters, SufficientStatistics
from gaussmix.backends import _array_api, _triton
from gaussmix.rows._data import Rows
from gaussmix_kernels import EM
from gaussmix_kernels._parameters import Natural, decide, fill_operands, room_for_operands
from kernels.common import KINDS, density, local, mixture, origin_of, prepare, rows, tensor

# (type, kind, rows, features, components, whether one is empty, whether the tier is the exact one). The M-step is in
# float64 in both tiers; 70 features are more than registers hold.
CASES = [(*kind, 60, 5, 3, False, False) for kind in KINDS]
CASES += [(*kind, 40, 1, 1, False, True) for kind in KINDS]
CASES += [(*kind, 40, 2, 3, True, exact) for kind in KINDS for exact in (False, True)]
CASES += [(*kind, 60, 17, 2, False, False) for kind in KINDS if kind[1] != "products"]
CASES += [("full", "products", 60, 16, 2, False, False), ("full", "centred", 60, 16, 2, False, True)]
CASES += [("full", "centred", 90, 70, 2, True, False), ("tied", "none", 90, 70, 2, True, True)]

every_case = pytest.mark.parametrize(("type_", "kind", "n", "d", "k", "empty", "exact"), CASES)
# What NumPy says in the interpreter of infinity and NaN.
not_finite = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:All-NaN slice")
every_kind = pytest.mark.parametrize(("type_", "kind"), KINDS)


def m_step(em, statistics, old, *, stop=0, **settings):
    """New parameters and natural parameters, all of it NaN before."""
    new = old.empty_like()
    natural = Natural.of(old.weights.shape[0], em.data, em.kind)
    for value in (natural.constants, natural.kappa, natural.ratio):
        value.fill_(math.nan)
    natural.singular.fill_(7)
    flag = torch.full_like(em.step.never, stop)
    em.type.maximize(statistics, old, new, natural, em.data, kernels.Settings.of(em.data, **settings), flag)
    return new, natural


def twin(em, statistics, parameters, reg_covar):
    """What `maximize` makes of the same statistics, in NumPy."""
    counts, first, second = (to_numpy(value) for value in em.moments(statistics))
    origin = origin_of(em.data, parameters, em.kind)
    objective = MaximumLikelihood(COVARIANCES[em.type.__name__.rpartition(".")[2]], reg_covar)
    return objective.maximize(SufficientStatistics(origin, counts, first, second, np.array(0.0)), parameters.means)


@every_case
def test_the_m_step_is_that_of_its_twin(type_, kind, n, d, k, empty, exact):
    x, weight = rows(n, d, weighted=True)
    parameters = mixture(x, k, type_)
    if empty:
        parameters.weights[1] = 0
    em = EM(prepare(x, weight, exact=exact), type_, kind)
    old = local(parameters, em.data)
    statistics, _ = em.expect(density(old, type_))
    new, natural = m_step(em, statistics, old, regularization=0.5)
    expected = twin(em, statistics, parameters, 0.5)
    assert_close(new.weights, expected.weights, 1e-12, "weights")
    assert_close(to_numpy(new.means) + to_numpy(em.data.shift), expected.means, 1e-12, "means")
    # The total scatter of tied knows the sum of the weights, the twin that of the rounded responsibilities. Centred
    # moments are symmetric only as far as the interpreter's BLAS makes them, and one triangle of them counts.
    rounded = not exact and (type_ == "tied" or kind == "centred")
    tolerance = 1e-6 if rounded else 1e-10
    assert_close(new.covariances, expected.covariances, tolerance, "covariances")
    assert_close(new.precision_cholesky, expected.precision_cholesky, tolerance, "factors")
    assert np.all(to_numpy(natural.singular)[: 1 if type_ == "tied" else k] == 0)
    if empty:
        assert float(new.weights[1]) == 0
        assert np.array_equal(to_numpy(new.means[1]), to_numpy(old.means[1]))

    # The natural parameters are those that inference starts from.
    filled = em._start(density(new, type_))[0]
    for name in ("products", "constants", "slopes", "centres"):
        found, reference = (to_numpy(getattr(value, name)) for value in (natural, filled))
        assert_close(found, reference, 1e-9, name)
    assert_close(natural.shared.sum(), filled.shared.sum(), 10 * tolerance, "shared")

    # What the guard compares: the bound of the host, or above it.
    floor = 0.0 if exact else kernels.HALVES_LEAST / to_numpy(em.data.scale) ** 2
    offsets = np.sqrt(to_numpy(new.means) ** 2 + floor)
    covariance = COVARIANCES[type_]
    kappa = covariance.kappa(expected.covariances, expected.precision_cholesky, offsets)
    found = to_numpy(natural.kappa)
    assert np.all(found >= kappa * (1 - 1e-5))
    assert np.all(found <= kappa * (d if type_ in ("full", "tied") else 1) * (1 + 1e-5))
    ratio = np.max(1 + offsets**2 / covariance.variances(expected.covariances), axis=1)
    assert_close(to_numpy(natural.ratio) / ratio, np.ones(k), 1e-5)


@not_finite
@pytest.mark.parametrize(
    ("type_", "kind", "d"),
    [(*kind, 2) for kind in KINDS] + [("tied", "none", 70), ("full", "centred", 70), ("full", "products", 16)],
)
def test_a_singular_covariance_is_flagged(type_, kind, d):
    exact = True
    n = 3 * d + 5
    x, _ = rows(n, d, offset=0.0)
    labels = np.arange(n) % 3
    if type_ == "tied":
        x[:, d - 1] = 0  # constant
    else:
        x[labels == 1] = 0
    em = EM(prepare(x, exact=exact, shift=np.zeros(d)), type_, kind)
    parameters = mixture(x, 3, type_)
    if kind == "centred":
        parameters.means[:] = 0
    old = local(parameters, em.data)
    statistics = em.assign(tensor(labels, dtype=torch.int32), old.means)
    new, natural = m_step(em, statistics, old)
    singular = to_numpy(natural.singular)
    assert singular[0] == 1 if type_ == "tied" else list(singular) == [0, 1, 0]
    assert torch.isfinite(new.precision_cholesky).all()
    with pytest.raises(np.linalg.LinAlgError):
        twin(em, statistics, parameters, 0.0)
    assert int(m_step(em, statistics, old, regularization=1e-3)[1].singular.sum()) == (14 if type_ == "tied" else 0)


@every_kind
def test_a_set_flag_leaves_everything_untouched(type_, kind, exact):
    x, _ = rows(30, 2)
    parameters = mixture(x, 3, type_)
    em = EM(prepare(x, exact=exact), type_, kind)
    old = local(parameters, em.data)
    statistics, _ = em.expect(density(old, type_))
    new, natural = m_step(em, statistics, old, stop=2)
    for value in (*vars(new).values(), natural.constants, natural.kappa, natural.ratio):
        assert value.isnan().all()
    assert (natural.singular == 7).all()
    room = room_for_operands(natural, em.data)
    fill_operands(room, natural, em._gain, em.data.exact, torch.ones_like(em.step.never))
    for value in (room.hi, room.lo, room.unit, room.constants, room.slopes):
        assert value.isnan().all()


GOOD = dict(kappa=10.0, ratio=10.0, weight=0.5, old_weight=0.5, evidence=-100.0, singular=0)
LIMITS = dict(tolerance=1e-3, most_kappa=100.0, most_ratio=100.0, least_weight=1e-6)
FAR = dict(previous=0.0)
NEAR = dict(previous=-10 * math.log(2) + 0.25 + 9e-4)
INEXACT, SINGULAR = dict(kappa=101.0), dict(singular=1)


@not_finite
@pytest.mark.parametrize("where", [0, 299])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (FAR, kernels.RUNNING),
        (NEAR, kernels.CONVERGED),
        (dict(previous=-10 * math.log(2) + 0.25 + 1.1e-3), kernels.RUNNING),
        (dict(previous=-math.inf), kernels.RUNNING),
        (NEAR | INEXACT, kernels.INEXACT),
        (NEAR | dict(ratio=101.0), kernels.INEXACT),
        (NEAR | dict(kappa=math.nan), kernels.INEXACT),
        (NEAR | dict(ratio=math.inf), kernels.INEXACT),
        (NEAR | dict(weight=1e-7), kernels.INEXACT),
        (NEAR | dict(weight=0.0), kernels.INEXACT),
        (NEAR | dict(weight=0.0, old_weight=0.0, kappa=math.nan), kernels.CONVERGED),
        (NEAR | SINGULAR, kernels.SINGULAR),
        (NEAR | INEXACT | SINGULAR, kernels.SINGULAR),
        (NEAR | dict(evidence=math.nan), kernels.NOT_FINITE),
        (FAR | dict(evidence=-math.inf), kernels.NOT_FINITE),
        (INEXACT | SINGULAR | dict(evidence=math.nan), kernels.NOT_FINITE),
    ],
)
def test_the_gravest_reason_decides(changes, reason, where):
    k, n_parts, total = 300, 601, 10.0
    state = GOOD | FAR | changes
    data = prepare(rows(10, 1)[0], exact=True)
    assert data.total == total

    def full(name, others, size=k, dtype=torch.float64):
        values = torch.full((size,), others, dtype=dtype)
        values[where] = state[name]
        return values.to(data.hi.device)

    natural = Natural.zeros(k, 16, 16, data.hi.device)
    natural.kappa.copy_(full("kappa", 1.0))
    natural.ratio.copy_(full("ratio", 1.0))
    natural.singular.copy_(full("singular", 0, dtype=torch.int32))
    natural.shared[where] = 0.25
    old, new = (
        kernels.Parameters(full(name, 0.1), *(torch.zeros(1, dtype=torch.float64),) * 3)
        for name in ("old_weight", "weight")
    )
    stop, bounds = tensor(np.zeros(4, dtype=np.int32)), tensor(np.full(4, state["previous"]))
    settings = kernels.Settings.of(data, **LIMITS)
    shared = natural.shared.clone()
    decide(stop, bounds, settings, full("evidence", 0.0, n_parts), shared, old, new, natural, 1)
    assert to_numpy(stop).tolist() == [0, 0, reason, 0]
    found = to_numpy(bounds)
    assert found[0] == found[1] == found[3] == state["previous"]
    if math.isfinite(state["evidence"]):
        assert_close(found[2], -10 * math.log(2) + 0.25, 1e-14)
    # Once stopped, for the same reason until the end.
    if reason != kernels.RUNNING:
        decide(stop, bounds, settings, full("evidence", 1.0, n_parts), shared, old, new, natural, 2)
        assert to_numpy(stop).tolist() == [0, 0, reason, reason]
        assert float(bounds[3]) == state["previous"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *({name: factor} for name in ("most_kappa", "most_ratio") for factor in (0.1, 0.9, 0.98)),
        dict(least_weight=0.5),
        dict(least_weight=1.001),
        dict(least_weight=0.5, empty=True),
    ],
)
@every_kind
def test_the_device_leaves_a_form_where_the_host_does(type_, kind, exact, changes):
    d = 3
    x, weight = rows(40, d, weighted=True)
    em = EM(prepare(x, weight, exact=exact), type_, kind)
    parameters = mixture(x, 2, type_)
    if changes.get("empty"):
        parameters.weights[0] = 0  # has been for long: that it has no weight is no news
    old = local(parameters, em.data)
    statistics, _ = em.expect(density(old, type_))
    new, natural = m_step(em, statistics, old, regularization=0.5)
    natural.singular[natural.singular == 7] = 0  # flags that one covariance for all does not need
    after = twin(em, statistics, parameters, 0.5)
    covariance = COVARIANCES[type_]
    shift = to_numpy(em.data.shift)
    floor = 0.0 if exact else kernels.HALVES_LEAST / to_numpy(em.data.scale) ** 2
    offsets = np.sqrt((after.means - shift) ** 2 + floor)
    alive = after.weights > 0
    kappa = covariance.kappa(after.covariances, after.precision_cholesky, offsets)
    ratio = 1 + offsets**2 / covariance.variances(after.covariances)
    # Limits that are just wide enough, times the factor; the device bounds kappa of matrices from above.
    slack = d if covariance.has_matrices else 1
    limits = dict(
        most_kappa=slack * 1.01 * kappa.max(where=alive, initial=0),
        most_ratio=1.01 * ratio.max(where=alive[:, None], initial=0),
        least_weight=after.weights[alive].min(),
    )
    for name in limits:
        limits[name] *= changes.get(name, 1 if name.startswith("most") else 0)
    if "most_kappa" in changes:
        limits["most_kappa"] /= slack * 1.02
    form = Form("in question", kind, exact, has_kernels=True, **limits)
    expected = choose((form, CENTRED), density_of(after, covariance), shift, floor, (parameters.weights, after.weights))
    stop, bounds = tensor(np.zeros(2, dtype=np.int32)), tensor(np.zeros(2))
    settings = kernels.Settings.of(em.data, tolerance=0.0, **limits)
    decide(stop, bounds, settings, tensor([-100.0]), natural.shared.clone(), old, new, natural, 0)
    is_left = expected[0] == (CENTRED,)
    assert is_left == (bool(changes) and changes.get("least_weight") != 0.5 and not changes.get("empty"))
    assert int(stop[1]) == (kernels.INEXACT if is_left else kernels.RUNNING)


def engines(x, weight, type_, dtype, reg_covar=0.1):
    there = None if weight is None else tensor(weight)
    covariance = COVARIANCES[type_]
    return (
        OnRows(_triton, Rows(tensor(x.astype(dtype)), there), covariance, reg_covar),
        OnRows(_array_api, Rows(x, weight), covariance, reg_covar),
    )


def assert_parameters(found, expected, tolerance):
    for name in ("weights", "means", "covariances", "precision_cholesky"):
        assert_close(to_numpy(getattr(found, name)), getattr(expected, name), tolerance, name)


@pytest.mark.parametrize(
    ("dtype", "n", "d", "k", "iterations"),
    [("float32", 31, 3, 2, 10), ("float64", 31, 3, 2, 10), ("float32", 45, 17, 2, 2)],
)
def test_several_iterations_on_the_device(covariance, dtype, n, d, k, iterations):
    x, weight = rows(n, d, weighted=d == 3)
    found, exact = engines(x, weight, covariance.name, dtype)
    first = found.form.precision
    start = mixture(x, k, covariance.name)
    progress = found.advance(start.mapped(tensor), iterations, tolerance=0.0)
    expected = exact.em(start, iterations)
    assert ("float16x3" in first) == (dtype == "float32")
    assert progress.reason == ""
    tolerance = PARAMETER_TOLERANCE[dtype]
    assert_parameters(progress.parameters, expected.parameters, tolerance)
    assert_close(progress.lower_bounds, expected.lower_bounds, tolerance)


@pytest.mark.parametrize(("type_", "dtype"), [("full", "float32"), ("tied", "float64")])
def test_iterations_of_matrices_that_registers_do_not_hold(type_, dtype):
    x, weight = rows(40, 66, weighted=True)
    found, exact = engines(x, weight, type_, dtype, reg_covar=1.0)
    start = mixture(x, 2, type_)
    progress = found.advance(start.mapped(tensor), 2, tolerance=0.0)
    expected = exact.em(start, 2)
    assert len(progress.lower_bounds) == 2
    assert_parameters(progress.parameters, expected.parameters, PARAMETER_TOLERANCE[dtype])


@pytest.mark.parametrize("stop_after", [2, 3, 8, 9, 10])
def test_stops_in_the_iteration_that_meets_the_tolerance(stop_after):
    # From a wide start the bound rises less and less.
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.normal(size=(30, 1)), 4 + rng.normal(size=(30, 1))])
    found, exact = engines(x, None, "diag", "float64")
    covariances = np.full((2, 1), 3.0)
    start = Parameters(np.array([0.5, 0.5]), np.array([[0.0], [6.0]]), covariances, 1 / np.sqrt(covariances))
    changes = np.abs(np.diff(exact.em(start, stop_after).lower_bounds))
    tolerance = changes[-1] * 1.0001
    assert np.all(changes[:-1] > tolerance)
    expected = exact.em(start, 30, tolerance)
    assert len(expected.lower_bounds) == stop_after
    progress = found.advance(start.mapped(tensor), 30, tolerance=tolerance)
    assert len(progress.lower_bounds) == stop_after
    assert_close(progress.lower_bounds, expected.lower_bounds, 1e-10)
    assert_parameters(progress.parameters, expected.parameters, 1e-9)
    # The bound before the first one counts as well.
    again = found.advance(start.mapped(tensor), at_most=5, previous=expected.lower_bounds[0], tolerance=1e-8)
    assert len(again.lower_bounds) == 1


@pytest.mark.parametrize("at_most", [1, 2, 8, 9])
def test_runs_as_often_as_asked(at_most):
    x, _ = rows(30, 2)
    found, exact = engines(x, None, "diag", "float64")
    start = mixture(x, 2, "diag")
    progress = found.advance(start.mapped(tensor), at_most, tolerance=0.0)
    expected = exact.em(start, at_most)
    assert_close(progress.lower_bounds, expected.lower_bounds, 1e-10)
    assert_parameters(progress.parameters, expected.parameters, 1e-9)
