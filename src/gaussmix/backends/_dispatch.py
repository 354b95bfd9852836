"""Which implementation runs for given data, and why."""

import logging
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from array_api_compat import is_cupy_array, is_torch_array

from gaussmix._arrays import as_host, asarray_like, to_numpy
from gaussmix._covariance import COVARIANCES, Covariance
from gaussmix._typing import Array
from gaussmix.backends import _array_api, _numpy
from gaussmix.backends._engine import Engine
from gaussmix.rows._data import Rows, Stream
from gaussmix.rows._group import Group
from gaussmix.rows._passes import Block, InBlocks, InMemory, Passes
from gaussmix.rows._processes import InProcesses, Share, share_of
from gaussmix_kernels import _sizes

logger = logging.getLogger("gaussmix")

# What k-means would have if it were a mixture; no step of it asks.
SPHERICAL = COVARIANCES["spherical"]
BACKENDS = ("auto", "triton", "numpy", "array_api")


def engine(rows: Rows | Stream | Share, covariance: Covariance, *, level: int = logging.DEBUG) -> Engine:
    """EM for these rows in the implementation that GAUSSMIX_BACKEND asks for, or the fastest; logs why at `level`."""
    name, reason = choose(rows.like, covariance)
    logger.log(level, "%s covariance runs on %s: %s", covariance.name, name, reason)
    return _engine(rows, covariance, name)


def clusters(rows: Rows | Stream, group: Group | None = None, *, level: int = logging.DEBUG) -> Engine:
    """k-means for these rows, in the implementation that is chosen as `engine` does.

    With a `group`, all of its processes have the rows, and each takes a share of them in the sums.
    """
    name, reason = choose(rows.like)
    logger.log(level, "k-means runs on %s: %s", name, reason)
    return _engine(rows, SPHERICAL, name, group)


def _engine(rows: Any, covariance: Covariance, name: str, group: Group | None = None) -> Engine:
    make = _implementation(name).Block
    if group is not None:
        own = shareable(rows).part(share_of(rows, group))
        block, share = make(rows), make(own) if own.shape[0] else None
        passes = InProcesses(group, None if share is None else InMemory(share), InMemory(block))
        return Engine(block.rows, passes, block, covariance, is_whole=False)
    if isinstance(rows, Rows):
        block = make(rows)
        return Engine(block.rows, InMemory(block), block, covariance)
    about = partial(make, middle=rows.middle)
    like = about(Rows(rows.like))
    if isinstance(rows, Stream):
        rows = rows.mapped(to_numpy) if name == "numpy" else rows
        return Engine(rows, _in_blocks(rows, about), like, covariance, is_whole=False)
    own, share = rows.rows, None
    if rows.counts[rows.group.rank]:
        if isinstance(own, Rows):
            share = InMemory(about(own))
        else:
            share = InBlocks(own.mapped(to_numpy) if name == "numpy" else own, about)
    # Another implementation would leave a form of the E-step in another iteration.
    rows.group.compare({"the implementation": name})
    passes = InProcesses(rows.group, share, before=rows.before)
    return Engine(rows.computed(like.rows.like), passes, like, covariance, is_whole=False)


def _in_blocks(rows: Stream, make: Callable[[Rows], Block]) -> Passes:
    if type(rows) is Stream:
        return InBlocks(rows, make)
    # Imports dask, whose rows they are.
    from gaussmix.rows import _dask

    assert isinstance(rows, _dask.DaskRows)
    return _dask.InTasks(rows, make)


def distances(rows: Rows | Stream, centroids: Array) -> Array:
    """Distance of each row to each centroid: (n, k)."""
    passes: Passes
    if isinstance(rows, Rows):
        rows = Rows(as_host(rows.array), batch_size=rows.batch_size)
        passes = InMemory(_array_api.Block(rows))
    else:
        rows = rows.mapped(as_host)
        passes = InBlocks(rows, _array_api.Block)
    centroids = asarray_like(centroids, rows.like, rows.dtype)
    return passes.map(partial(_array_api.distances, centroids=centroids))


def shareable(rows: Rows | Stream | Share) -> Rows:
    """Rows that several processes can share."""
    if not isinstance(rows, Rows):
        raise TypeError(
            "several processes share the rows of an array, not of a loader or in batches; pass an array and no "
            "batch_size, or devices=1"
        )
    return rows


def choose(x: Array, covariance: Covariance | None = None) -> tuple[str, str]:
    """The name of the implementation for rows of `x`, and the reason."""
    forced = os.environ.get("GAUSSMIX_BACKEND", "auto")
    if forced not in BACKENDS:
        raise ValueError(f"GAUSSMIX_BACKEND={forced!r} is not a backend of this version; set one of {BACKENDS}")
    if forced == "array_api":
        return forced, "GAUSSMIX_BACKEND asks for it"
    obstacles = {"numpy": _numpy.why_not(x), "triton": why_not_triton(x, covariance)}
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


def why_not_triton(x: Array, covariance: Covariance | None = None) -> str | None:
    """The reason why the kernels can not run on rows of `x`, for a covariance type; None if they can."""
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
    return without_kernels(x.shape[1], None if covariance is None else covariance.name)


def without_kernels(d: int, covariance_type: str | None) -> str | None:
    """The reason why there are no kernels for d features, or a covariance type if one is given; None if there are."""
    if covariance_type is not None and find_spec(f"gaussmix_kernels.{covariance_type}") is None:
        return f"there are no kernels for covariance_type={covariance_type!r}"
    if d > _sizes.MOST_DIMENSIONS:
        return f"there are no kernels for {d} features, only for up to {_sizes.MOST_DIMENSIONS}"
    return None


def _implementation(name: str) -> ModuleType:
    if name == "triton":
        # Imports torch and triton, which only those who use them pay for.
        from gaussmix.backends import _triton

        return _triton
    return {"numpy": _numpy, "array_api": _array_api}[name]
