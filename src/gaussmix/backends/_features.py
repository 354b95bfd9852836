"""Features of x that a log-density is linear in, phi = [1, x, quadratic], and how they lie in memory: NumPy only.

The log-density of every covariance type is natural parameters times phi, and its statistics are weighted sums of phi.
That is exact as long as `Covariance.kappa` times the rounding unit is small. phi is (F, b): b rows of the data, as
columns.
"""

from abc import ABC, abstractmethod
from functools import cache

import numpy as np

from gaussmix._density import Density
from gaussmix._typing import Array


class Quadratic(ABC):
    """The quadratic features of d numbers, q of them."""

    @abstractmethod
    def number(self, d: int) -> int:
        """How many there are, q."""

    @abstractmethod
    def write(self, x: Array, out: Array) -> None:
        """Those of the columns of x (d, b), into `out` (q, b)."""

    @abstractmethod
    def coefficients(self, precisions: Array) -> Array:
        """What the log-density multiplies them with: (k, q)."""

    @abstractmethod
    def moments(self, sums: Array, d: int) -> Array:
        """Second moments, as the covariance type stores them, from weighted sums of the features (k, q)."""


class Products(Quadratic):
    """x_i x_j, each pair once: j = i + s modulo d for one shift s after the other."""

    def number(self, d: int) -> int:
        return d * (d + 1) // 2

    def write(self, x: Array, out: Array) -> None:
        # One call for all shifts, since threads that make many short ones wait for Python.
        d, b = x.shape
        n_shifts = (d + 1) // 2
        cyclic = np.concatenate([x, x[: d // 2]])
        shifted = np.lib.stride_tricks.sliding_window_view(cyclic, d, axis=0)[:n_shifts].swapaxes(1, 2)
        np.multiply(x, shifted, out=out[: n_shifts * d].reshape(n_shifts, d, b))
        if d % 2 == 0:
            np.multiply(x[: d // 2], x[d // 2 :], out=out[n_shifts * d :])

    def coefficients(self, precisions: Array) -> Array:
        i, j = _cyclic_pairs(precisions.shape[-1])
        return np.where(i == j, -0.5, -1.0) * precisions[:, i, j]

    def moments(self, sums: Array, d: int) -> Array:
        i, j = _cyclic_pairs(d)
        moments = np.empty((sums.shape[0], d, d), dtype=sums.dtype)
        moments[:, i, j] = moments[:, j, i] = sums
        return moments


class Squares(Quadratic):
    """The square of each feature."""

    def number(self, d: int) -> int:
        return d

    def write(self, x: Array, out: Array) -> None:
        np.multiply(x, x, out=out)

    def coefficients(self, precisions: Array) -> Array:
        return -0.5 * precisions

    def moments(self, sums: Array, d: int) -> Array:
        return sums


class Norm(Quadratic):
    """The sum of the squares."""

    def number(self, d: int) -> int:
        return 1

    def write(self, x: Array, out: Array) -> None:
        np.einsum("db,db->b", x, x, out=out[0])

    def coefficients(self, precisions: Array) -> Array:
        return -0.5 * precisions[:, None]

    def moments(self, sums: Array, d: int) -> Array:
        return sums[:, 0]


class Nothing(Quadratic):
    """None: the quadratic term is the same for all components, and cancels in the responsibilities."""

    def number(self, d: int) -> int:
        return 0

    def write(self, x: Array, out: Array) -> None:
        pass

    def coefficients(self, precisions: Array) -> Array:
        return np.zeros((1, 0))

    def moments(self, sums: Array, d: int) -> Array:
        raise NotImplementedError("the scatter of all rows is computed once for a data set")


# By what `Covariance.quadratic` says.
QUADRATIC: dict[str, Quadratic] = {
    "products": Products(),
    "squares": Squares(),
    "norm": Norm(),
    "none": Nothing(),
}


@cache
def _cyclic_pairs(d: int) -> tuple[Array, Array]:
    s, i = np.divmod(np.arange(d * (d + 1) // 2), d)
    return i, (i + s) % d


def natural_parameters(density: Density, shift: Array) -> Array:
    """What log pi_k + log N(x; mu_k, Sigma_k) multiplies the features of x - shift with: (k, F).

    Without the term -(x - shift)^T A (x - shift) / 2 where all components share it.
    """
    covariance, factor = density.covariance, density.precision_cholesky
    means = density.means - shift
    linear = covariance.precision_times(means, factor)
    constant = density.log_offsets - 0.5 * np.sum(means * linear, axis=1)
    coefficients = QUADRATIC[covariance.quadratic].coefficients(covariance.square(factor))
    if len(coefficients) < len(means):
        coefficients = np.repeat(coefficients, len(means), axis=0)
    return np.concatenate([constant[:, None], linear, coefficients], axis=1)
