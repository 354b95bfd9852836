"""EM, inference and k-means in the array API standard: for every library, and the oracle of the faster paths.

Everything is centred: x_i - mu_k is formed before anything is multiplied, in float64 where the device has it. That is
the exact form of the three that numerics knows, and the slowest. Rows pass through in blocks, so that no array of
size n x k exists unless the caller asked for one.
"""

import math
from collections.abc import Callable
from functools import reduce
from operator import add

from gaussmix._arrays import array_namespace, asarray_like, device, working_dtype
from gaussmix._covariance import Covariance
from gaussmix._density import Density
from gaussmix._guard import CENTRED, Form, Forms
from gaussmix._parameters import SufficientStatistics
from gaussmix._typing import Array
from gaussmix.rows._data import Rows
from gaussmix.rows._passes import Draw

# Elements of the (k, rows, d) array of a block, and of the (rows, k) and (rows, d) arrays of a block of k-means: 2 MiB
# in float64, which a CPU's cache still holds.
BLOCK_ELEMENTS = 2**18
# Rows whose mean is taken at a time.
BLOCK_ROWS = 2**13
# What keeps a GPU busy.
GPU_BLOCK_ELEMENTS = 2**25


def weighted_log_prob(x: Array, density: Density) -> Array:
    """Log of each row's weighted density under each component: (k, n)."""
    return _weighted_log_prob(_centred(x, density.means), density)


def log_evidence(x: Array, density: Density) -> Array:
    """Log-density of each row under the mixture: (n,)."""
    return softmax(weighted_log_prob(x, density))[1]


def responsibilities(x: Array, density: Density) -> Array:
    """Posterior probability of each component given the row: (n, k)."""
    return array_namespace(x).matrix_transpose(softmax(weighted_log_prob(x, density))[0])


def labels(x: Array, density: Density) -> Array:
    """The component of largest responsibility for each row: (n,)."""
    return array_namespace(x).argmax(weighted_log_prob(x, density), axis=0)


def expect(x: Array, weight: Array | None, density: Density, precision: str) -> SufficientStatistics:
    """The E-step: statistics of these rows about the components' means."""
    xp = array_namespace(x)
    centred = _centred(x, density.means)
    r, evidence = softmax(_weighted_log_prob(centred, density))
    # What is subnormal is exactly zero: a component far from all rows then counts as empty and keeps its place.
    r = xp.where(r > float(xp.finfo(x.dtype).smallest_normal), r, 0)
    return _statistics(density.means, centred, r, weight, density.covariance, evidence, precision)


def _statistics(
    origin: Array,
    centred: Array,
    r: Array,
    weight: Array | None,
    covariance: Covariance,
    evidence: Array,
    precision: str,
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
        precision=precision,
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


def distances(block: "Block", centroids: Array) -> Array:
    """Distance of each row to each centroid: (n, k)."""
    norm = array_namespace(centroids).linalg.vector_norm
    return block.map(lambda x: norm(x[:, None, :] - centroids[None, :, :], axis=2), math.prod(centroids.shape))


class Block:
    """Rows in memory, in whatever library."""

    hints: Array | None = None

    def __init__(self, rows: Rows, middle: Array | None = None) -> None:
        self.rows, self._middle = rows, middle
        xp = array_namespace(rows.array)
        self.backend = f"array_api:{xp.__name__.removeprefix('array_api_compat.').partition('.')[0]}"
        self._form = CENTRED if working_dtype(rows.array) == xp.float64 else Form("centred-float32", exact=False)

    @property
    def shift(self) -> Array:
        """Where rows are drawn for, the middle of the data set."""
        return self.rows.mean(BLOCK_ROWS) if self._middle is None else self._middle

    def floor(self) -> None:
        """Nothing is left out."""

    def forms(self, covariance: Covariance) -> Forms:
        """The only one: there is nothing more exact."""
        return (self._form,)

    def assign(self, means: Array, origin: Array, covariance: Covariance, form: Form) -> SufficientStatistics:
        """Statistics about `origin` (k, d) of the rows that are nearest to each of `means` (k, d)."""
        return self._assigned(origin, covariance, lambda x: one_hot(nearest(x, means), x, means.shape[0]))

    def spread(self, draw: Draw, k: int, covariance: Covariance) -> SufficientStatistics:
        """Statistics for the responsibilities that `draw` gives."""
        middle = self.rows.mean(self._block_size(k * self.rows.shape[1])) if self._middle is None else self._middle
        origin = array_namespace(middle).broadcast_to(middle, (k, self.rows.shape[1]))
        return self._assigned(origin, covariance, lambda x: asarray_like(draw(x.shape[0]), x))

    def _assigned(
        self, origin: Array, covariance: Covariance, assign: Callable[[Array], Array]
    ) -> SufficientStatistics:
        xp = array_namespace(origin)

        def statistics(x: Array, weight: Array | None) -> SufficientStatistics:
            no_evidence = xp.zeros(x.shape[0], dtype=x.dtype, device=device(x))
            r = xp.matrix_transpose(assign(x))
            precision = self._form.precision
            return _statistics(origin, _centred(x, origin), r, weight, covariance, no_evidence, precision)

        return self._sum(statistics, origin.shape[0])

    def expect(self, density: Density, form: Form) -> SufficientStatistics:
        """The E-step: statistics of all rows."""
        precision = self._form.precision
        return self._sum(lambda x, weight: expect(x, weight, density, precision), density.means.shape[0])

    def log_evidence(self, density: Density) -> Array:
        """Log-density of each row under the mixture: (n,)."""
        return self._infer(log_evidence, density)

    def responsibilities(self, density: Density) -> Array:
        """Posterior probability of each component given the row: (n, k)."""
        return self._infer(responsibilities, density)

    def labels(self, density: Density) -> Array:
        """The component of largest responsibility for each row: (n,)."""
        return self._infer(labels, density)

    def _infer(self, function: Callable[[Array, Density], Array], density: Density) -> Array:
        return self.map(lambda x: function(x, density), math.prod(density.means.shape))

    def _sum(self, function: Callable[[Array, Array | None], SufficientStatistics], k: int) -> SufficientStatistics:
        blocks = self.rows.blocks(self._block_size(k * self.rows.shape[1]))
        return reduce(add, (function(x, weight) for x, weight in blocks))

    def nearest(self, centroids: Array) -> Array:
        """The centroid nearest to each row, the first of equals: (n,)."""
        return self.map(lambda x: nearest(x, centroids), sum(centroids.shape))

    def squared_distances(self, centroids: Array) -> Array:
        """Squared distance of each row to the nearest centroid: (n,)."""
        xp = array_namespace(centroids)

        def squared(x: Array) -> Array:
            offset = x - xp.take(centroids, nearest(x, centroids), axis=0)
            return xp.sum(offset * offset, axis=1)

        return self.map(squared, sum(centroids.shape))

    def sums(self, centroids: Array, origin: Array) -> Array:
        """Sums of x - origin over the rows nearest to each centroid, with their weight as last column: (k, d + 1)."""
        xp, (k, d) = array_namespace(centroids), centroids.shape
        counts, sums = xp.zeros_like(centroids[:, :1]), xp.zeros_like(centroids)
        for x, weight in self.rows.blocks(self._block_size(k + d)):
            assigned = xp.matrix_transpose(one_hot(nearest(x, centroids), x, k))
            if weight is not None:
                assigned = assigned * weight
            counts = counts + xp.sum(assigned, axis=1, keepdims=True)
            sums = sums + xp.matmul(assigned, x - origin)
        return xp.concat([sums, counts], axis=1)

    def map(self, function: Callable[[Array], Array], elements: int) -> Array:
        """`function` of blocks of rows, of so many elements for each row, for all rows."""
        # Without weights: rows of weight 0 have values as well.
        blocks = Rows(self.rows.array, None, self.rows.batch_size).blocks(self._block_size(elements))
        return array_namespace(self.rows.array).concat([function(x) for x, _ in blocks])

    def _block_size(self, elements: int) -> int:
        """Rows of a block, of so many elements each, on the device of the rows."""
        on_gpu = "cuda" in str(device(self.rows.array)).lower()
        return max(1, (GPU_BLOCK_ELEMENTS if on_gpu else BLOCK_ELEMENTS) // elements)


def _centred(x: Array, means: Array) -> Array:
    """x_i - mu_k: (k, n, d)."""
    return x[None, :, :] - means[:, None, :]


def _weighted_log_prob(centred: Array, density: Density) -> Array:
    mahalanobis = density.covariance.mahalanobis(centred, density.precision_cholesky)
    return density.log_offsets[:, None] - 0.5 * mahalanobis


def softmax(logits: Array) -> tuple[Array, Array]:
    """exp(logits) in parts of their sum over the components (k, n), and the logarithm of that sum (n,)."""
    xp = array_namespace(logits)
    largest = xp.max(logits, axis=0)
    # Not exp(logits - log of the sum): beside a large logit, which a row far from all components has, that logarithm
    # has lost its last digits, and the parts would not add up to 1.
    parts = xp.exp(logits - largest)
    total = xp.sum(parts, axis=0)
    return parts / total, largest + xp.log(total)
