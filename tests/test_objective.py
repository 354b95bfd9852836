"""An objective of its own, weights that are held fixed, wherever EM runs: the loop asks it for everything."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

import oracle
from cases import PARAMETER_TOLERANCE, assert_close, blobs
from conftest import INSTALLED
from gaussmix._arrays import asarray_like, to_numpy
from gaussmix._em import EMResult, run_em
from gaussmix._objective import MaximumLikelihood
from gaussmix._parameters import Parameters
from gaussmix.backends._dispatch import engine
from gaussmix.rows._data import Rows
from gaussmix.rows._processes import Share
from gaussmix.rows._validation import validate_rows
from gaussmix.sklearn import GaussianMixture

X = blobs(n=90, d=2, k=3, spread=2.0)
WEIGHTS = (0.5, 0.3, 0.2)


@dataclass(frozen=True)
class FixedWeights(MaximumLikelihood):
    """The largest likelihood of means and covariances, for given weights."""

    @property
    def kernels_add(self):
        return None

    def maximize(self, statistics, means):
        found = super().maximize(statistics, means)
        return replace(found, weights=asarray_like(np.array(WEIGHTS), found.weights))


def start(covariance):
    covariances = np.broadcast_to(4 * np.eye(2) if covariance.has_matrices else 4.0, covariance.shape(3, 2)).copy()
    return Parameters(np.array(WEIGHTS), X[:3].copy(), covariances, covariance.precision_cholesky(covariances))


def expected(covariance):
    """Three iterations of the textbook, with the weights put back after each."""
    _, means, covariances, _ = vars(start(covariance)).values()
    for _ in range(3):
        _, means, covariances = oracle.em_step(X, WEIGHTS, means, covariances, covariance.name, 1e-3)
    return means, covariances


def check(rows, covariance, backend):
    on_rows = engine(rows, covariance)
    assert on_rows.backend.startswith(backend)
    begun = EMResult(start(covariance).moved(on_rows.rows.like, on_rows.rows.dtype), [], converged=False)
    found = run_em(on_rows, FixedWeights(covariance, 1e-3), begun, tolerance=0, max_iter=3).parameters
    assert_close(to_numpy(found.weights), WEIGHTS, 1e-15)
    for value, reference in zip((found.means, found.covariances), expected(covariance), strict=True):
        assert_close(to_numpy(value), reference, PARAMETER_TOLERANCE["float64"])


@pytest.fixture(autouse=True)
def _without_forced_backend(monkeypatch):
    monkeypatch.delenv("GAUSSMIX_BACKEND", raising=False)


@pytest.mark.parametrize("backend", ["numpy", "array_api"])
def test_arrays(covariance, backend, monkeypatch):
    monkeypatch.setenv("GAUSSMIX_BACKEND", backend)
    check(Rows(X), covariance, backend)


def test_kernels(covariance, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if covariance.name == "tied_diag":
        pytest.skip("has no kernels")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("GAUSSMIX_BACKEND", "triton")
    check(Rows(torch.as_tensor(X)), covariance, "triton")


class Blocks:
    def __iter__(self):
        return iter((X[:40], X[40:]))


def test_blocks(covariance):
    check(validate_rows(GaussianMixture(3), Blocks(), reset=True), covariance, "numpy")


def test_dask_arrays(covariance):
    dask = pytest.importorskip("dask.array")
    check(validate_rows(GaussianMixture(3), dask.from_array(X, chunks=(25, 2)), reset=True), covariance, "numpy")


@pytest.mark.skipif("torch" not in INSTALLED, reason="torch.distributed is not installed")
def test_two_processes(covariance):
    from test_distributed import groups_of, in_each

    def fit(group):
        with group.together():
            check(Share.of(Rows(X[:50] if group.rank == 0 else X[50:]), group), covariance, "numpy")

    assert in_each(groups_of(2), fit) == [None, None]
