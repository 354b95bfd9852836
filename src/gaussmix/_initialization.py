"""Where EM and k-means start: seeds, Lloyd's iterations on a sample, responsibilities for all rows.

Seeds and centroids are found in float64 on the host, from a sample of the rows that depends on the random state alone:
the same random state gives the same start whatever library holds the data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import kmeans_plusplus

from gaussmix._array_api import nearest, one_hot
from gaussmix._arrays import array_namespace, asarray_like, device
from gaussmix._data import Rows
from gaussmix._engine import Engine
from gaussmix._parameters import Parameters
from gaussmix._typing import Array

# Centroids of a sample of m rows have an inertia about k / m above those of all rows: under half a percent.
SAMPLE_ROWS = 2**14
SAMPLE_ROWS_PER_COMPONENT = 256

# Elements of the (rows, k) and (rows, d) arrays of a block of k-means.
BLOCK_ELEMENTS = 2**18


def initialize(
    engine: Engine, k: int, strategy: str, random_state: np.random.RandomState, means: Array | None = None
) -> Parameters:
    """Parameters that EM starts from, for the rows of the engine.

    Given `means` (k, d), or those that `strategy` finds, are handled as if k-means had found them: each row belongs to
    the nearest. "random" draws the responsibilities of each row instead.
    """
    if means is None and strategy == "random":

        def draw(n: int) -> Array:
            drawn = random_state.uniform(size=(n, k))
            return drawn / drawn.sum(axis=1, keepdims=True)

        return engine.from_responsibilities(k, draw)
    rows = engine.rows
    if means is None:
        means = find_means(rows, k, strategy, random_state)
    return engine.from_means(asarray_like(means, rows.array, rows.dtype))


def find_means(rows: Rows, k: int, strategy: str, random_state: np.random.RandomState) -> Array:
    """Means (k, d) in float64 on the host, by "kmeans", "kmeans++" or "random_from_data"."""
    sample = rows.sample(max(SAMPLE_ROWS, SAMPLE_ROWS_PER_COMPONENT * k), random_state)
    seeds = SEEDS["random" if strategy == "random_from_data" else "kmeans++"](sample, k, random_state)
    if strategy != "kmeans":
        return seeds
    return lloyd(sample, seeds, tolerance=1e-4, max_iter=300).centroids


def _seed_kmeans_plusplus(sample: Rows, k: int, random_state: np.random.RandomState) -> Array:
    # Distances are expanded there: about the middle of the rows they keep their digits.
    centred = sample.array - sample.array.mean(axis=0)
    _, chosen = kmeans_plusplus(centred, k, sample_weight=sample.sample_weight, random_state=random_state)
    return sample.array[chosen]


def _seed_random(sample: Rows, k: int, random_state: np.random.RandomState) -> Array:
    return sample.array[random_state.choice(sample.shape[0], k, replace=False)]


SEEDS: dict[str, Callable[[Rows, int, np.random.RandomState], Array]] = {
    "kmeans++": _seed_kmeans_plusplus,
    "random": _seed_random,
}


@dataclass(frozen=True)
class KMeansResult:
    """Where Lloyd's iterations ended."""

    centroids: Array  # (k, d)
    converged: bool
    n_iter: int


def lloyd(rows: Rows, centroids: Array, *, tolerance: float, max_iter: int) -> KMeansResult:
    """k-means from these centroids (k, d), until they move by at most `tolerance` x the mean variance of a feature.

    The movement is the Frobenius norm over all centroids. A cluster without rows moves to the row that is farthest from
    its own centroid.
    """
    xp = array_namespace(centroids)
    size = block_size(*centroids.shape)
    middle = rows.mean(size)
    variance = sum(_weighted_sum((x - middle) ** 2, weight) for x, weight in rows.blocks(size)) / rows.shape[1]
    threshold = tolerance * float(variance / _total_weight(rows))
    for n_iter in range(1, max_iter + 1):
        moved = _update(rows, centroids, middle, size)
        shift = float(xp.linalg.vector_norm(moved - centroids))
        centroids = moved
        if shift <= threshold:
            return KMeansResult(centroids, True, n_iter)
    return KMeansResult(centroids, False, max_iter)


def squared_distances(x: Array, centroids: Array) -> Array:
    """Squared distance of each row to the nearest centroid: (n,)."""
    xp = array_namespace(x)
    offset = x - xp.take(centroids, nearest(x, centroids), axis=0)
    return xp.sum(offset * offset, axis=1)


def distances(x: Array, centroids: Array) -> Array:
    """Euclidean distance of each row to each centroid: (n, k)."""
    return array_namespace(x).linalg.vector_norm(x[:, None, :] - centroids[None, :, :], axis=2)


def block_size(k: int, d: int) -> int:
    """Rows of a block of k-means."""
    return max(1, BLOCK_ELEMENTS // (k + d))


def _update(rows: Rows, centroids: Array, middle: Array, size: int) -> Array:
    """One iteration of Lloyd's: the mean of the rows nearest to each centroid."""
    xp = array_namespace(centroids)
    k = centroids.shape[0]
    counts, sums = xp.zeros_like(centroids[:, 0]), xp.zeros_like(centroids)
    for x, weight in rows.blocks(size):
        assigned = xp.matrix_transpose(one_hot(nearest(x, centroids), x, k))
        if weight is not None:
            assigned = assigned * weight
        counts = counts + xp.sum(assigned, axis=1)
        sums = sums + xp.matmul(assigned, x - middle)
    empty = counts == 0
    moved = xp.where(empty[:, None], centroids, middle + sums / xp.where(empty, 1, counts)[:, None])
    n_empty = int(xp.sum(xp.astype(empty, xp.int64)))
    return _reseeded(rows, moved, empty, n_empty, size) if n_empty else moved


def _reseeded(rows: Rows, centroids: Array, empty: Array, n_empty: int, size: int) -> Array:
    """Empty clusters moved to the rows farthest from all centroids; unmoved where every row lies on one."""
    xp = array_namespace(centroids)
    distances = xp.zeros(0, dtype=centroids.dtype, device=device(centroids))
    farthest = centroids[:0, :]
    for x, _ in rows.blocks(size):
        distances = xp.concat([distances, squared_distances(x, centroids)])
        farthest = xp.concat([farthest, x])
        order = xp.argsort(distances, descending=True, stable=True)
        order = order[: min(n_empty, order.shape[0])]
        distances, farthest = xp.take(distances, order), xp.take(farthest, order, axis=0)
    # The i-th empty cluster takes the i-th farthest row.
    rank = xp.cumulative_sum(xp.astype(empty, xp.int64)) - 1
    rank = xp.where(empty, rank, 0)
    use = empty & (xp.take(distances, rank) > 0)
    return xp.where(use[:, None], xp.take(farthest, rank, axis=0), centroids)


def _weighted_sum(values: Array, weight: Array | None) -> Array:
    xp = array_namespace(values)
    return xp.sum(values if weight is None else weight[:, None] * values)


def _total_weight(rows: Rows) -> float:
    return float(rows.shape[0] if rows.sample_weight is None else array_namespace(rows.array).sum(rows.sample_weight))
