"""EM, inference and k-means on rows that are read block by block: sums over blocks of what another engine computes.

Each block goes through the implementation that its array would have on its own, about one point of the data set and in
one form of the E-step. What comes back is exact EM: neither the blocks' sizes nor their order matter.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from operator import add, methodcaller

from gaussmix import _engine
from gaussmix._arrays import array_namespace
from gaussmix._data import Rows, Stream
from gaussmix._engine import BlockEngine, Summed
from gaussmix._parameters import Parameters, SufficientStatistics
from gaussmix._typing import Array


class Engine(Summed):
    """EM and inference on one data set for one covariance type."""

    def __init__(self, rows: Stream, on_block: BlockEngine) -> None:
        super().__init__(rows, on_block)
        # What the engine of a block found that the next pass can use; a byte or two a row.
        self._hints: dict[int, Array | None] = {}

    rows: Stream
    _last_block: BlockEngine | None = None

    @property
    def precision(self) -> str:
        """The arithmetic of the E-step of the last block; before it, of the next."""
        return (self._last_block or self._on_block).precision

    def assign(self, means: Array, origin: Array) -> SufficientStatistics:
        """Statistics about `origin` (k, d) of the rows that are nearest to each of `means` (k, d)."""
        return self._sum(methodcaller("assign", means, origin), origin)

    def spread(self, k: int, draw: Callable[[int], Array]) -> SufficientStatistics:
        """Statistics for the responsibilities (b, k), on the host, that `draw(b)` gives for the next b rows."""
        origin = array_namespace(self.rows.middle).broadcast_to(self.rows.middle, (k, self.rows.shape[1]))
        return self._sum(methodcaller("spread", k, draw), origin)

    def expect(self, parameters: Parameters) -> SufficientStatistics:
        """The E-step: statistics of all rows."""
        return self._sum(methodcaller("expect", parameters), parameters.means)

    def log_evidence(self, parameters: Parameters) -> Array:
        """Log-density of each row under the mixture: (n,)."""
        return self._concatenated(methodcaller("log_evidence", parameters))

    def mean_log_evidence(self, parameters: Parameters) -> float:
        """Mean log-density of a row under the mixture; none of them is kept."""
        total = 0.0
        for block in self._blocks():
            evidence = block.log_evidence(parameters)
            total += float(array_namespace(evidence).sum(evidence))
        return total / self.rows.shape[0]

    def responsibilities(self, parameters: Parameters) -> Array:
        """Posterior probability of each component given the row: (n, k)."""
        return self._concatenated(methodcaller("responsibilities", parameters))

    def labels(self, parameters: Parameters) -> Array:
        """The component of largest responsibility for each row: (n,)."""
        return self._concatenated(methodcaller("labels", parameters))

    def _sum(self, statistics: Callable[[BlockEngine], SufficientStatistics], origin: Array) -> SufficientStatistics:
        return reduce(add, (part.about(origin, self.covariance) for part in self._parts(statistics)))

    def _parts(self, statistics: Callable[[BlockEngine], SufficientStatistics]) -> Iterator[SufficientStatistics]:
        for number, block in enumerate(self._blocks()):
            block.hints = self._hints.get(number)
            yield statistics(block)
            self._hints[number] = block.hints

    def _concatenated(self, values: Callable[[BlockEngine], Array]) -> Array:
        return _concatenated(values(block) for block in self._blocks())

    def _blocks(self) -> Iterator[BlockEngine]:
        for rows in self.rows.blocks():
            self._last_block = self._on_block.on(rows)
            yield self._last_block


class Clusters:
    """k-means on one data set."""

    def __init__(self, rows: Stream, on_block: Callable[[Rows], _engine.Clusters]) -> None:
        self.rows, self._on_block = rows, on_block

    def labels(self, centroids: Array) -> Array:
        """The centroid nearest to each row, the first of equals: (n,)."""
        return self._concatenated(methodcaller("labels", centroids))

    def squared_distances(self, centroids: Array) -> Array:
        """Squared distance of each row, of weight 0 or not, to the nearest centroid: (n,)."""
        return self._concatenated(methodcaller("squared_distances", centroids))

    def distances(self, centroids: Array) -> Array:
        """Distance of each row to each centroid: (n, k)."""
        return self._concatenated(methodcaller("distances", centroids))

    def sums(self, centroids: Array, origin: Array) -> tuple[Array, Array]:
        """Weight of the rows that are nearest to each centroid (k,), and the sums of their x - origin (k, d)."""
        counts, sums = zip(*(self._on_block(rows).sums(centroids, origin) for rows in self.rows.blocks()), strict=True)
        return reduce(add, counts), reduce(add, sums)

    def _concatenated(self, values: Callable[[_engine.Clusters], Array]) -> Array:
        # Without weights: rows of weight 0 have distances as well.
        return _concatenated(values(self._on_block(rows)) for rows in self.rows.unweighted().blocks())


def _concatenated(parts: Iterable[Array]) -> Array:
    found = list(parts)
    return array_namespace(found[0]).concat(found)
