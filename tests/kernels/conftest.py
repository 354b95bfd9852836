"""Skips the folder where torch or triton is missing; memory that a kernel has not written is NaN."""

import importlib.util

import pytest

from gaussmix._covariance import COVARIANCES

MISSING = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]


class _Skipped(pytest.File):
    def collect(self):
        pytest.skip(f"{' and '.join(MISSING)} not installed; install gaussmix[triton]", allow_module_level=True)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path, parent):
    collectors = yield
    if MISSING and collectors:
        return [_Skipped.from_parent(parent, path=file_path)]
    return collectors


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What nobody writes is NaN, or a number that is no row and no component."""
    import torch

    def poisoned(function):
        def allocate(*args, **kwargs):
            out = function(*args, **kwargs)
            if out.device.type == "meta":
                return out
            return out.fill_(float("nan") if out.dtype.is_floating_point else torch.iinfo(out.dtype).max)

        return allocate

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(autouse=True)
def _without_forced_backend(monkeypatch):
    monkeypatch.delenv("GAUSSMIX_BACKEND", raising=False)


@pytest.fixture(params=("diag", "full", "spherical", "tied"))
def covariance(request):
    """The covariance types that have kernels."""
    return COVARIANCES[request.param]


@pytest.fixture
def short_slabs(monkeypatch):
    """Slabs of one block of rows, and chunks of 32 rows: several of each for little data."""
    from gaussmix_kernels import _centred, _features, _prepass

    for module in (_centred, _features, _prepass):
        monkeypatch.setattr(module, "slab_rows", lambda n, block, programs=0: block)
    monkeypatch.setattr(_centred, "chunk_rows", lambda k, itemsize: 32)


@pytest.fixture
def two_kernels(monkeypatch):
    """The log-normaliser in a kernel of its own, whatever the shape."""
    from gaussmix_kernels import _features

    monkeypatch.setattr(_features.Step, "fused", lambda self, k: False)


@pytest.fixture(params=[False, True], ids=["default", "exact"])
def exact(request):
    """The tier."""
    return request.param
