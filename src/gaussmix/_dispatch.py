"""Which implementation runs for given data, and why."""

import logging
import os
from importlib.util import find_spec
from types import ModuleType
from typing import overload

from array_api_compat import is_cupy_array, is_torch_array

from gaussmix import _array_api, _distributed, _numpy, _streaming
from gaussmix._arrays import to_numpy
from gaussmix._covariance import Covariance
from gaussmix._data import Rows, Stream
from gaussmix._distributed import Group, Share
from gaussmix._engine import Clusters, Engine, Fitting
from gaussmix._typing import Array

logger = logging.getLogger("gaussmix")

BACKENDS = ("auto", "triton", "numpy", "array_api")


@overload
def engine(rows: Rows | Stream, covariance: Covariance, reg_covar: float = 0.0, *, level: int = ...) -> Engine: ...
@overload
def engine(
    rows: Rows | Stream | Share, covariance: Covariance, reg_covar: float = 0.0, *, level: int = ...
) -> Fitting: ...
def engine(
    rows: Rows | Stream | Share, covariance: Covariance, reg_covar: float = 0.0, *, level: int = logging.DEBUG
) -> Fitting:
    """The implementation for these rows, as the environment variable GAUSSMIX_BACKEND has it; fits log why at INFO."""
    name, reason = choose(rows.like)
    logger.log(level, "%s covariance runs on %s: %s", covariance.name, name, reason)
    make = _implementation(name).Engine
    if isinstance(rows, Rows):
        in_memory: Engine = make(rows, covariance, reg_covar)
        return in_memory
    on_block = make(Rows(rows.like), covariance, reg_covar, rows.middle)
    if isinstance(rows, Stream):
        summed: Fitting = _summing(rows).Engine(_streamed(rows, name), on_block)
        return summed
    own = rows.rows
    on_share = on_block.on(own) if isinstance(own, Rows) else _streaming.Engine(_streamed(own, name), on_block)
    return _distributed.Engine(rows.computed(on_block.rows.like), on_block, on_share)


def clusters(rows: Rows | Stream, group: Group | None = None, *, level: int = logging.DEBUG) -> Clusters:
    """The implementation of k-means for these rows, chosen as `engine` does."""
    name, reason = choose(rows.like)
    logger.log(level, "k-means runs on %s: %s", name, reason)
    make = _implementation(name).Clusters
    if group is not None:
        return _distributed.Clusters(shareable(rows), make, group)
    if isinstance(rows, Rows):
        in_memory: Clusters = make(rows)
        return in_memory
    summed: Clusters = _summing(rows).Clusters(_streamed(rows, name), make)
    return summed


def distances(rows: Rows | Stream, centroids: Array) -> Array:
    """Distance of each row to each centroid: (n, k)."""
    if isinstance(rows, Rows):
        return _array_api.Clusters(rows).distances(centroids)
    return _streaming.Clusters(rows, _array_api.Clusters).distances(centroids)


def shareable(rows: Rows | Stream) -> Rows:
    """Rows that several processes can share."""
    if isinstance(rows, Stream):
        raise TypeError(
            "several processes share the rows of an array, not of a loader or in batches; pass an array and no "
            "batch_size, or devices=1"
        )
    return rows


def _streamed(rows: Stream, name: str) -> Stream:
    """The rows in the library that computes."""
    return rows.mapped(to_numpy) if name == "numpy" else rows


def _summing(rows: Stream) -> ModuleType:
    """What adds up statistics of blocks."""
    if type(rows) is Stream:
        return _streaming
    # Imports dask, whose rows they are.
    from gaussmix import _dask

    return _dask


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
