"""EM in several processes that each take a share of the rows: one sum over all of them in an iteration.

Processes and their communication are torch.distributed's; Lightning Fabric launches them where `trainer_params` asks
for several devices. Every process takes the same decisions, since all see the same sums.
"""

import atexit
import os
import pickle
from collections.abc import Callable
from functools import partial
from multiprocessing import parent_process
from typing import Any, TypeVar

import numpy as np

from gaussmix import _engine
from gaussmix._arrays import array_namespace, asarray_like, to_numpy
from gaussmix._data import Rows
from gaussmix._engine import BlockEngine, Summed
from gaussmix._parameters import Parameters, SufficientStatistics
from gaussmix._typing import Array

T = TypeVar("T")

# What is summed over processes, packed into one vector.
SUMS = ("counts", "first_moments", "second_moments", "log_likelihood")
# Rows of a block that is only looked at.
BLOCK_ROWS = 2**13


class Group:
    """The processes of torch's default process group."""

    def __init__(self, device: str = "cpu") -> None:
        import torch

        self._torch, self._dist, self.device = torch, torch.distributed, device
        self.rank, self.size = self._dist.get_rank(), self._dist.get_world_size()

    def sum(self, values: Array) -> Array:
        """The sum of all processes' values, float64 on the host: the same bits in each of them."""
        vector = self._torch.as_tensor(values, device=self.device)
        self._dist.all_reduce(vector)
        return vector.cpu().numpy()

    def from_first(self, value: T) -> T:
        """What the first process has."""
        box = [value]
        self._dist.broadcast_object_list(box, src=0, device=self._torch.device(self.device))
        return box[0]


class Engine(Summed):
    """EM on rows that every process has, of which each takes a share in the E-step."""

    rows: Rows

    def __init__(self, on_block: BlockEngine, group: Group) -> None:
        super().__init__(on_block.rows, on_block)
        self._group = group
        own = share_of(self.rows, group)
        share, self._first = self.rows.part(own), own.start
        self._has_rows = any(True for _ in share.blocks(BLOCK_ROWS))
        self._share = on_block.on(share)

    def assign(self, means: Array) -> SufficientStatistics:
        """Statistics of the rows that are nearest to each of `means` (k, d)."""
        return self._sum(lambda: self._share.assign(means), means)

    def spread(self, k: int, draw: Callable[[int], Array]) -> SufficientStatistics:
        """Statistics for the responsibilities (b, k), on the host, that `draw(b)` gives for the next b rows."""
        for x, _ in self.rows.part(slice(0, self._first)).blocks(BLOCK_ROWS):
            draw(x.shape[0])  # those of other processes' rows
        middle = self.rows.mean(BLOCK_ROWS)
        origin = array_namespace(middle).broadcast_to(middle, (k, self.rows.shape[1]))
        return self._sum(lambda: self._share.spread(k, draw), origin)

    def expect(self, parameters: Parameters) -> SufficientStatistics:
        """The E-step: statistics of all rows."""
        return self._sum(lambda: self._share.expect(parameters), parameters.means)

    def _sum(self, statistics: Callable[[], SufficientStatistics], origin: Array) -> SufficientStatistics:
        own = statistics().about(origin, self.covariance) if self._has_rows else self._nothing(origin)
        values = [to_numpy(getattr(own, name)) for name in SUMS]
        total = self._group.sum(np.concatenate([value.astype(np.float64).ravel() for value in values]))
        parts = np.split(total, np.cumsum([value.size for value in values])[:-1])
        summed = (part.reshape(value.shape) for part, value in zip(parts, values, strict=True))
        return SufficientStatistics(origin, *(asarray_like(value, origin) for value in summed))

    def _nothing(self, origin: Array) -> SufficientStatistics:
        k, d = origin.shape
        zeros = (np.zeros(shape) for shape in ((k,), (k, d), self.covariance.shape(k, d), ()))
        return SufficientStatistics(origin, *zeros)


class Clusters:
    """k-means on rows that every process has, of which each takes a share in the sums."""

    def __init__(self, rows: Rows, make: Callable[[Rows], _engine.Clusters], group: Group) -> None:
        self._all, self._group = make(rows), group
        self.rows = self._all.rows
        share = rows.part(share_of(rows, group))
        self._share = make(share) if share.shape[0] else None

    def labels(self, centroids: Array) -> Array:
        """The centroid nearest to each row, the first of equals: (n,)."""
        return self._all.labels(centroids)

    def squared_distances(self, centroids: Array) -> Array:
        """Squared distance of each row, of weight 0 or not, to the nearest centroid: (n,)."""
        return self._all.squared_distances(centroids)

    def sums(self, centroids: Array, origin: Array) -> tuple[Array, Array]:
        """Weight of the rows that are nearest to each centroid (k,), and the sums of their x - origin (k, d)."""
        k, d = centroids.shape
        own = np.zeros((k, d + 1))
        if self._share is not None:
            counts, sums = self._share.sums(centroids, origin)
            own[:, d], own[:, :d] = to_numpy(counts), to_numpy(sums)
        total = self._group.sum(own)
        return asarray_like(total[:, d], centroids), asarray_like(total[:, :d], centroids)


def share_of(rows: Rows, group: Group) -> slice:
    """The rows that are this process's."""
    n = rows.shape[0]
    return slice(n * group.rank // group.size, n * (group.rank + 1) // group.size)


def launch(fabric_params: dict[str, Any], function: Callable[[Group], T]) -> T:
    """`function` in every process that Lightning Fabric makes of these parameters."""
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise ImportError(
            "trainer_params asks for several processes, which Lightning Fabric launches; install gaussmix[lightning]"
        ) from error
    if "devices" not in fabric_params and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Under torchrun, Fabric would take each process for the only one.
        fabric_params = fabric_params | {"devices": int(os.environ["LOCAL_WORLD_SIZE"])}
    import torch.distributed

    call = partial(_in_group, function=function, is_own=not torch.distributed.is_initialized())
    # Lightning takes apart what travels between processes and refuses frozen dataclasses: it gets a callable and bytes.
    found: T = pickle.loads(Fabric(**fabric_params).launch(call))
    return found


def _in_group(fabric: Any, function: Callable[[Group], Any], is_own: bool) -> bytes:
    import torch.distributed

    if not torch.distributed.is_initialized():
        raise ValueError(
            f"trainer_params started a single process with strategy {type(fabric.strategy).__name__}; pass devices of "
            "at least 2, or strategy='ddp'"
        )
    # A process that ends with its group may abort. One that goes on keeps it: a process that is ahead of the others in
    # leaving it and making another would meet them in the old one.
    is_spawned = parent_process() is not None
    if is_own and not is_spawned:
        atexit.register(_leave)
    try:
        return pickle.dumps(function(Group(str(fabric.device))))
    finally:
        if is_own and is_spawned:
            _leave()


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
