"""The rows of a data set, read block by block."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.utils.random import sample_without_replacement

from gaussmix._arrays import array_namespace, device, to_numpy, working_dtype
from gaussmix._typing import Array, DType


def slices(n: int, size: int) -> Iterator[slice]:
    """0 .. n in slices of `size`, the last one shorter."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


@dataclass(frozen=True)
class Rows:
    """n rows of d features, each with a weight; validated, finite and left where they are.

    `batch_size` bounds how many rows are read at a time; results do not depend on it.
    """

    array: Array  # (n, d)
    sample_weight: Array | None = None  # (n,), in the working dtype
    batch_size: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n, d = self.array.shape
        return n, d

    @property
    def dtype(self) -> DType:
        """The dtype of the blocks."""
        return working_dtype(self.array)

    def blocks(self, size: int) -> Iterator[tuple[Array, Array | None]]:
        """Blocks of at most `size` rows in the working dtype, in order, with their weights.

        Rows of weight 0 are left out: they are no part of the data set, down to the random numbers drawn for it.
        """
        xp, dtype = array_namespace(self.array), self.dtype
        size = max(1, size if self.batch_size is None else min(size, self.batch_size))
        for block in slices(self.shape[0], size):
            # asarray: a block of np.memmap is an ordinary array from here on.
            x = xp.astype(xp.asarray(self.array[block, :]), dtype, copy=False)
            if self.sample_weight is None:
                yield x, None
                continue
            weight = self.sample_weight[block]
            positive = weight > 0
            if not bool(xp.all(positive)):
                x, weight = x[positive], weight[positive]
            if x.shape[0]:
                yield x, weight

    def mean(self, size: int) -> Array:
        """Weighted mean of the rows: (d,), in the working dtype."""
        xp = array_namespace(self.array)
        total = xp.zeros(self.shape[1], dtype=self.dtype, device=device(self.array))
        for x, weight in self.blocks(size):
            total = total + xp.sum(x if weight is None else weight[:, None] * x, axis=0)
        return total / (self.shape[0] if self.sample_weight is None else xp.sum(self.sample_weight))

    def sample(self, size: int, random_state: np.random.RandomState) -> "Rows":
        """At most `size` rows of positive weight, without replacement, in float64 on the host.

        The rows that are drawn depend on `random_state` and on their number alone, not on the library.
        """
        xp = array_namespace(self.array)
        n = self.shape[0]
        weight = None if self.sample_weight is None else to_numpy(self.sample_weight).astype(np.float64)
        candidates = np.arange(n) if weight is None else np.flatnonzero(weight)
        if candidates.size > size:
            drawn = sample_without_replacement(candidates.size, size, random_state=random_state)
            candidates = candidates[np.sort(drawn)]
        if candidates.size == n:
            rows = xp.asarray(self.array)
        else:
            rows = xp.take(self.array, xp.asarray(candidates, device=device(self.array)), axis=0)
        rows = to_numpy(xp.astype(rows, self.dtype, copy=False)).astype(np.float64, copy=False)
        return Rows(rows, None if weight is None else weight[candidates])
