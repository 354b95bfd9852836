"""Passes over rows that are read block by block: sums over blocks of what an implementation finds in each of them.

Each block goes through the implementation that its array would have on its own, about one point of the data set and in
one form of the E-step. What comes back is exact EM: neither the blocks' sizes nor their order matter.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from operator import add
from typing import TypeVar

from gaussmix._arrays import array_namespace
from gaussmix._data import Rows, Stream
from gaussmix._engine import Block, Draw
from gaussmix._typing import Array

T = TypeVar("T")


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
