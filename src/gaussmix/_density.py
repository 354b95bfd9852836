"""`Density`: what every E-step reads of a mixture."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from gaussmix._arrays import array_namespace, asarray_like
from gaussmix._covariance import Covariance
from gaussmix._typing import Array, DType

# The logarithm of a weight of zero: finite, so that products with it are, and below every other.
LOG_ZERO = -1e30


@dataclass(frozen=True)
class Density:
    """k weighted densities over d features: log p_ik = log_offsets_k - |(x_i - mu_k) U_k|^2 / 2."""

    log_offsets: Array  # (k,)
    means: Array  # (k, d)
    covariances: Array  # covariance.shape(k, d): how wide the components are, which the guard and bounds look at
    precision_cholesky: Array  # the same shape: U with U U^T = Sigma^-1
    covariance: Covariance

    def moved(self, like: Array, dtype: DType) -> "Density":
        """The same in the library and on the device of `like`."""
        return self.mapped(lambda value: asarray_like(value, like, dtype))

    def mapped(self, function: Callable[[Array], Array]) -> "Density":
        """`function` of each array."""
        offsets, means, covariances, factors = map(
            function, (self.log_offsets, self.means, self.covariances, self.precision_cholesky)
        )
        return Density(offsets, means, covariances, factors, self.covariance)

    @property
    def middle(self) -> Array:
        """The mean of the mixture: (d,)."""
        xp = array_namespace(self.means)
        log_weights = self.log_offsets - self.covariance.log_det(self.precision_cholesky, self.means.shape[1])
        weights = xp.exp(log_weights - xp.max(log_weights))
        return weights @ self.means / xp.sum(weights)

    @property
    def is_alive(self) -> Array:
        """Whether each component has a weight: (k,)."""
        return self.log_offsets > LOG_ZERO / 2


def log_offsets(weights: Array, precision_cholesky: Array, covariance: Covariance, d: int) -> Array:
    """Log pi_k + log det U_k - d log(2 pi) / 2: (k,). The only place where the host forms it."""
    xp = array_namespace(weights)
    positive = weights > 0
    log_weights = xp.where(positive, xp.log(xp.where(positive, weights, 1)), LOG_ZERO)
    return log_weights + covariance.log_det(precision_cholesky, d) - 0.5 * d * math.log(2 * math.pi)
