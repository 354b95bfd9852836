"""EM, inference and k-means in the array API standard: for every library, and the oracle of the faster paths.

Everything is centred: x_i - mu_k is formed before anything is multiplied, in float64 where the device has it. That is
the exact form of the three that numerics knows, and the slowest. Rows pass through in blocks, so that no array of
size n x k exists unless the caller asked for one.
"""

import math
from collections.abc import Callable

from gaussmix import _engine
from gaussmix._arrays import array_namespace, asarray_like, device, working_dtype
from gaussmix._covariance import Covariance
from gaussmix._data import Rows
from gaussmix._engine import Progress
from gaussmix._parameters import Parameters, SufficientStatistics
from gaussmix._typing import Array

# Elements of the (k, rows, d) array of a block, and of the (rows, k) and (rows, d) arrays of a block of k-means: 2 MiB
# in float64, which a CPU's cache still holds.
BLOCK_ELEMENTS = 2**18
# What keeps a GPU busy.
GPU_BLOCK_ELEMENTS = 2**25


def log_prob(x: Array, parameters: Parameters, covariance: Covariance) -> Array:
    """Log-density of each row under each component: (n, k)."""
    xp = array_namespace(x)
    return xp.matrix_transpose(_log_prob(_centred(x, parameters.means), parameters, covariance))


def log_evidence(x: Array, parameters: Parameters, covariance: Covariance) -> Array:
    """Log-density of each row under the mixture: (n,)."""
    return _log_sum_exp(_weighted_log_prob(_centred(x, parameters.means), parameters, covariance))


def responsibilities(x: Array, parameters: Parameters, covariance: Covariance) -> Array:
    """Posterior probability of each component given the row: (n, k)."""
    xp = array_namespace(x)
    weighted_log_prob = _weighted_log_prob(_centred(x, parameters.means), parameters, covariance)
    log_responsibilities = weighted_log_prob - _log_sum_exp(weighted_log_prob)
    return xp.matrix_transpose(xp.exp(log_responsibilities))


def labels(x: Array, parameters: Parameters, covariance: Covariance) -> Array:
    """The component of largest responsibility for each row: (n,)."""
    xp = array_namespace(x)
    return xp.argmax(_weighted_log_prob(_centred(x, parameters.means), parameters, covariance), axis=0)


def expect(x: Array, weight: Array | None, parameters: Parameters, covariance: Covariance) -> SufficientStatistics:
    """The E-step: statistics of these rows about the components' means."""
    xp = array_namespace(x)
    centred = _centred(x, parameters.means)
    weighted_log_prob = _weighted_log_prob(centred, parameters, covariance)
    evidence = _log_sum_exp(weighted_log_prob)
    log_responsibilities = weighted_log_prob - evidence
    # What would be subnormal is exactly zero: a component far from all rows then counts as empty and keeps its place.
    floor = math.log(float(xp.finfo(x.dtype).smallest_normal))
    r = xp.where(log_responsibilities > floor, xp.exp(log_responsibilities), 0)
    return _statistics(parameters.means, centred, r, weight, covariance, evidence)


def _statistics(
    origin: Array, centred: Array, r: Array, weight: Array | None, covariance: Covariance, evidence: Array
) -> SufficientStatistics:
    """Statistics of rows with responsibilities r (k, n) about `origin`, `centred` on it, with these log-evidences."""
    xp = array_namespace(centred)
    if weight is not None:
        r, evidence = r * weight, evidence * weight
    weighted = r[:, :, None] * centred
    return SufficientStatistics(
        origin,
        counts=xp.sum(r, axis=1),
        first_moments=xp.sum(weighted, axis=1),
        second_moments=covariance.second_moments(weighted, centred),
        log_likelihood=xp.sum(evidence),
    )


def nearest(x: Array, centroids: Array) -> Array:
    """The nearest centroid to each row, the first of equals: (n,)."""
    xp = array_namespace(x)
    # |x|^2 is the same for every centroid; the products lose least about a point in the middle of them.
    middle = xp.mean(centroids, axis=0)
    c = centroids - middle
    return xp.argmin(xp.sum(c * c, axis=1) - 2 * xp.matmul(x - middle, xp.matrix_transpose(c)), axis=1)


def one_hot(labels: Array, like: Array, k: int) -> Array:
    """1 in the column of the row's label, 0 elsewhere, in the dtype of `like`: (n, k)."""
    xp = array_namespace(like)
    components = xp.arange(k, dtype=labels.dtype, device=device(like))
    return xp.astype(labels[:, None] == components, like.dtype)


class Engine:
    """EM and inference on one data set for one covariance type."""

    hints: Array | None = None

    def __init__(self, rows: Rows, covariance: Covariance, reg_covar: float, middle: Array | None = None) -> None:
        self.rows, self.covariance, self.reg_covar, self._middle = rows, covariance, reg_covar, middle
        xp = array_namespace(rows.array)
        self.backend = f"array_api:{xp.__name__.rpartition('.')[2]}"
        self.precision = "centred-float64" if working_dtype(rows.array) == xp.float64 else "centred-float32"
        # There is nothing more exact to fall back to.
        self.forms = (self.precision,)

    def on(self, rows: Rows) -> "Engine":
        """The engine for other rows."""
        return Engine(rows, self.covariance, self.reg_covar, self._middle)

    def is_exact_for(self, parameters: Parameters) -> bool:
        """Always."""
        return True

    def fall_back(self, reason: str) -> None:
        """There is nothing to fall back to."""
        raise NotImplementedError(reason)

    def assign(self, means: Array, origin: Array) -> SufficientStatistics:
        """Statistics about `origin` (k, d) of the rows that are nearest to each of `means` (k, d)."""
        return self._assigned(origin, lambda x: one_hot(nearest(x, means), x, means.shape[0]))

    def spread(self, k: int, draw: Callable[[int], Array]) -> SufficientStatistics:
        """Statistics for the responsibilities (b, k), on the host, that `draw(b)` gives for the next b rows."""
        d = self.rows.shape[1]
        middle = self.rows.mean(self.block_size(k)) if self._middle is None else self._middle
        origin = array_namespace(middle).broadcast_to(middle, (k, d))
        return self._assigned(origin, lambda x: asarray_like(draw(x.shape[0]), x))

    def _assigned(self, origin: Array, assign: Callable[[Array], Array]) -> SufficientStatistics:
        xp = array_namespace(origin)

        def statistics(x: Array, weight: Array | None) -> SufficientStatistics:
            no_evidence = xp.zeros(x.shape[0], dtype=x.dtype, device=device(x))
            r = xp.matrix_transpose(assign(x))
            return _statistics(origin, _centred(x, origin), r, weight, self.covariance, no_evidence)

        return self._sum(statistics, origin.shape[0])

    def advance(self, parameters: Parameters, *, at_most: int, previous: float, tolerance: float) -> Progress:
        """Up to `at_most` EM iterations; stops where a lower bound is within `tolerance` of the one before."""
        return _engine.advance(self, parameters, at_most=at_most, previous=previous, tolerance=tolerance)

    def expect(self, parameters: Parameters) -> SufficientStatistics:
        """Statistics of all rows."""
        k = parameters.weights.shape[0]
        return self._sum(lambda x, weight: expect(x, weight, parameters, self.covariance), k)

    def log_evidence(self, parameters: Parameters) -> Array:
        """Log-density of each row under the mixture: (n,)."""
        return self._map(log_evidence, parameters)

    def responsibilities(self, parameters: Parameters) -> Array:
        """Posterior probability of each component given the row: (n, k)."""
        return self._map(responsibilities, parameters)

    def labels(self, parameters: Parameters) -> Array:
        """The component of largest responsibility for each row: (n,)."""
        return self._map(labels, parameters)

    def _map(self, function: Callable[[Array, Parameters, Covariance], Array], parameters: Parameters) -> Array:
        xp = array_namespace(self.rows.array)
        size = self.block_size(parameters.weights.shape[0])
        return xp.concat([function(x, parameters, self.covariance) for x, _ in self.rows.blocks(size)])

    def _sum(self, function: Callable[[Array, Array | None], SufficientStatistics], k: int) -> SufficientStatistics:
        blocks = self.rows.blocks(self.block_size(k))
        total = function(*next(blocks))
        for x, weight in blocks:
            total = total + function(x, weight)
        return total

    def block_size(self, k: int) -> int:
        """Rows of a block."""
        return _block_size(self.rows.array, k * self.rows.shape[1])


class Clusters:
    """k-means on one data set."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def labels(self, centroids: Array) -> Array:
        """The centroid nearest to each row, the first of equals: (n,)."""
        return self._map(lambda x: nearest(x, centroids), self._block_size(centroids.shape[0]))

    def squared_distances(self, centroids: Array) -> Array:
        """Squared distance of each row to the nearest centroid: (n,)."""
        xp = array_namespace(centroids)

        def squared(x: Array) -> Array:
            offset = x - xp.take(centroids, nearest(x, centroids), axis=0)
            return xp.sum(offset * offset, axis=1)

        return self._map(squared, self._block_size(centroids.shape[0]))

    def distances(self, centroids: Array) -> Array:
        """Distance of each row to each centroid: (n, k)."""
        norm = array_namespace(centroids).linalg.vector_norm
        size = _block_size(centroids, math.prod(centroids.shape))
        return self._map(lambda x: norm(x[:, None, :] - centroids[None, :, :], axis=2), size)

    def sums(self, centroids: Array, origin: Array) -> tuple[Array, Array]:
        """Weight of the rows that are nearest to each centroid (k,), and the sums of their x - origin (k, d)."""
        xp = array_namespace(centroids)
        k = centroids.shape[0]
        counts, sums = xp.zeros_like(centroids[:, 0]), xp.zeros_like(centroids)
        for x, weight in self.rows.blocks(self._block_size(k)):
            assigned = xp.matrix_transpose(one_hot(nearest(x, centroids), x, k))
            if weight is not None:
                assigned = assigned * weight
            counts = counts + xp.sum(assigned, axis=1)
            sums = sums + xp.matmul(assigned, x - origin)
        return counts, sums

    def _map(self, function: Callable[[Array], Array], size: int) -> Array:
        # Without weights: rows of weight 0 have distances as well.
        blocks = Rows(self.rows.array, None, self.rows.batch_size).blocks(size)
        return array_namespace(self.rows.array).concat([function(x) for x, _ in blocks])

    def _block_size(self, k: int) -> int:
        return _block_size(self.rows.array, k + self.rows.shape[1])


def _centred(x: Array, means: Array) -> Array:
    """x_i - mu_k: (k, n, d)."""
    return x[None, :, :] - means[:, None, :]


def _log_prob(centred: Array, parameters: Parameters, covariance: Covariance) -> Array:
    """Log-density of each row under each component: (k, n)."""
    xp = array_namespace(centred)
    d = centred.shape[2]
    log_det = covariance.log_det(parameters.precision_cholesky, d)
    mahalanobis = covariance.mahalanobis(centred, parameters.precision_cholesky)
    return xp.reshape(log_det, (-1, 1)) - 0.5 * (d * math.log(2 * math.pi) + mahalanobis)


def _weighted_log_prob(centred: Array, parameters: Parameters, covariance: Covariance) -> Array:
    """Log pi_k + log_prob: (k, n)."""
    xp = array_namespace(centred)
    positive = parameters.weights > 0
    log_weights = xp.where(positive, xp.log(xp.where(positive, parameters.weights, 1)), -xp.inf)
    return log_weights[:, None] + _log_prob(centred, parameters, covariance)


def _log_sum_exp(weighted_log_prob: Array) -> Array:
    """Log sum_k exp(...), about the largest term: (n,)."""
    xp = array_namespace(weighted_log_prob)
    largest = xp.max(weighted_log_prob, axis=0)
    return largest + xp.log(xp.sum(xp.exp(weighted_log_prob - largest), axis=0))


def _block_size(x: Array, elements: int) -> int:
    """Rows of a block, of so many elements each, on the device of x."""
    on_gpu = "cuda" in str(device(x)).lower()
    return max(1, (GPU_BLOCK_ELEMENTS if on_gpu else BLOCK_ELEMENTS) // elements)
