"""The centred E-step without the components whose responsibility for a row is bound to be zero.

Where features are many, log-densities are steep: most rows have one or two components that matter. Sigma_k is no wider
than its norm, so that with lambda_k = 1 / norm(Sigma_k)

    log pi_k + log N(x; mu_k, Sigma_k) <= log pi_k + log det U_k - d log(2 pi) / 2 - lambda_k |x - mu_k|^2 / 2:

one narrow matrix product bounds all components. Those that stay more than `MARGIN` nats below one that is known are
left out: what they would add is smaller than rounding. For the rest x - mu_k is formed before anything is multiplied,
in float64, for all rows of a component at once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gaussmix._array_api import nearest
from gaussmix._covariance import Covariance
from gaussmix._data import slices
from gaussmix._parameters import Parameters, SufficientStatistics
from gaussmix._typing import Array

# A responsibility below exp(-100) = 4e-44 is left out; a component whose count comes out below SMALLEST_COUNT might
# have lived on such ones alone, and is computed without pruning.
MARGIN = 100.0
SMALLEST_COUNT = 1e-20
# Rows that are grouped by component at a time, so that a component's group makes a matrix product.
GROUP_ROWS = 2**16
# Rows of a block of bounds.
BLOCK_ROWS = 2**11


@dataclass(frozen=True)
class Bounds:
    """Upper bounds on the weighted log-densities of all components."""

    constants: Array  # (k,): log pi_k + log det U_k - d log(2 pi) / 2
    steepness: Array  # (k,): lambda_k
    offsets: Array  # (k, d): mu_k - shift
    shift: Array  # (d,)

    def of(self, rows: Array) -> Array:
        """Upper bounds for rows (b, d), in their dtype: (k, b). Rounding is added, so that they stay upper bounds."""
        x = rows - self.shift.astype(rows.dtype)
        squares = np.einsum("bd,bd->b", x, x)
        half = 0.5 * self.steepness
        norms = np.einsum("kd,kd->k", self.offsets, self.offsets)
        rounding = 16 * float(np.finfo(rows.dtype).eps) * half * (norms + float(squares.max(initial=0)))
        bounds = (2 * half[:, None] * self.offsets).astype(rows.dtype) @ x.T
        bounds += (self.constants - half * norms + rounding).astype(rows.dtype)[:, None]
        bounds -= half.astype(rows.dtype)[:, None] * squares
        return bounds

    def guess(self, rows: Array) -> Array:
        """The component of the nearest mean for each of rows (n, d): (n,). Bounds themselves favour wide components."""
        means = self.offsets + self.shift
        labels = np.empty(len(rows), dtype=np.min_scalar_type(-len(means)))
        for block in slices(len(rows), BLOCK_ROWS):
            labels[block] = nearest(rows[block], means.astype(rows.dtype))
        return labels


def bounds_of(parameters: Parameters, covariance: Covariance, shift: Array, log_weights: Array) -> Bounds:
    """The bounds for these parameters; `shift` keeps the digits of the products."""
    k, d = parameters.means.shape
    constants = log_weights + covariance.log_det(parameters.precision_cholesky, d) - 0.5 * d * math.log(2 * math.pi)
    steepness = np.broadcast_to(1 / covariance.norm(parameters.covariances), (k,))
    return Bounds(constants, steepness, parameters.means - shift, shift)


def expect(
    rows: Array,
    weight: Array | None,
    labels: Array,
    parameters: Parameters,
    covariance: Covariance,
    bounds: Bounds,
) -> SufficientStatistics:
    """Statistics of `rows` (n, d) about the components' means.

    `labels` (n,) is a component that each row is thought to belong to, any will do; it is left with the likeliest.
    """
    sums = _Sums(parameters.means, covariance)
    for group in slices(len(rows), GROUP_ROWS):
        evidence, index, components, r = _responsibilities(rows[group], labels[group], parameters, covariance, bounds)
        if weight is not None:
            evidence, r = evidence * weight[group], r * weight[group][index]
        sums.log_likelihood += float(evidence.sum())
        sums.add(rows[group], index, components, r)
    return sums.statistics()


def log_evidence(rows: Array, parameters: Parameters, covariance: Covariance, bounds: Bounds, out: Array) -> None:
    """Log-density of `rows` (n, d) under the mixture, into `out` (n,)."""
    for group in slices(len(rows), GROUP_ROWS):
        labels = bounds.guess(rows[group])
        out[group] = _responsibilities(rows[group], labels, parameters, covariance, bounds)[0]


def responsibilities(rows: Array, parameters: Parameters, covariance: Covariance, bounds: Bounds, out: Array) -> None:
    """Posterior probability of each component given the row, into `out` (n, k); exactly 0 for those left out."""
    out[...] = 0
    for group in slices(len(rows), GROUP_ROWS):
        labels = bounds.guess(rows[group])
        _, index, components, r = _responsibilities(rows[group], labels, parameters, covariance, bounds)
        out[group.start + index, components] = r


def labels(rows: Array, parameters: Parameters, covariance: Covariance, bounds: Bounds, out: Array) -> None:
    """The component of largest responsibility for each of `rows` (n, d), into `out` (n,)."""
    for group in slices(len(rows), GROUP_ROWS):
        likeliest = bounds.guess(rows[group])
        _responsibilities(rows[group], likeliest, parameters, covariance, bounds)
        out[group] = likeliest


def assign(
    rows: Array, weight: Array | None, labels: Array, means: Array, covariance: Covariance
) -> SufficientStatistics:
    """Statistics of `rows` (n, d) about `means`, each row with its whole weight in the component of its label."""
    sums = _Sums(means, covariance)
    for group in slices(len(rows), GROUP_ROWS):
        own = np.arange(group.stop - group.start)
        sums.add(rows[group], own, labels[group], np.ones(len(own)) if weight is None else weight[group])
    return sums.statistics()


def _responsibilities(
    rows: Array, labels: Array, parameters: Parameters, covariance: Covariance, bounds: Bounds
) -> tuple[Array, Array, Array, Array]:
    """Log-evidences (n,), and those responsibilities that are not zero, with their rows and components.

    `labels` (n,), a component that each row is thought to belong to, is left with the likeliest.
    """

    def weighted_log_prob(index: Array, components: Array) -> Array:
        values = np.empty(len(index))
        for k, places in _members(components):
            centred = rows[index[places]] - parameters.means[k]
            mahalanobis = covariance.mahalanobis(centred[None], parameters.precision_cholesky[k : k + 1])[0]
            values[places] = bounds.constants[k] - 0.5 * mahalanobis
        return values

    own = np.arange(len(rows))
    known = weighted_log_prob(own, labels)
    others, components = _candidates(rows, labels, known, bounds)
    values = weighted_log_prob(others, components)

    largest = known.copy()
    np.maximum.at(largest, others, values)
    known, values = np.exp(known - largest), np.exp(values - largest[others])
    total = known.copy()
    np.add.at(total, others, values)
    index = np.concatenate([own, others])
    r = np.concatenate([known, values]) / total[index]
    of_all = np.concatenate([labels, components])
    # The first of equals, as argmax has it: others are in the order of their components.
    likelier = np.flatnonzero((values == 1) & ((known[others] < 1) | (components < labels[others])))[::-1]
    labels[others[likelier]] = components[likelier]
    return largest + np.log(total), index, of_all, r


class _Sums:
    """Sums over rows that are grouped by component, about the components' means."""

    def __init__(self, means: Array, covariance: Covariance) -> None:
        k, d = means.shape
        self.means, self.covariance = means, covariance
        self.counts, self.first_moments = np.zeros(k), np.zeros((k, d))
        self.second_moments = np.zeros(covariance.shape(k, d))
        self.log_likelihood = 0.0

    def add(self, rows: Array, index: Array, components: Array, r: Array) -> None:
        """Add the rows at `index`, with these responsibilities for these components."""
        shared = not self.covariance.n_quadratic(rows.shape[1])
        for k, places in _members(components):
            centred = rows[index[places]] - self.means[k]
            weighted = r[places, None] * centred
            self.counts[k] += r[places].sum()
            self.first_moments[k] += weighted.sum(axis=0)
            moments = self.covariance.second_moments(weighted[None], centred[None])
            if shared:
                self.second_moments += moments
            else:
                self.second_moments[k] += moments[0]

    def statistics(self) -> SufficientStatistics:
        """The sums by their names."""
        return SufficientStatistics(
            self.means, self.counts, self.first_moments, self.second_moments, np.asarray(self.log_likelihood)
        )


def _candidates(rows: Array, labels: Array, known: Array, bounds: Bounds) -> tuple[Array, Array]:
    """Rows and components, other than a row's label, whose bound is not far below what is known of the row."""
    found: list[tuple[Array, Array]] = []
    for block in slices(len(rows), BLOCK_ROWS):
        upper = bounds.of(rows[block])
        candidate = ~(upper < (known[block] - MARGIN).astype(upper.dtype))  # a bound that overflowed is NaN: kept
        candidate[labels[block], np.arange(candidate.shape[1])] = False
        components, index = np.nonzero(candidate)
        found.append((block.start + index, components.astype(labels.dtype)))
    index, components = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return index, components


def _members(labels: Array) -> Iterator[tuple[int, Array]]:
    """Each label that occurs, with the places where it does."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels) if len(labels) else np.zeros(0, dtype=np.int64)
    stops = np.cumsum(counts)
    for k in np.flatnonzero(counts):
        yield int(k), order[stops[k] - counts[k] : stops[k]]
