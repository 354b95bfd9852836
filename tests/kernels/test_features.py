"""The kernels of expanded features, each against sums over rows in NumPy."""

import numpy as np
import pytest
import torch

from cases import assert_close
from gaussmix._arrays import to_numpy
from gaussmix_kernels import EM
from kernels.common import (
    EVIDENCE_TOLERANCE,
    EXPANDED,
    SUMS_TOLERANCE,
    density,
    local,
    log_evidence,
    mixture,
    origin_of,
    prepare,
    responsibilities,
    rows,
    sums_about,
    tensor,
)

# More features than 16 are for kinds without products; more components than 16 have two kernels in the exact tier.
SHAPES = [(1, 1, 1), (45, 2, 3), (45, 5, 17), (45, 16, 3), (33, 17, 17), (31, 33, 1)]
CASES = [(*kind, *shape) for kind in EXPANDED for shape in SHAPES if kind[1] != "products" or shape[1] <= 16]

every_case = pytest.mark.parametrize(("type_", "kind", "n", "d", "k"), CASES)
every_kind = pytest.mark.parametrize(("type_", "kind"), EXPANDED)


def assert_statistics(em, statistics, x, r, weight, parameters, type_, kind):
    exact = em.data.exact
    expected = sums_about(x, r, weight, origin_of(em.data, parameters, kind), type_)
    found = em.moments(statistics)
    names = ("counts", "first moments", "second moments")
    for name, value, reference in zip(names, found, expected, strict=True):
        assert_close(value, reference, SUMS_TOLERANCE[exact], name)


def check_expect(type_, kind, n, d, k, exact, weighted, layout="C"):
    x, weight = rows(n, d, weighted=weighted)
    parameters = mixture(x, k, type_)
    em = EM(prepare(x, weight, exact=exact, layout=layout), type_, kind)
    statistics, log_likelihood = em.expect(density(local(parameters, em.data), type_))
    r = responsibilities(x, parameters, type_)
    assert_statistics(em, statistics, x, r, weight, parameters, type_, kind)
    evidence = log_evidence(x, parameters, type_)
    expected = np.average(evidence, weights=weight)
    total = n if weight is None else weight.sum()
    assert abs(log_likelihood / total - expected) < EVIDENCE_TOLERANCE[exact]


@every_case
def test_fused_step(type_, kind, n, d, k, exact):
    check_expect(type_, kind, n, d, k, exact, weighted=d % 2 == 1)


@every_kind
def test_step_of_two_kernels(type_, kind, exact, two_kernels):
    check_expect(type_, kind, 45, 3, 5, exact, weighted=True)


@every_kind
def test_step_of_more_components_than_a_tile(type_, kind, exact):
    check_expect(type_, kind, 10, 2, 70, exact, weighted=True)


@every_kind
def test_several_slabs(type_, kind, exact, short_slabs):
    check_expect(type_, kind, 101, 3, 3, exact, weighted=True, layout="F")


@every_kind
def test_several_slabs_of_two_kernels(type_, kind, exact, short_slabs, two_kernels):
    check_expect(type_, kind, 101, 2, 3, exact, weighted=False, layout="rows")


@every_case
def test_sums_by_labels(type_, kind, n, d, k, exact):
    x, weight = rows(n, d, weighted=True)
    labels = np.random.RandomState(0).randint(k, size=n)
    em = EM(prepare(x, weight, exact=exact), type_, kind)
    parameters = mixture(x, k, type_)
    offsets = local(parameters, em.data).means
    statistics = em.assign(tensor(labels, dtype=torch.int32), offsets)
    assert_statistics(em, statistics, x, np.eye(k)[labels], weight, parameters, type_, kind)


@pytest.mark.parametrize(("type_", "kind", "n", "d", "k"), [case for case in CASES if case[3] in (1, 5, 33)])
def test_inference(type_, kind, n, d, k, exact):
    x, _ = rows(n, d)
    parameters = mixture(x, k, type_)
    em = EM(prepare(x, exact=exact), type_, kind)
    there = density(local(parameters, em.data), type_)
    tolerance = EVIDENCE_TOLERANCE[exact]
    evidence = em.log_evidence(there)
    assert evidence.dtype == torch.float64
    assert np.abs(to_numpy(evidence) - log_evidence(x, parameters, type_)).max() < tolerance
    r, expected = em.responsibilities(there), responsibilities(x, parameters, type_)
    assert r.shape == (n, k)
    assert np.abs(to_numpy(r) - expected).max() < tolerance
    assert np.abs(to_numpy(r).sum(axis=1) - 1).max() < (1e-12 if exact else 1e-5)
    labels = to_numpy(em.labels(there))
    assert np.all(expected[np.arange(n), labels] > expected.max(axis=1) - tolerance)


@every_kind
def test_the_first_of_equal_components_gets_the_label(type_, kind, exact):
    x, _ = rows(30, 2)
    parameters = mixture(x, 20, type_).mapped(
        lambda value: value[np.arange(20) // 2] if value.shape[0] == 20 else value
    )
    em = EM(prepare(x, exact=exact), type_, kind)
    assert set(to_numpy(em.labels(density(local(parameters, em.data), type_)))) <= set(range(0, 20, 2))


@pytest.mark.parametrize("form", ["fused", "two kernels"])
@every_kind
def test_a_component_without_weight_gets_nothing(type_, kind, form, exact, request):
    if form == "two kernels":
        request.getfixturevalue("two_kernels")
    x, weight = rows(45, 2, weighted=True)
    parameters = mixture(x, 3, type_)
    parameters.weights[:] = [0.5, 0.0, 0.5]
    em = EM(prepare(x, weight, exact=exact), type_, kind)
    statistics, _ = em.expect(density(local(parameters, em.data), type_))
    r = responsibilities(x, parameters, type_)
    assert_statistics(em, statistics, x, r, weight, parameters, type_, kind)
    assert float(em.moments(statistics)[0][1]) == 0
    assert np.all(to_numpy(em.responsibilities(density(local(parameters, em.data), type_)))[:, 1] == 0)


@pytest.mark.parametrize("form", ["fused", "two kernels"])
@every_kind
def test_rows_far_from_every_component(type_, kind, form, exact, request):
    if form == "two kernels":
        request.getfixturevalue("two_kernels")
    x, _ = rows(45, 2)
    parameters = mixture(x, 3, type_)
    middle = x.mean(axis=0)
    x[::3] += 3000
    em = EM(prepare(x, exact=exact, shift=middle), type_, kind)
    statistics, _ = em.expect(density(local(parameters, em.data), type_))
    assert torch.isfinite(statistics).all()
    # Terms of a logit are in the thousands.
    tolerance = 1e-10 if exact else 1e-3
    assert float(em.moments(statistics)[0].sum()) == pytest.approx(45, rel=tolerance)
    found = to_numpy(em.responsibilities(density(local(parameters, em.data), type_)))
    assert_close(found.sum(axis=1), np.ones(45), tolerance)
    assert_close(found[1::3], responsibilities(x, parameters, type_)[1::3], 2e-4)


@pytest.mark.parametrize("form", ["fused", "two kernels"])
@every_kind
def test_small_responsibilities_are_kept(type_, kind, form, exact, request):
    if form == "two kernels":
        request.getfixturevalue("two_kernels")
    x, _ = rows(45, 2)
    parameters = mixture(x, 2, type_)
    parameters.weights[:] = [1 - 1e-6, 1e-6]
    em = EM(prepare(x, exact=exact), type_, kind)
    count = float(em.moments(em.expect(density(local(parameters, em.data), type_))[0])[0][1])
    assert count == pytest.approx(responsibilities(x, parameters, type_)[:, 1].sum(), rel=1e-3)


@every_kind
def test_nothing_runs_once_the_stop_flag_is_set(type_, kind, exact, monkeypatch):
    x, _ = rows(45, 2)
    parameters = mixture(x, 3, type_)
    em = EM(prepare(x, exact=exact), type_, kind)
    operands = em._start(density(local(parameters, em.data), type_))[1]
    stop = torch.ones_like(em.step.never)
    for values in (em.step.expect(operands, stop), em.step.normalize(operands, stop)):
        for value in values:
            assert value.isnan().all()
