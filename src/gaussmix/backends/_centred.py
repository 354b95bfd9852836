"""The centred form in host memory, component by component: x - mu_k in float64, and sums about the means.

One component after the other keeps what is worked on in the cache, and lets BLAS use that factors are triangular and
moments symmetric, which is half of all operations. Nothing of the size of all covariances is made but the sums.
"""

from collections.abc import Iterator

import numpy as np
from scipy.linalg import blas

from gaussmix._covariance import Covariance
from gaussmix._density import Density
from gaussmix._guard import CENTRED
from gaussmix._parameters import SufficientStatistics
from gaussmix._typing import Array
from gaussmix.backends._array_api import softmax, weighted_log_prob
from gaussmix.rows._data import slices

# Rows that are worked on at once take about this many bytes, but are no fewer than BLAS needs to be fast.
BLOCK_BYTES = 2_000_000
BLOCK_ROWS = (256, 8192)
# Elements of x - mu_k of all components and rows, up to which all components are computed at once.
FEW_ELEMENTS = 2**12
# From this many features on, BLAS multiplies with triangles faster than with whole matrices.
TRIANGULAR = 128


def expect(rows: Array, weight: Array | None, density: Density) -> SufficientStatistics:
    """The E-step: statistics of `rows` (n, d) about the components' means."""
    sums = Sums(density.means, density.covariance)
    for block in slices(len(rows), block_rows(density)):
        x, own_weight = _read(rows[block]), None if weight is None else weight[block]
        if own_weight is not None:
            x, own_weight = x[own_weight > 0], own_weight[own_weight > 0]
        r, evidence = softmax(logits(x, density))
        # What is subnormal is exactly zero: a component far from all rows then counts as empty and keeps its place.
        r[r < np.finfo(r.dtype).smallest_normal] = 0
        if own_weight is not None:
            r, evidence = r * own_weight, evidence * own_weight
        sums.log_likelihood += float(evidence.sum())
        for k in range(len(r)):
            index = np.flatnonzero(r[k])
            if len(index) == len(x):
                sums.add_centred(k, x - density.means[k], r[k])
            elif len(index):
                sums.add_centred(k, x[index] - density.means[k], r[k, index])
    return sums.statistics()


def log_evidence(rows: Array, density: Density) -> Array:
    """Log-density of each of `rows` (n, d) under the mixture: (n,)."""
    return softmax(logits(_read(rows), density))[1]


def responsibilities(rows: Array, density: Density) -> Array:
    """Posterior probability of each component given the row: (n, k)."""
    return softmax(logits(_read(rows), density))[0].T


def labels(rows: Array, density: Density) -> Array:
    """The component of largest responsibility for each of `rows` (n, d): (n,)."""
    return logits(_read(rows), density).argmax(axis=0)


def logits(x: Array, density: Density) -> Array:
    """Log of the weighted density of each row (n, d), in float64, under each component: (k, n)."""
    (n, d), k = x.shape, len(density.means)
    if n * k * d <= FEW_ELEMENTS:
        return weighted_log_prob(x, density)
    found, centred = np.empty((k, n)), np.empty((n, d))
    for j in range(k):
        np.subtract(x, density.means[j], out=centred)
        found[j] = density.log_offsets[j] - 0.5 * _mahalanobis(centred, density, j)
    return found


def block_rows(density: Density) -> int:
    """Rows to compute at once."""
    k, d = density.means.shape
    return int(np.clip(BLOCK_BYTES // (8 * (2 * d + 3 * k)), max(BLOCK_ROWS[0], d // 2), max(BLOCK_ROWS[1], d // 2)))


def _read(rows: Array) -> Array:
    return np.asarray(rows).astype(np.float64, copy=False)


def _mahalanobis(centred: Array, density: Density, component: int) -> Array:
    """Squared distances of rows about the mean of a component (n, d), which may be changed: (n,)."""
    covariance, factor = density.covariance, density.precision_cholesky
    if not covariance.shares_moments:
        factor = factor[component : component + 1]
    if covariance.has_matrices and centred.shape[1] >= TRIANGULAR:
        # U^T x^T, in place: BLAS has columns where NumPy has rows.
        upper = factor.reshape(factor.shape[-2:])
        blas.dtrmm(1.0, upper.T, centred.T, lower=1, overwrite_b=1)
        return np.einsum("nd,nd->n", centred, centred)
    return covariance.mahalanobis(centred[None], factor)[0]


class Sums:
    """Sums over rows that are grouped by component, about the components' means."""

    def __init__(self, means: Array, covariance: Covariance) -> None:
        k, d = means.shape
        self.means, self.covariance = means, covariance
        self.counts, self.first_moments = np.zeros(k), np.zeros((k, d))
        self.second_moments = np.zeros(covariance.moments_shape(k, d))
        self.log_likelihood = 0.0

    def add(self, rows: Array, index: Array, components: Array, r: Array) -> None:
        """Add the rows at `index`, with these responsibilities for these components."""
        for k, places in members(components):
            self.add_centred(k, rows[index[places]] - self.means[k], r[places])

    def add_centred(self, k: int, centred: Array, r: Array | None) -> None:
        """Add rows (m, d) about the mean of a component, which are changed; None are responsibilities of 1."""
        if r is None:
            self.counts[k] += len(centred)
            self.first_moments[k] += centred.sum(axis=0)
        else:
            self.counts[k] += r.sum()
            self.first_moments[k] += r @ centred
            centred *= np.sqrt(r)[:, None]
        moments = self.second_moments if self.covariance.shares_moments else self.second_moments[k : k + 1]
        if self.covariance.has_matrices:
            # Into the lower triangle alone.
            blas.dsyrk(1.0, centred.T, beta=1.0, c=moments.reshape(centred.shape[1], -1).T, overwrite_c=1)
        else:
            moments += self.covariance.second_moments(centred[None], centred[None])

    def statistics(self) -> SufficientStatistics:
        """The sums by their names."""
        if self.covariance.has_matrices:
            for matrix in self.second_moments.reshape(-1, *self.second_moments.shape[-2:]):
                matrix += np.tril(matrix, -1).T
        moments = (self.counts, self.first_moments, self.second_moments)
        return SufficientStatistics(self.means, *moments, np.asarray(self.log_likelihood), CENTRED.precision)


def members(labels: Array) -> Iterator[tuple[int, Array]]:
    """Each label that occurs, with the places where it does."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels) if len(labels) else np.zeros(0, dtype=np.int64)
    stops = np.cumsum(counts)
    for k in np.flatnonzero(counts):
        yield int(k), order[stops[k] - counts[k] : stops[k]]
