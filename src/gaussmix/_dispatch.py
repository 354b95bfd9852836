"""Which implementation runs for given data, and why."""

import logging
import os
from importlib.util import find_spec
from types import ModuleType

from array_api_compat import is_cupy_array, is_torch_array

from gaussmix import _array_api, _numpy
from gaussmix._covariance import Covariance
from gaussmix._data import Rows
from gaussmix._engine import Clusters, Engine
from gaussmix._typing import Array

logger = logging.getLogger("gaussmix")

BACKENDS = ("auto", "triton", "numpy", "array_api")


def engine(rows: Rows, covariance: Covariance, reg_covar: float = 0.0) -> Engine:
    """The implementation for these rows, as the environment variable GAUSSMIX_BACKEND has it."""
    name, reason = choose(rows.array)
    logger.debug("%s covariance runs on %s: %s", covariance.name, name, reason)
    chosen: Engine = _implementation(name).Engine(rows, covariance, reg_covar)
    return chosen


def clusters(rows: Rows) -> Clusters:
    """The implementation of k-means for these rows, chosen as `engine` does."""
    name, reason = choose(rows.array)
    logger.debug("k-means runs on %s: %s", name, reason)
    chosen: Clusters = _implementation(name).Clusters(rows)
    return chosen


def choose(x: Array) -> tuple[str, str]:
    """The name of the implementation for rows of `x`, and the reason."""
    forced = os.environ.get("GAUSSMIX_BACKEND", "auto")
    if forced not in BACKENDS:
        raise ValueError(f"GAUSSMIX_BACKEND={forced!r} is not a backend of this version; set one of {BACKENDS}")
    if forced == "array_api":
        return forced, "GAUSSMIX_BACKEND asks for it"
    obstacles = {"numpy": _numpy.why_not(x), "triton": why_not_triton(x)}
    if forced != "auto":
        if obstacles[forced] is not None:
            raise ValueError(
                f"GAUSSMIX_BACKEND={forced} can not run: {obstacles[forced]}; unset it or convert the data"
            )
        return forced, "GAUSSMIX_BACKEND asks for it"
    if obstacles["numpy"] is None:
        return "numpy", "the data is in host memory"
    if obstacles["triton"] is None:
        return "triton", "the data is on a GPU"
    return "array_api", obstacles["triton"]


def why_not_triton(x: Array) -> str | None:
    """The reason why the kernels can not run on rows of `x`; None if they can."""
    if is_torch_array(x):
        if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "the tensor is in host memory, where the kernels run with TRITON_INTERPRET=1 only, for tests"
        if x.device.type not in ("cpu", "cuda"):
            return f"the tensor is on {x.device}, not on a CUDA or ROCm device"
    elif not is_cupy_array(x):
        return f"{type(x).__module__}.{type(x).__qualname__} is neither a torch tensor nor a CuPy array"
    for package in ("torch", "triton"):
        if find_spec(package) is None:
            return f"{package} is not installed; install gaussmix[triton]"
    return None


def _implementation(name: str) -> ModuleType:
    if name == "triton":
        # Imports torch and triton, which only those who use them pay for.
        from gaussmix import _triton

        return _triton
    return {"numpy": _numpy, "array_api": _array_api}[name]
