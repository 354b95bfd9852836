"""The rows of a data set, read block by block."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import numpy as np
from array_api_compat import is_cupy_array, is_torch_array
from sklearn.utils.random import sample_without_replacement

from gaussmix._arrays import array_namespace, as_host, asarray_like, device, floating_dtype, to_numpy, working_dtype
from gaussmix._typing import Array, DType

Mapping = Callable[[Callable[[Array], Array], Iterable[Array]], Iterable[Array]]

# Rows of a block of the fingerprint.
PRINTED_ROWS = 2**15
# Odd factors that spread bits over a word of 64, and the bits by which one row in 16 is chosen.
SPREAD, MIX, SOME = -7046029254386353131, -4658895280553007687, 15 << 58


def slices(n: int, size: int) -> Iterator[slice]:
    """0 .. n in slices of `size`, the last one shorter."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def fingerprint(x: Array, weight: Array | None = None) -> int:
    """A number, modulo 2^64, that the rows (n, d) and their weights (n,) make, in whatever order and library they are.

    Those of blocks of rows add to that of all. It is for finding out that data is not the same: no protection against
    somebody who wants two data sets to have the same.
    """
    x = array_namespace(x).astype(x, floating_dtype(x), copy=False)
    is_on_gpu = is_cupy_array(x) or (is_torch_array(x) and x.device.type != "cpu")
    x = x if is_on_gpu else to_numpy(x)
    parts = slices(x.shape[0], PRINTED_ROWS)
    return sum(_fingerprint(x[part, :], None if weight is None else weight[part]) for part in parts) % 2**64


def _fingerprint(x: Array, weight: Array | None) -> int:
    xp = array_namespace(x)
    bits = x.view(xp.int32 if x.dtype == xp.float32 else xp.int64)
    factors = _factors(x.shape[1])
    hashes = np.multiply(_products(bits, factors), SPREAD, dtype=np.int64)
    if weight is not None:
        hashes += to_numpy(weight).astype(np.float64).view(np.int64) * MIX
    hashes ^= hashes >> 32
    hashes *= MIX
    # A sum of products has of the highest bits, the signs, only whether their number is odd: some rows tell it all.
    some = np.flatnonzero(hashes & SOME == 0)
    signs = xp.astype(bits[xp.asarray(some, device=device(x)), :] < 0, xp.uint8)
    hashes[some] += np.multiply(_products(signs, factors), SPREAD, dtype=np.int64)
    return int(hashes.sum())


def _products(values: Array, factors: Array) -> Array:
    """Sums of values x factors for each row (n,), on the host, in the integers of the values, which wrap around."""
    xp = array_namespace(values)
    if isinstance(values, np.ndarray):  # at the speed of memory, and without an array of the size of the values
        if values.shape[1] < 6:  # rows too short for a loop of their own
            values = np.asfortranarray(values)
        return np.einsum("ij,j->i", values, factors.astype(values.dtype))
    factors = xp.astype(xp.asarray(factors, device=device(values)), values.dtype)
    return to_numpy(xp.sum(values * factors, axis=1, dtype=values.dtype))


@cache
def _factors(d: int) -> Array:
    """Odd numbers (d,), of which each column of rows is multiplied by one before they are added."""
    return np.random.RandomState(0).randint(2**30, size=d, dtype=np.int64) * 2 + 1


class Described(Protocol):
    """What is known of a data set wherever its rows are, and what a start looks at."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""

    @property
    def like(self) -> Array:
        """An array of the library, the device and the dtype of the data."""

    @property
    def dtype(self) -> DType:
        """The dtype that sums are in."""

    @property
    def n_positive(self) -> int:
        """Number of rows of positive weight: those that count."""

    def fingerprint(self) -> int:
        """What `fingerprint` makes of all rows and weights, as they came."""

    def sample(self, size: int, random_state: np.random.RandomState) -> "Rows":
        """At most `size` rows of positive weight, without replacement, in float64 on the host."""


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
    def like(self) -> Array:
        """An array of the library, the device and the dtype of the data."""
        return self.array

    @property
    def n_positive(self) -> int:
        """Number of rows of positive weight: those that count."""
        return self.shape[0] if self.sample_weight is None else int(np.count_nonzero(to_numpy(self.sample_weight) > 0))

    @property
    def dtype(self) -> DType:
        """The dtype of the blocks."""
        return working_dtype(self.array)

    def fingerprint(self) -> int:
        """What `fingerprint` makes of all rows and weights."""
        return fingerprint(self.array, self.sample_weight)

    def blocks(self, size: int) -> Iterator[tuple[Array, Array | None]]:
        """Blocks of at most `size` rows in the working dtype, in order, with their weights.

        Rows of weight 0 are left out: they are no part of the data set, down to the random numbers drawn for it.
        """
        xp, dtype = array_namespace(self.array), self.dtype
        size = max(1, size if self.batch_size is None else min(size, self.batch_size))
        for block in slices(self.shape[0], size):
            x = xp.astype(self.array[block, :], dtype, copy=False)
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

    def part(self, rows: slice) -> "Rows":
        """Some of the rows."""
        weight = None if self.sample_weight is None else self.sample_weight[rows]
        return Rows(self.array[rows, :], weight, self.batch_size)

    def mapped(self, function: Callable[[Array], Array]) -> "Rows | Stream":
        """`function` of the rows: another library, device or dtype; block by block where a batch size is given."""
        if self.batch_size is not None:
            return self.in_blocks(self.batch_size).mapped(function)
        array, weight = function(self.array), self.sample_weight
        return Rows(array, None if weight is None else asarray_like(weight, array, working_dtype(array)))

    def in_blocks(self, size: int) -> "Stream":
        """The same rows, so many at a time."""

        def read() -> Iterator[Array]:
            return (self.array[block, :] for block in slices(self.shape[0], size))

        like = self.array[: min(size, self.shape[0]), :]
        return Stream(read, self.shape, like, self.mean(size), self.fingerprint, self.sample_weight)

    def take(self, indices: Array) -> Array:
        """The rows of these increasing `indices`, in float64 on the host: (m, d)."""
        rows = as_host(self.array)
        xp = array_namespace(rows)
        if len(indices) != self.shape[0]:
            rows = xp.take(rows, xp.asarray(indices, device=device(rows)), axis=0)
        return to_numpy(xp.astype(rows, working_dtype(rows), copy=False)).astype(np.float64, copy=False)

    def average(self, values: Array) -> float:
        """Weighted mean of a value for each row (n,)."""
        return _average(self, values)

    def largest(self, values: Array, m: int) -> tuple[Array, Array]:
        """Where the m largest values (n,) of rows of positive weight are, on the host, and those values.

        The first of equals come first; rows without weight count as 0.
        """
        return _largest(self, values, m)

    def sample(self, size: int, random_state: np.random.RandomState) -> "Rows":
        """At most `size` rows of positive weight, without replacement, in float64 on the host.

        The rows that are drawn depend on `random_state` and on their number alone, not on the library.
        """
        return _sample(self, size, random_state)


@dataclass(frozen=True)
class Stream:
    """Rows that are never all in memory: `read` gives them anew in each pass, as blocks in one library.

    Everything else is what the first pass found. The rows are finite and the same in each pass, or `read` raises.
    """

    read: Callable[[], Iterable[Array]]
    shape: tuple[int, int]
    like: Array  # some rows
    middle: Array  # (d,): weighted mean of the rows, in the working dtype
    fingerprint: Callable[[], int]  # of all rows and weights, as they came
    sample_weight: Array | None = None  # (n,), in the working dtype

    @property
    def n_positive(self) -> int:
        """Number of rows of positive weight: those that count."""
        return self.shape[0] if self.sample_weight is None else int(np.count_nonzero(to_numpy(self.sample_weight) > 0))

    @property
    def dtype(self) -> DType:
        """The dtype that sums are in."""
        return working_dtype(self.like)

    def blocks(self) -> Iterator[Rows]:
        """The blocks in order, with their weights; those without rows, or whose weights are all 0, are left out."""
        n = 0
        for x in self.read():
            part = slice(n, n + x.shape[0])
            n = part.stop
            weight = None if self.sample_weight is None else self.sample_weight[part]
            if x.shape[0] and (weight is None or bool(array_namespace(weight).any(weight > 0))):
                yield Rows(x, weight)

    def mapped(self, function: Callable[[Array], Array], mapping: Mapping = map) -> "Stream":
        """`function` of each block: another library, device or dtype; `mapping` applies it to blocks as `map` does."""
        like = function(self.like)
        middle, weight = (
            None if value is None else asarray_like(value, like, working_dtype(like))
            for value in (self.middle, self.sample_weight)
        )
        return Stream(lambda: mapping(function, self.read()), self.shape, like, middle, self.fingerprint, weight)

    def watched(self, watch: Callable[[int], None]) -> "Stream":
        """The same rows; `watch` sees how many a block has once it was worked on."""

        def read() -> Iterator[Array]:
            for x in self.read():
                yield x
                watch(x.shape[0])

        return replace(self, read=read)

    def unweighted(self) -> "Stream":
        """The same rows without weights."""
        return self if self.sample_weight is None else replace(self, sample_weight=None)

    def mean(self, size: int) -> Array:
        """Weighted mean of the rows: (d,), in the working dtype."""
        return self.middle

    def take(self, indices: Array) -> Array:
        """The rows of these increasing `indices`, in float64 on the host: (m, d)."""
        found, start = [], 0
        for rows in self.unweighted().blocks():
            stop = start + rows.shape[0]
            here = indices[np.searchsorted(indices, start) : np.searchsorted(indices, stop)] - start
            if here.size:
                found.append(rows.take(here))
            start = stop
        return np.concatenate(found) if found else np.empty((0, self.shape[1]))

    def average(self, values: Array) -> float:
        """Weighted mean of a value for each row (n,)."""
        return _average(self, values)

    def largest(self, values: Array, m: int) -> tuple[Array, Array]:
        """As `Rows.largest`."""
        return _largest(self, values, m)

    def sample(self, size: int, random_state: np.random.RandomState) -> Rows:
        """As `Rows.sample`: the same rows where the data is the same."""
        return _sample(self, size, random_state)


def _average(rows: Rows | Stream, values: Array) -> float:
    xp, weight = array_namespace(values), rows.sample_weight
    return float(xp.mean(values) if weight is None else xp.sum(weight * values) / xp.sum(weight))


def _largest(rows: Rows | Stream, values: Array, m: int) -> tuple[Array, Array]:
    xp = array_namespace(values)
    if rows.sample_weight is not None:
        values = xp.where(rows.sample_weight > 0, values, 0)
    order = to_numpy(xp.argsort(values, descending=True, stable=True)[:m])
    return order, to_numpy(values)[order]


def _sample(rows: Rows | Stream, size: int, random_state: np.random.RandomState) -> Rows:
    weight = None if rows.sample_weight is None else to_numpy(rows.sample_weight).astype(np.float64)
    candidates = np.arange(rows.shape[0]) if weight is None else np.flatnonzero(weight)
    if candidates.size > size:
        drawn = sample_without_replacement(candidates.size, size, random_state=random_state)
        candidates = candidates[np.sort(drawn)]
    return Rows(rows.take(candidates), None if weight is None else weight[candidates])
