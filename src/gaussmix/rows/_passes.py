"""Passes over rows, in memory or block by block, and what they ask of implementations: a `Block`.

`Passes` says where rows are: here in memory and in blocks, elsewhere in Dask's tasks and in several processes. A
`Block` is rows in memory in one implementation. Neither knows of the other: a pass applies a function to each block and
adds up what it gives. That is exact EM: neither the blocks' sizes nor their order matter.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from operator import add
from typing import Protocol, TypeVar

from gaussmix._arrays import array_namespace
from gaussmix._covariance import Covariance
from gaussmix._density import Density
from gaussmix._guard import Form, Forms
from gaussmix._parameters import SufficientStatistics
from gaussmix._typing import Array
from gaussmix.rows._data import Rows, Stream

T = TypeVar("T")
# Gives responsibilities (b, k), on the host, for the next b rows.
Draw = Callable[[int], Array]


class Block(Protocol):
    """Rows in memory, in one implementation."""

    rows: Rows
    backend: str
    # What saves work in the next pass over the same rows, and is nothing but that.
    hints: Array | None

    @property
    def shift(self) -> Array:
        """The point that features are about: (d,)."""

    def floor(self) -> Array | None:
        """What squares of x - shift are at least, as far as the inexact forms can tell: (d,)."""

    def forms(self, covariance: Covariance) -> Forms:
        """The forms of the E-step, the fastest first, the most exact last."""

    def expect(self, density: Density, form: Form) -> SufficientStatistics:
        """The E-step: statistics of all rows. A log-likelihood that is not finite asks for the next form."""

    def assign(self, means: Array, origin: Array, covariance: Covariance, form: Form) -> SufficientStatistics:
        """Statistics about `origin` (k, d) of the rows that are nearest to each of `means` (k, d)."""

    def spread(self, draw: Draw, k: int, covariance: Covariance) -> SufficientStatistics:
        """Statistics for the responsibilities that `draw` gives."""

    def log_evidence(self, density: Density) -> Array:
        """Log-density of each row under the mixture: (n,)."""

    def responsibilities(self, density: Density) -> Array:
        """Posterior probability of each component given the row: (n, k)."""

    def labels(self, density: Density) -> Array:
        """The component of largest responsibility for each row: (n,)."""

    def nearest(self, centroids: Array) -> Array:
        """The centroid nearest to each row, the first of equals: (n,)."""

    def squared_distances(self, centroids: Array) -> Array:
        """Squared distance of each row, of weight 0 or not, to the nearest centroid: (n,)."""

    def sums(self, centroids: Array, origin: Array) -> Array:
        """Sums of x - origin over the rows nearest to each centroid, with their weight as last column: (k, d + 1)."""


class Passes(Protocol):
    """Rows that functions of blocks are applied to."""

    def reduce(self, step: Callable[..., T], nothing: Callable[[], T], draw: Draw | None = None) -> T:
        """The sum of `step(block)` over all blocks; `nothing()` is that of no rows. Steps are picklable.

        With `draw`, a step is given it as well; it is asked for rows in their order.
        """

    def map(self, step: Callable[[Block], Array]) -> Array:
        """`step(block)`, which has a value for each row, for all rows in their order."""


class InMemory:
    """All rows as one block."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def reduce(self, step: Callable[..., T], nothing: Callable[[], T], draw: Draw | None = None) -> T:
        """The step itself."""
        return step(self.block) if draw is None else step(self.block, draw)

    def map(self, step: Callable[[Block], Array]) -> Array:
        """The step itself."""
        return step(self.block)


class InBlocks:
    """The blocks of a stream, one after the other."""

    def __init__(self, rows: Stream, make: Callable[[Rows], Block]) -> None:
        self._rows, self._make = rows, make
        # What a block found that the next pass can use; a byte or two a row.
        self._hints: dict[int, Array | None] = {}

    def reduce(self, step: Callable[..., T], nothing: Callable[[], T], draw: Draw | None = None) -> T:
        """The sum of `step(block)` over all blocks."""
        args = () if draw is None else (draw,)
        found: Iterator[T] = (step(block, *args) for block in self._blocks())
        return reduce(add, found)

    def map(self, step: Callable[[Block], Array]) -> Array:
        """`step(block)` for all rows, of weight 0 or not."""
        found = [step(self._make(rows)) for rows in self._rows.unweighted().blocks()]
        return array_namespace(found[0]).concat(found)

    def _blocks(self) -> Iterator[Block]:
        for number, rows in enumerate(self._rows.blocks()):
            block = self._make(rows)
            block.hints = self._hints.get(number)
            yield block
            self._hints[number] = block.hints
