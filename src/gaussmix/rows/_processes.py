"""EM in several processes that each take a share of the rows: one sum over all of them in an iteration.

Processes and their communication are torch.distributed's; Lightning Fabric launches them where `trainer_params` asks
for several devices. Every process takes the same decisions, since all see the same sums.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from sklearn.utils.random import sample_without_replacement

from gaussmix._arrays import asarray_like, to_numpy, working_dtype
from gaussmix._parameters import CENTRED_PRECISION, SufficientStatistics
from gaussmix._typing import Array, DType
from gaussmix.rows._data import Rows, Stream, slices
from gaussmix.rows._group import Group
from gaussmix.rows._passes import Block, Draw, Passes

T = TypeVar("T")
# Rows of a block that is only looked at.
BLOCK_ROWS = 2**13


@dataclass(frozen=True)
class Share:
    """A process's rows of a data set that lies in several: one process's after the other's, in the order of ranks.

    What is said of the rows, apart from `rows`, is said of all of them, and is the same in every process.
    """

    rows: Rows | Stream
    group: Group
    counts: tuple[int, ...]  # rows of positive weight in each process
    shape: tuple[int, int]
    like: Array
    middle: Array  # (d,)

    @classmethod
    def of(cls, rows: Rows | Stream, group: Group) -> "Share":
        """The share that these rows are."""
        if type(rows) not in (Rows, Stream):
            raise TypeError("a Dask array has workers of its own; pass distributed=None, or this process's rows")
        (n, d), like = rows.shape, rows.like
        group.compare({"the number of features": d, "the dtype of X": str(like.dtype).rpartition(".")[2]})
        weight = rows.sample_weight
        own = n if weight is None else int(np.count_nonzero(to_numpy(weight) > 0))
        total = float(n) if weight is None else float(to_numpy(weight).sum(dtype=np.float64))
        middle = total * to_numpy(rows.mean(BLOCK_ROWS)) if own else np.zeros(d)
        counts, middle = group.sum(np.array([n, total]), middle)
        return cls(
            rows,
            group,
            tuple(group.each(own)),
            (int(counts[0]), d),
            like,
            asarray_like(middle / (counts[1] or 1), like, working_dtype(like)),
        )

    def computed(self, like: Array) -> "Share":
        """The same in the library that computes."""
        return replace(self, like=like, middle=asarray_like(self.middle, like, working_dtype(like)))

    @property
    def dtype(self) -> DType:
        """The dtype that sums are in."""
        return working_dtype(self.like)

    @property
    def n_positive(self) -> int:
        """Number of rows of positive weight."""
        return sum(self.counts)

    @property
    def before(self) -> int:
        """How many rows of positive weight the processes before this one have."""
        return sum(self.counts[: self.group.rank])

    def fingerprint(self) -> int:
        """What `fingerprint` makes of the rows and weights of all processes."""
        return sum(self.group.each(self.rows.fingerprint())) % 2**64

    def mean(self, size: int) -> Array:
        """Weighted mean of the rows: (d,), in the working dtype."""
        return self.middle

    def sample(self, size: int, random_state: np.random.RandomState) -> Rows:
        """As `Rows.sample`: the rows that a single process would draw, in every process."""
        chosen = np.arange(self.n_positive)
        if chosen.size > size:
            chosen = np.sort(sample_without_replacement(chosen.size, size, random_state=random_state))
        own = self.counts[self.group.rank]
        here = chosen[(chosen >= self.before) & (chosen < self.before + own)] - self.before
        weight = self.rows.sample_weight
        if weight is not None:
            weight = to_numpy(weight).astype(np.float64)
            here = np.flatnonzero(weight)[here]
            weight = weight[here]
        found = self.rows.take(here) if here.size else np.empty((0, self.shape[1]))
        parts = self.group.each((found, weight))
        weights = [part for _, part in parts if part is not None]
        return Rows(np.concatenate([part for part, _ in parts]), np.concatenate(weights) if weights else None)


class InProcesses:
    """Rows of which every process has a share, and takes it in the sums."""

    def __init__(self, group: Group, share: Passes | None, everything: Passes | None = None, before: int = 0) -> None:
        # `share` is None in a process without rows. `before` rows are those of the processes before this one.
        self._group, self._share, self._everything, self._before = group, share, everything, before

    def reduce(self, step: Callable[..., T], nothing: Callable[[], T], draw: Draw | None = None) -> T:
        """The sum of `step(block)` over the blocks of all processes."""
        if draw is not None:
            for part in slices(self._before, BLOCK_ROWS):
                draw(part.stop - part.start)  # those of other processes' rows
        own: Any = nothing() if self._share is None else self._share.reduce(step, nothing, draw)
        if not isinstance(own, SufficientStatistics):
            (total,) = self._group.sum(to_numpy(own))
            return asarray_like(total, own)
        # What is exact in all processes is so in the sum.
        inexact = np.array(self._share is not None and own.precision != CENTRED_PRECISION, dtype=np.float64)
        *summed, inexact = self._group.sum(*map(to_numpy, own.sums), inexact)
        found: Any = own.summed(asarray_like(value, own.origin) for value in summed)
        return replace(found, precision="" if inexact else CENTRED_PRECISION)

    def map(self, step: Callable[[Block], Array]) -> Array:
        """`step(block)` for all rows, where every process has them."""
        assert self._everything is not None
        return self._everything.map(step)


def share_of(rows: Rows, group: Group) -> slice:
    """The rows that are this process's."""
    n = rows.shape[0]
    return slice(n * group.rank // group.size, n * (group.rank + 1) // group.size)
