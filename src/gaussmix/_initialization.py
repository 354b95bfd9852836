"""Where EM and k-means start: seeds, Lloyd's iterations on a sample, responsibilities for all rows.

Seeds and centroids are found in float64 on the host, from a sample of the rows that depends on the random state alone:
the same random state gives the same start whatever library holds the data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import kmeans_plusplus

from gaussmix._arrays import array_namespace, asarray_like, to_numpy
from gaussmix._covariance import COVARIANCES, Covariance
from gaussmix._guard import CENTRED
from gaussmix._objective import Objective
from gaussmix._parameters import Parameters, SingularCovarianceError, SufficientStatistics
from gaussmix._typing import Array
from gaussmix.backends import _numpy
from gaussmix.backends._engine import Engine
from gaussmix.rows._data import Described, Rows

# Centroids of a sample of m rows have an inertia about k / m above those of all rows: under half a percent.
SAMPLE_ROWS = 2**13
SAMPLE_ROWS_PER_COMPONENT = 256

# Standard deviations that a given mean may lie away from the rows that are nearest to it: variances about it lose twice
# as many digits as this number has.
FAR = 10.0

# Elements of a block of rows whose mean is taken.
BLOCK_ELEMENTS = 2**18


@dataclass(frozen=True)
class Responsibilities:
    """Those of k components for the next rows (b, k), drawn at random. A copy draws the same."""

    random_state: np.random.RandomState
    k: int

    def __call__(self, b: int) -> Array:
        drawn = self.random_state.uniform(size=(b, self.k))
        return drawn / drawn.sum(axis=1, keepdims=True)


def initialize(
    engine: Engine,
    objective: Objective,
    k: int,
    strategy: str,
    random_state: np.random.RandomState,
    means: Array | None = None,
) -> Parameters:
    """Parameters that EM starts from, for the rows of the engine.

    Given `means` (k, d), or those that `strategy` finds, are handled as if k-means had found them: each row belongs to
    the nearest. "random" draws the responsibilities of each row instead.
    """
    if means is None and strategy == "random":
        statistics = engine.spread(k, Responsibilities(random_state, k))
        means = statistics.origin
    else:
        rows = engine.rows
        if means is None:
            means = find_means(rows, k, strategy, random_state)
        means = asarray_like(means, rows.like, rows.dtype)
        statistics = _assigned(engine, objective, means, means)
        centroids = statistics.means(means)
        if _lie_far(means, centroids, objective.covariances(statistics), objective.covariance):
            statistics = _assigned(engine, objective, means, centroids)
    return objective.maximize(statistics, means)


def _assigned(engine: Engine, objective: Objective, means: Array, origin: Array) -> SufficientStatistics:
    """Statistics of the rows nearest to each mean, in the first form that is exact enough for what they say."""
    forms = engine.forms
    while True:
        statistics = engine.assign(means, origin, forms[0])
        if len(forms) == 1 or statistics.precision == CENTRED.precision:
            return statistics
        try:
            found = objective.maximize(statistics, asarray_like(means, statistics.counts))
        except SingularCovarianceError:
            forms = engine.next_form(forms, "a covariance came out singular")
            continue
        left = engine.choose(forms, objective.density(found))
        if left == forms:
            return statistics
        forms = left


def _lie_far(means: Array, centroids: Array, covariances: Array, covariance: Covariance) -> bool:
    """Whether moments about `means` (k, d) lose digits that moments about the centroids of their rows would keep."""
    offsets = centroids - asarray_like(means, centroids)
    return bool(array_namespace(offsets).any(offsets**2 > FAR**2 * covariance.variances(covariances)))


def find_means(rows: Described, k: int, strategy: str, random_state: np.random.RandomState) -> Array:
    """Means (k, d) in float64 on the host, by "kmeans", "kmeans++" or "random_from_data"."""
    k = int(k)  # NumPy's small integers have no room for the product
    sample = rows.sample(max(SAMPLE_ROWS, SAMPLE_ROWS_PER_COMPONENT * k), random_state)
    seeds = SEEDS["random" if strategy == "random_from_data" else "kmeans++"](sample, k, random_state)
    if strategy != "kmeans":
        return seeds
    # The sample is in host memory, whatever library holds the data.
    on_sample = _numpy.in_memory(sample, COVARIANCES["spherical"])
    with on_sample.during_steps():
        return lloyd(on_sample, seeds, tolerance=1e-4, max_iter=300).centroids


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


def lloyd(
    on_rows: Engine,
    seeds: Array,
    *,
    tolerance: float,
    max_iter: int,
    callback: Callable[[int, float], None] | None = None,
) -> KMeansResult:
    """k-means from these seeds (k, d), until movement^2 is at most `tolerance` x the mean variance of a feature.

    The movement is the Frobenius norm over all centroids; the rule is scikit-learn's, with both sides in squared units
    of the data. A cluster without rows moves to the row that is farthest from its own centroid. `callback` sees
    (iteration, movement).
    """
    rows = on_rows.rows
    xp = array_namespace(rows.like)
    centroids = asarray_like(seeds, rows.like, rows.dtype)
    middle = rows.mean(max(1, BLOCK_ELEMENTS // rows.shape[1]))
    threshold = tolerance * mean_squared_distance(on_rows, middle[None, :]) / rows.shape[1]
    for n_iter in range(1, max_iter + 1):
        moved = _update(on_rows, centroids, middle)
        shift = float(xp.linalg.vector_norm(moved - centroids))
        centroids = moved
        if callback:
            callback(n_iter, shift)
        if shift * shift <= threshold:
            return KMeansResult(centroids, True, n_iter)
    return KMeansResult(centroids, False, max_iter)


def mean_squared_distance(on_rows: Engine, centroids: Array) -> float:
    """Weighted mean of the squared distances of the rows to the nearest centroid."""
    return on_rows.rows.average(on_rows.squared_distances(centroids))


def _update(on_rows: Engine, centroids: Array, middle: Array) -> Array:
    """One iteration of Lloyd's: the mean of the rows nearest to each centroid."""
    xp = array_namespace(centroids)
    # About the middle of the rows, sums keep their digits.
    counts, sums = on_rows.sums(centroids, middle)
    empty = counts == 0
    moved = xp.where(empty[:, None], centroids, middle + sums / xp.where(empty, 1, counts)[:, None])
    n_empty = int(np.count_nonzero(to_numpy(empty)))
    return _reseeded(on_rows, moved, empty, n_empty) if n_empty else moved


def _reseeded(on_rows: Engine, centroids: Array, empty: Array, n_empty: int) -> Array:
    """Empty clusters moved to the rows farthest from all centroids; unmoved where every row lies on one."""
    rows = on_rows.rows
    order, distances = rows.largest(on_rows.squared_distances(centroids), n_empty)
    order = order[distances > 0]
    # The i-th empty cluster takes the i-th farthest row.
    found = to_numpy(centroids).copy()
    positions = np.flatnonzero(to_numpy(empty))[: len(order)]
    increasing = np.argsort(order)
    found[positions[increasing]] = rows.take(order[increasing])
    return asarray_like(found, centroids)
