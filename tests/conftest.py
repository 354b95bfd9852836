"""Fixtures: every array library that is here x every covariance type x both float dtypes."""

import importlib.util
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

# scikit-learn's checks of array API input need it; gaussmix does not. It has to be set before scipy is imported.
os.environ.setdefault("SCIPY_ARRAY_API", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from sklearn.exceptions import ConvergenceWarning

from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix.backends import _numpy

if importlib.util.find_spec("torch") and importlib.util.find_spec("triton"):
    import torch

    if not torch.cuda.is_available():
        # The kernels then run in Triton's interpreter. Triton looks once, when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"

slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("dev", max_examples=25, deadline=None, suppress_health_check=slow_is_fine)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, suppress_health_check=slow_is_fine)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

LIBRARIES = ("numpy", "torch", "array_api_strict")
INSTALLED = tuple(name for name in LIBRARIES if importlib.util.find_spec(name))
# Not parametrised over, but a run may require them: test_host_arrays.py has jax, `e_step` numba.
BACKENDS = (*LIBRARIES, "jax", "numba", "triton", "lightning_fabric", "dask")
INSTALLED_BACKENDS = tuple(name for name in BACKENDS if importlib.util.find_spec(name))


@dataclass(frozen=True)
class Library:
    """An array library: makes arrays from NumPy's and brings them back."""

    name: str

    def asarray(self, x: Any, dtype: Any = None) -> Any:
        x = np.array(x, dtype=dtype)
        if self.name == "torch":
            import torch

            return torch.as_tensor(x)
        if self.name == "array_api_strict":
            import array_api_strict

            return array_api_strict.asarray(x)
        return x

    def owns(self, x: Any) -> bool:
        return type(x).__module__.partition(".")[0] == self.name

    to_numpy = staticmethod(to_numpy)


def pytest_report_header() -> str:
    missing = sorted(set(BACKENDS) - set(INSTALLED_BACKENDS))
    there = f"backends: {', '.join(INSTALLED_BACKENDS)}" + (f"; not installed: {', '.join(missing)}" if missing else "")
    return there + ("; kernels run in Triton's interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "")


def pytest_configure(config: pytest.Config) -> None:
    required = set(filter(None, os.environ.get("GAUSSMIX_REQUIRE_BACKENDS", "").split(",")))
    if missing := sorted(required - set(INSTALLED_BACKENDS)):
        raise pytest.UsageError(f"GAUSSMIX_REQUIRE_BACKENDS names {missing}, which are not installed")
    for module, needed in (
        ("torch.py", {"torch"}),
        ("rows/_gpu.py", {"torch"}),
        ("backends/_triton.py", {"torch", "triton"}),
        ("backends/_compiled.py", {"numba"}),
        ("rows/_dask.py", {"dask"}),
    ):
        path = config.rootpath / "src/gaussmix" / module
        if not path.exists():
            raise pytest.UsageError(f"{path} is to be left out where {needed} are missing, but there is no such file")
        if not needed <= set(INSTALLED_BACKENDS):
            # Looking for examples imports it.
            config.option.ignore = [*(config.option.ignore or []), str(path)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "torch" not in INSTALLED:
        for item in items:
            if item.path.name == "MIGRATION.md":
                item.add_marker(pytest.mark.skip("its examples use torch, which is not installed"))


@pytest.fixture(params=LIBRARIES)
def library(request):
    if request.param not in INSTALLED:
        pytest.skip(f"{request.param} is not installed")
    return Library(request.param)


@pytest.fixture(params=sorted(COVARIANCES))
def covariance(request):
    return COVARIANCES[request.param]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=["auto", "array_api"])
def implementation(request, monkeypatch):
    """The implementation of k-means that data in host memory is given to."""
    monkeypatch.setenv("GAUSSMIX_BACKEND", request.param)


@pytest.fixture(params=["numpy", "compiled"])
def e_step(request, monkeypatch):
    """What computes features in host memory, for data of any size."""
    if request.param == "compiled" and "numba" not in INSTALLED_BACKENDS:
        pytest.skip("numba is not installed")
    monkeypatch.setattr(_numpy, "COMPILED_FLOPS", 0 if request.param == "compiled" else math.inf)


@pytest.fixture
def unconverged():
    """For fits of a fixed number of iterations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
