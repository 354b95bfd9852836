"""What tensor cores do to sums, which Triton's interpreter does not: they cut off where it rounds."""

import math

import numpy as np
import pytest

from cases import LOG_PROB_TOLERANCE
from gaussmix import _guard
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._parameters import Parameters
from gaussmix_kernels import EM, _centred, _features, kinds
from gaussmix_kernels._launch import INTERPRETED
from gaussmix_kernels._parameters import HALVES_EPS
from kernels.common import (
    EXPANDED,
    KINDS,
    density,
    local,
    log_evidence,
    prepare,
    responsibilities,
    toward_zero,
    truncate_sums,
)

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU needs no emulation of one")

MOST_RATIO = _guard.VARIANCE_TOLERANCE[_guard.FLOAT32] / HALVES_EPS
MOST_KAPPA = _guard.TOLERANCE[_guard.FLOAT32] / HALVES_EPS


@pytest.fixture(autouse=True)
def _truncated(monkeypatch):
    truncate_sums(monkeypatch)


def test_numbers_are_cut_off():
    x = np.asarray([1 + 2.0**-24, 1 + 2.0**-23 - 2.0**-40, -1 - 2.0**-23 + 2.0**-40, 3.0, 0.0])
    assert np.array_equal(toward_zero(x), [1, 1, -1, 3, 0])
    assert toward_zero(x).dtype == np.float32


def two_clusters(n, d, ratio, seed=0):
    """Rows about -offset and offset, of which the mean square is `ratio` variances, and a mixture of the two."""
    rng = np.random.RandomState(seed)
    offset = math.sqrt(ratio - 1)
    labels = np.arange(n) % 2
    x = np.where(labels[:, None] == 1, offset, -offset) + rng.normal(size=(n, d))
    # Each cluster has its mean and variances to the last digit: what is left is what sums lose.
    for label in (0, 1):
        mine = x[labels == label]
        x[labels == label] = (2 * label - 1) * offset + (mine - mine.mean(axis=0)) / mine.std(axis=0)
    return x.astype(np.float32).astype(np.float64), labels


@pytest.mark.parametrize(("ratio", "slab"), [(200.0, 256), (2.0, 4096), (200.0, 4096)])
@pytest.mark.parametrize(("type_", "kind"), [("diag", "squares"), ("full", "products"), ("full", "centred")])
def test_variances_are_those_of_the_rows(type_, kind, slab, ratio, monkeypatch):
    """As far as the guard lets features be used, in slabs of any length."""
    assert ratio < MOST_RATIO
    monkeypatch.setattr(_centred if kind == "centred" else _features, "slab_rows", lambda n, block, *more: slab)
    n, d, covariance = 4096, 3, COVARIANCES[type_]
    x, labels = two_clusters(n, d, ratio)
    em = EM(prepare(x, exact=False), type_, kind)
    # Centred rows are about the means of the step before: half a width away from those of the rows.
    means = np.stack([x[labels == label].mean(axis=0) for label in (0, 1)]) + 0.5
    unit = np.broadcast_to(np.eye(d) if type_ == "full" else np.ones(d), covariance.shape(2, d)).copy()
    parameters = Parameters(np.full(2, 0.5), means, unit, unit)
    statistics, _ = em.expect(density(local(parameters, em.data), type_))
    counts, first, second = (to_numpy(value) for value in em.moments(statistics))
    shifts = first / counts[:, None]
    squares = np.einsum("kii->ki", second) if type_ == "full" else second
    found = squares / counts[:, None] - shifts * shifts
    r = responsibilities(x, parameters, type_)
    total = r.sum(axis=0)
    mean = r.T @ x / total[:, None]
    expected = np.stack([r[:, k] @ (x - mean[k]) ** 2 / total[k] for k in (0, 1)])
    errors = found / expected - 1
    # Rounding averages out over the 500 slabs that there are at least where they are that long; truncation would not.
    assert np.max(np.abs(errors)) < (1e-4 if slab == 256 else 3e-4)
    assert abs(errors.mean()) < _guard.VARIANCE_TOLERANCE[_guard.FLOAT32]


@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.parametrize(("type_", "kind"), KINDS)
def test_log_densities_up_to_the_largest_kappa(type_, kind, d):
    """Of up to 512 features, with terms of both signs that are as large as the guard lets them be."""
    if kind == "products":
        d = 16
    covariance = COVARIANCES[type_]
    form = kinds(covariance.quadratic, d)
    assert kind in form
    rng = np.random.RandomState(d)
    # Offsets from the shift that spend half of kappa, which is d where there are none.
    offset = math.sqrt(max(0.5 * MOST_KAPPA / d - 1, 0)) if (type_, kind) in EXPANDED else 3.0
    signs = rng.choice([-1.0, 1.0], size=d)
    labels = np.arange(128) % 2
    x = (np.where(labels[:, None] == 1, offset, -offset) * signs + rng.normal(size=(128, d))).astype(np.float32)
    x = x.astype(np.float64)
    means = np.stack([-offset * signs, offset * signs])
    shape = covariance.shape(2, d)
    unit = np.broadcast_to(np.eye(d) if covariance.has_matrices else 1.0, shape).copy()
    parameters = Parameters(np.full(2, 0.5), means, unit, unit)
    em = EM(prepare(x, exact=False), type_, kind)
    kappa = covariance.kappa(unit, unit, means - to_numpy(em.data.shift)).max()
    assert kind == "centred" or 0.3 * MOST_KAPPA < kappa < MOST_KAPPA
    found = to_numpy(em.log_evidence(density(local(parameters, em.data), type_)))
    assert np.max(np.abs(found - log_evidence(x, parameters, type_))) < LOG_PROB_TOLERANCE["float32"]
