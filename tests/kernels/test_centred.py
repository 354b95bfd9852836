"""The kernels of centred rows, each against sums over rows in NumPy."""

import numpy as np
import pytest
import torch

from cases import assert_close
from gaussmix._arrays import to_numpy
from gaussmix_kernels import EM
from kernels.common import (
    EVIDENCE_TOLERANCE,
    INTERPRETED,
    SUMS_TOLERANCE,
    density,
    local,
    log_evidence,
    mixture,
    prepare,
    responsibilities,
    rows,
    sums_about,
    tensor,
)

# 70 and 100 features are two blocks of 64 in the default tier and more in the exact one.
SHAPES = [(1, 1, 1), (70, 2, 3), (20, 5, 17), (40, 16, 3), (40, 17, 3), (45, 33, 1), (33, 70, 2), (20, 100, 1)]

every_shape = pytest.mark.parametrize(("n", "d", "k"), SHAPES)


def assert_moments(em, statistics, x, r, weight, parameters):
    expected = sums_about(x, r, weight, parameters.means, "full")
    names = ("counts", "first moments", "second moments")
    for name, value, reference in zip(names, em.moments(statistics), expected, strict=True):
        assert_close(value, reference, SUMS_TOLERANCE[em.data.exact], name)
    second_moments = to_numpy(em.moments(statistics)[2])
    if not em.data.exact and x.shape[1] <= 64:
        # A GPU adds both triangles in one order; the interpreter has BLAS multiply, which need not.
        transposed = np.swapaxes(second_moments, 1, 2)
        assert_close(second_moments, transposed, 1e-6 if INTERPRETED else 0.0, "symmetry")


def check_expect(n, d, k, exact, weighted=True, layout="C"):
    x, weight = rows(n, d, weighted=weighted)
    parameters = mixture(x, k, "full")
    em = EM(prepare(x, weight, exact=exact, layout=layout), "full", "centred")
    statistics, log_likelihood = em.expect(density(local(parameters, em.data), "full"))
    assert_moments(em, statistics, x, responsibilities(x, parameters, "full"), weight, parameters)
    expected = np.average(log_evidence(x, parameters, "full"), weights=weight)
    total = n if weight is None else weight.sum()
    assert abs(log_likelihood / total - expected) < EVIDENCE_TOLERANCE[exact]


@every_shape
def test_step(n, d, k, exact):
    check_expect(n, d, k, exact, weighted=d % 2 == 0)


@pytest.mark.parametrize(("n", "d", "k"), [(101, 3, 3), (70, 70, 1)])
def test_several_chunks_and_slabs(n, d, k, exact, short_slabs):
    check_expect(n, d, k, exact, layout="columns")


@every_shape
def test_sums_by_labels(n, d, k, exact):
    x, weight = rows(n, d, weighted=True)
    labels = np.random.RandomState(0).randint(k, size=n)
    parameters = mixture(x, k, "full")
    em = EM(prepare(x, weight, exact=exact), "full", "centred")
    statistics = em.assign(tensor(labels, dtype=torch.int32), local(parameters, em.data).means)
    assert_moments(em, statistics, x, np.eye(k)[labels], weight, parameters)


def check_inference(n, d, k, exact):
    x, _ = rows(n, d)
    parameters = mixture(x, k, "full")
    em = EM(prepare(x, exact=exact), "full", "centred")
    there = density(local(parameters, em.data), "full")
    tolerance = EVIDENCE_TOLERANCE[exact]
    assert np.abs(to_numpy(em.log_evidence(there)) - log_evidence(x, parameters, "full")).max() < tolerance
    expected = responsibilities(x, parameters, "full")
    r = to_numpy(em.responsibilities(there))
    assert r.shape == (n, k)
    assert np.abs(r - expected).max() < tolerance
    labels = to_numpy(em.labels(there))
    assert np.all(expected[np.arange(n), labels] > expected.max(axis=1) - tolerance)


@every_shape
def test_inference(n, d, k, exact):
    check_inference(n, d, k, exact)


def test_inference_in_several_chunks(exact, short_slabs):
    check_inference(45, 3, 17, exact)


def test_sums_by_labels_in_several_chunks(exact, short_slabs):
    test_sums_by_labels(75, 3, 3, exact)


def test_the_first_of_equal_components_gets_the_label(exact):
    x, _ = rows(30, 2)
    parameters = mixture(x, 20, "full").mapped(lambda value: value[np.arange(20) // 2])
    em = EM(prepare(x, exact=exact), "full", "centred")
    assert set(to_numpy(em.labels(density(local(parameters, em.data), "full")))) <= set(range(0, 20, 2))


def test_a_component_without_weight_gets_nothing(exact):
    x, weight = rows(45, 2, weighted=True)
    parameters = mixture(x, 3, "full")
    parameters.weights[:] = [0.5, 0.0, 0.5]
    em = EM(prepare(x, weight, exact=exact), "full", "centred")
    statistics, _ = em.expect(density(local(parameters, em.data), "full"))
    assert_moments(em, statistics, x, responsibilities(x, parameters, "full"), weight, parameters)
    assert float(em.moments(statistics)[0][1]) == 0


def test_components_far_apart_keep_their_digits(exact):
    """Where features would lose them: widths of 1, distances of 1000."""
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.normal(size=(40, 3)), 1000 + rng.normal(size=(40, 3))]).astype(np.float32)
    x = x.astype(np.float64)
    covariances = np.stack([np.eye(3)] * 2)
    parameters = mixture(x, 2, "full").mapped(np.copy)
    parameters.means[:] = [[0.0] * 3, [1000.0] * 3]
    parameters.covariances[:] = parameters.precision_cholesky[:] = covariances
    em = EM(prepare(x, exact=exact), "full", "centred")
    there = density(local(parameters, em.data), "full")
    error = np.abs(to_numpy(em.log_evidence(there)) - log_evidence(x, parameters, "full")).max()
    assert error < (1e-10 if exact else 1e-3)
    statistics, _ = em.expect(there)
    expected = sums_about(x, responsibilities(x, parameters, "full"), None, parameters.means, "full")
    assert_close(em.moments(statistics)[2], expected[2], 1e-11 if exact else 5e-4)


def test_nothing_runs_once_the_stop_flag_is_set(exact):
    x, _ = rows(45, 2)
    em = EM(prepare(x, exact=exact), "full", "centred")
    operands = em._start(density(local(mixture(x, 3, "full"), em.data), "full"))[1]
    for value in em.step.expect(operands, torch.ones_like(em.step.never)):
        assert value.isnan().all()
