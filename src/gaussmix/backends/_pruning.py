"""The centred E-step without the components whose responsibility for a row is bound to be zero.

Where features are many, log-densities are steep: most rows have one or two components that matter. Sigma_k is no wider
than its norm, so that with lambda_k = 1 / norm(Sigma_k)

    log pi_k + log N(x; mu_k, Sigma_k) <= log pi_k + log det U_k - d log(2 pi) / 2 - lambda_k |x - mu_k|^2 / 2:

one narrow matrix product bounds all components. Those that stay more than `MARGIN` nats below one that is known are
left out: what they would add is smaller than rounding. For the rest x - mu_k is formed before anything is multiplied,
in float64, for many rows of a component at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gaussmix._covariance import Covariance
from gaussmix._density import Density
from gaussmix._parameters import SufficientStatistics
from gaussmix._typing import Array
from gaussmix.backends._array_api import nearest
from gaussmix.backends._centred import Sums, members
from gaussmix.rows._data import slices

# A responsibility below exp(-100) = 4e-44 is left out; a component whose count comes out below SMALLEST_COUNT might
# have lived on such ones alone, and is computed without pruning.
MARGIN = 100.0
SMALLEST_COUNT = 1e-20
# Rows that are grouped by component at a time, so that a component's group makes a matrix product.
GROUP_ROWS = 2**16
# Rows of a component, or of any, that are worked on at a time: in float64 they stay in the cache.
BLOCK_ROWS = 2**11


@dataclass(frozen=True)
class Bounds:
    """Upper bounds on the weighted log-densities of all components."""

    constants: Array  # (k,): the log-offsets
    steepness: Array  # (k,): lambda_k
    offsets: Array  # (k, d): mu_k - shift
    shift: Array  # (d,)

    @classmethod
    def of_density(cls, density: Density, shift: Array) -> "Bounds":
        """The bounds of this mixture; `shift` keeps the digits of the products."""
        steepness = np.broadcast_to(1 / density.covariance.norm(density.covariances), density.log_offsets.shape)
        return cls(density.log_offsets, steepness, density.means - shift, shift)

    def of(self, rows: Array) -> Array:
        """Upper bounds for rows (b, d), in their dtype: (k, b). Rounding is added, so that they stay upper bounds."""
        return self.of_shifted(rows - self.shift.astype(rows.dtype))

    def of_shifted(self, x: Array) -> Array:
        """The same for rows minus the shift, in the dtype of the rows."""
        squares = np.einsum("bd,bd->b", x, x)
        half = 0.5 * self.steepness
        norms = np.einsum("kd,kd->k", self.offsets, self.offsets)
        rounding = 16 * float(np.finfo(x.dtype).eps) * half * (norms + float(squares.max(initial=0)))
        bounds = (2 * half[:, None] * self.offsets).astype(x.dtype) @ x.T
        bounds += (self.constants - half * norms + rounding).astype(x.dtype)[:, None]
        bounds -= half.astype(x.dtype)[:, None] * squares
        return bounds

    def guess(self, rows: Array) -> Array:
        """The component of the nearest mean for each of rows (n, d): (n,). Bounds themselves favour wide components."""
        means = self.offsets + self.shift
        labels = np.empty(len(rows), dtype=np.min_scalar_type(-len(means)))
        for block in slices(len(rows), BLOCK_ROWS):
            labels[block] = nearest(rows[block], means.astype(rows.dtype))
        return labels


def expect(
    rows: Array,
    weight: Array | None,
    labels: Array,
    density: Density,
    bounds: Bounds,
) -> SufficientStatistics:
    """Statistics of `rows` (n, d) about the components' means.

    `labels` (n,) is a component that each row is thought to belong to, any will do; it is left with the likeliest.
    """
    sums = Sums(density.means, density.covariance)
    for group in slices(len(rows), GROUP_ROWS):
        own_weight = None if weight is None else weight[group]

        def add(k: int, index: Array, centred: Array, own_weight: Array | None = own_weight) -> None:
            sums.add_centred(k, centred, None if own_weight is None else own_weight[index])

        found = _responsibilities(rows[group], labels[group], density, bounds, add)
        evidence, rest = found.evidence, np.unique(found.index)
        index = np.concatenate([rest, found.index])
        components = np.concatenate([labels[group][rest], found.components])
        r = np.concatenate([found.own[rest], found.others])
        if own_weight is not None:
            evidence, r = evidence * own_weight, r * own_weight[index]
        sums.log_likelihood += float(evidence.sum())
        sums.add(rows[group], index, components, r)
        labels[group] = found.likeliest
    return sums.statistics()


def log_evidence(rows: Array, density: Density, bounds: Bounds, out: Array) -> None:
    """Log-density of `rows` (n, d) under the mixture, into `out` (n,)."""
    for group in slices(len(rows), GROUP_ROWS):
        labels = bounds.guess(rows[group])
        out[group] = _responsibilities(rows[group], labels, density, bounds).evidence


def responsibilities(rows: Array, density: Density, bounds: Bounds, out: Array) -> None:
    """Posterior probability of each component given the row, into `out` (n, k); exactly 0 for those left out."""
    out[...] = 0
    for group in slices(len(rows), GROUP_ROWS):
        labels = bounds.guess(rows[group])
        found = _responsibilities(rows[group], labels, density, bounds)
        out[np.arange(group.start, group.stop), labels] = found.own
        out[group.start + found.index, found.components] = found.others


def labels(rows: Array, density: Density, bounds: Bounds, out: Array) -> None:
    """The component of largest responsibility for each of `rows` (n, d), into `out` (n,)."""
    for group in slices(len(rows), GROUP_ROWS):
        guess = bounds.guess(rows[group])
        out[group] = _responsibilities(rows[group], guess, density, bounds).likeliest


def assign(
    rows: Array, weight: Array | None, labels: Array, origin: Array, covariance: Covariance
) -> SufficientStatistics:
    """Statistics of `rows` (n, d) about `origin` (k, d), each row wholly in the component of its label."""
    sums = Sums(origin, covariance)
    for group in slices(len(rows), GROUP_ROWS):
        own = np.arange(group.stop - group.start)
        sums.add(rows[group], own, labels[group], np.ones(len(own)) if weight is None else weight[group])
    return sums.statistics()


@dataclass(frozen=True)
class _Responsibilities:
    """Those that are not zero: of each row's label, and of other components for some rows."""

    evidence: Array  # (n,): log-evidences
    own: Array  # (n,)
    index: Array  # (m,): rows; those of one row are in the order of their components
    components: Array  # (m,)
    others: Array  # (m,)
    likeliest: Array  # (n,): the component of largest responsibility


def _responsibilities(
    rows: Array,
    labels: Array,
    density: Density,
    bounds: Bounds,
    add: Callable[[int, Array, Array], None] = lambda k, index, centred: None,
) -> _Responsibilities:
    """For each of `rows` (n, d), of which each is thought to belong to the component of its label (n,).

    `add` sees those that belong to nothing else, (m, d) about a component's mean, while they are in the cache; it may
    change them.
    """

    def weighted_log_prob(k: int, centred: Array) -> Array:
        whitened = density.covariance.whiten(centred[None], density.precision_cholesky[k : k + 1])[0]
        return bounds.constants[k] - 0.5 * np.einsum("bd,bd->b", whitened, whitened)

    # Arrays of this size that are made anew cost more page faults than work where malloc gives memory back at once.
    size = min(BLOCK_ROWS, len(rows))
    x_buffer, centred_buffer = np.empty((size, rows.shape[1]), rows.dtype), np.empty((size, rows.shape[1]))
    shift = bounds.shift.astype(rows.dtype)
    known = np.empty(len(rows))
    pairs = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=labels.dtype))]
    for k, places in members(labels):
        n_blocks = -(-len(places) // BLOCK_ROWS)
        for part in slices(len(places), -(-len(places) // n_blocks)):
            index = places[part]
            x = np.take(rows, index, axis=0, out=x_buffer[: len(index)], mode="clip")
            centred = np.subtract(x, density.means[k], out=centred_buffer[: len(index)])
            known[index] = weighted_log_prob(k, centred)
            upper = bounds.of_shifted(np.subtract(x, shift, out=x))
            candidate = ~(upper < (known[index] - MARGIN).astype(upper.dtype))  # a bound that overflowed is NaN: kept
            candidate[k] = False
            if candidate.any():
                components, which = np.nonzero(candidate)
                pairs.append((index[which], components.astype(labels.dtype)))
                alone = ~candidate.any(axis=0)
                index, centred = index[alone], centred[alone]
            add(k, index, centred)

    index, components = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    values = np.empty(len(index))
    for k, places in members(components):
        values[places] = weighted_log_prob(k, rows[index[places]] - density.means[k])
    largest = known.copy()
    np.maximum.at(largest, index, values)
    known, values = np.exp(known - largest), np.exp(values - largest[index])
    total = known.copy()
    np.add.at(total, index, values)
    # The first of equals, as argmax has it: others of a row are in the order of their components.
    likelier = np.flatnonzero((values == 1) & ((known[index] < 1) | (components < labels[index])))[::-1]
    likeliest = labels.copy()
    likeliest[index[likelier]] = components[likelier]
    return _Responsibilities(
        largest + np.log(total), known / total, index, components, values / total[index], likeliest
    )
