"""The compiled E-step: what it shares with the other forms is tested in test_numpy.py, by the fixture `e_step`."""

import sys
import tracemalloc

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture as Reference

from cases import assert_close, blobs, start_for
from gaussmix.backends import _numpy
from gaussmix.sklearn import GaussianMixture

_compiled = pytest.importorskip("gaussmix.backends._compiled", reason="numba is not installed")
pytestmark = pytest.mark.usefixtures("unconverged")


@pytest.fixture(autouse=True)
def _without_forced_backend(monkeypatch):
    monkeypatch.delenv("GAUSSMIX_BACKEND", raising=False)


@pytest.fixture
def calls(monkeypatch):
    """How often the compiled E-step was called."""
    found, expect = [], _compiled.expect
    monkeypatch.setattr(_compiled, "expect", lambda *args: found.append(1) or expect(*args))
    return found


def exponential(x):
    out, exp = x.copy(), _compiled._EXP[x.dtype]
    floor = x.dtype.type(_numpy.FLOOR[x.dtype])
    _compiled._exponentiate(out, floor, exp, np.empty(len(x), dtype=exp.one.dtype))
    return out


def test_exp_is_rounded_to_less_than_a_unit_in_the_last_place(dtype):
    rng = np.random.RandomState(0)
    x = np.concatenate([-rng.uniform(0, -_numpy.FLOOR[np.dtype(dtype)], 10_001), -np.geomspace(1e-30, 1, 999), [0]])
    x = x.astype(dtype)
    exact = np.exp(x.astype(np.longdouble))
    assert np.max(np.abs(exponential(x) - exact) / exact) < np.finfo(dtype).eps
    assert exponential(x)[-1] == 1


def test_exp_of_what_is_not_finite_or_below_the_floor(dtype):
    floor = _numpy.FLOOR[np.dtype(dtype)]
    found = exponential(np.asarray([-np.inf, -1e30, floor, floor + 1, np.nan], dtype=dtype))
    assert np.array_equal(found[:3], np.zeros(3))
    assert found[3] > 0
    assert np.isnan(found[4])


@pytest.mark.parametrize(("n", "is_called"), [(20_000, False), (25_000, True)])
def test_it_is_taken_for_much_work(calls, n, is_called):
    x = blobs(n=n, d=16, k=8, seed=1, spread=1.0)
    settings = dict(max_iter=3, tol=0, **start_for(x, 8, "full"))
    found = GaussianMixture(8, **settings).fit(x)
    assert bool(calls) == is_called
    expected = Reference(8, **settings).fit(x)
    for name in ("weights_", "means_", "covariances_", "lower_bound_"):
        assert_close(getattr(found, name), getattr(expected, name), 1e-9, name)


def test_without_numba_numpy_computes_the_same(monkeypatch, calls):
    x = blobs(n=5_000, d=3, k=3, seed=2)
    settings = dict(max_iter=3, tol=0, **start_for(x, 3, "full"))
    monkeypatch.setattr(_numpy, "COMPILED_FLOPS", 0)
    expected = GaussianMixture(3, **settings).fit(x)
    assert len(calls) > 0
    calls.clear()
    # A NumPy that is too new for it makes Numba's import fail as well.
    monkeypatch.setitem(sys.modules, "gaussmix.backends._compiled", None)
    monkeypatch.delattr("gaussmix.backends._compiled")
    _numpy._compiled.cache_clear()
    try:
        found = GaussianMixture(3, **settings).fit(x)
    finally:
        _numpy._compiled.cache_clear()
    assert not calls
    assert_close(found.covariances_, expected.covariances_, 1e-9)


def test_weights_that_can_not_be_written_to(monkeypatch, calls):
    monkeypatch.setattr(_numpy, "COMPILED_FLOPS", 0)
    x, weight = blobs(n=700, d=3, k=3, seed=3), np.random.RandomState(0).uniform(size=700)
    mixture = GaussianMixture(3, max_iter=2, **start_for(x, 3, "full")).fit(x, sample_weight=weight)
    n_compiled = len(_compiled._expect.signatures)
    calls.clear()
    weight.flags.writeable = False
    mixture.fit(x, sample_weight=weight)
    assert len(calls) > 0
    assert len(_compiled._expect.signatures) == n_compiled


@pytest.mark.parametrize("method", ["fit", "predict"])
def test_memory_is_that_of_rows_and_not_of_features(method, monkeypatch, calls):
    monkeypatch.setattr(_numpy, "COMPILED_FLOPS", 0)
    x = blobs(n=20_000, d=32, k=3, seed=5, spread=0.5)
    mixture = GaussianMixture(3, max_iter=2, **start_for(x, 3, "full")).fit(x)  # what is loaded is loaded
    tracemalloc.start()
    getattr(mixture, method)(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Rows are kept once; features of a block would take 37 MB.
    assert peak < 3 * x.nbytes


def test_a_folder_that_nothing_can_be_written_to(monkeypatch):
    def njit(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(_compiled, "njit", njit)
    assert _compiled.compiled(len) is len
