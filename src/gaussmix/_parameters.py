"""What an E-step hands to an M-step, and back: `SufficientStatistics` and `Parameters`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gaussmix._arrays import array_namespace, asarray_like
from gaussmix._covariance import Covariance
from gaussmix._typing import Array, DType


@dataclass(frozen=True)
class Parameters:
    """A mixture of k Gaussians over d features."""

    weights: Array  # (k,)
    means: Array  # (k, d)
    covariances: Array  # covariance.shape(k, d)
    precision_cholesky: Array  # the same shape: U with U U^T = Sigma^-1

    def moved(self, like: Array, dtype: DType) -> "Parameters":
        """These parameters in the library and on the device of `like`."""
        return self.mapped(lambda value: asarray_like(value, like, dtype))

    def mapped(self, function: Callable[[Array], Array]) -> "Parameters":
        """`function` of each array."""
        return Parameters(*(function(value) for value in vars(self).values()))


@dataclass(frozen=True)
class SufficientStatistics:
    """Sums over rows; those of two blocks of rows add to those of both.

    Moments are about `origin`, a point for each component (k, d) or one for all (d,). Only statistics with the same
    origin add.
    """

    origin: Array  # (k, d) or (d,)
    counts: Array  # (k,)
    first_moments: Array  # (k, d): sum of r_ik (x_i - origin)
    second_moments: Array  # as the covariance type stores them
    log_likelihood: Array  # scalar: sum of log-evidences

    def __add__(self, other: "SufficientStatistics") -> "SufficientStatistics":
        if other.origin is not self.origin and not bool(array_namespace(self.origin).all(self.origin == other.origin)):
            raise ValueError("statistics about different origins do not add; compute both with the same parameters")
        return SufficientStatistics(
            self.origin,
            self.counts + other.counts,
            self.first_moments + other.first_moments,
            self.second_moments + other.second_moments,
            self.log_likelihood + other.log_likelihood,
        )

    def scaled(self, factor: float) -> "SufficientStatistics":
        """The statistics of so many times the rows."""
        return SufficientStatistics(
            self.origin,
            factor * self.counts,
            factor * self.first_moments,
            factor * self.second_moments,
            factor * self.log_likelihood,
        )

    def about(self, origin: Array, covariance: Covariance) -> "SufficientStatistics":
        """The same statistics about another origin."""
        if origin is self.origin:
            return self
        # Both origins as seen from the components' means, about which second moments are smallest.
        shifts = self._shifts
        moved = shifts + (self.origin - origin)
        central = covariance.recentre(self.second_moments, self.counts, shifts)
        return SufficientStatistics(
            origin,
            self.counts,
            self.counts[:, None] * moved,
            covariance.recentre(central, -self.counts, moved),
            self.log_likelihood,
        )

    def means(self, empty: Array) -> Array:
        """Mean of each component's rows, and that of `empty` (k, d) for a component without rows: (k, d)."""
        xp = array_namespace(self.counts)
        return xp.where(self.counts[:, None] > 0, self.origin + self._shifts, empty)

    def covariances(self, covariance: Covariance) -> Array:
        """Covariances of largest likelihood."""
        second_moments = covariance.recentre(self.second_moments, self.counts, self._shifts)
        return covariance.estimate(second_moments, self.counts, self.first_moments.shape[1])

    @property
    def _shifts(self) -> Array:
        """From the origin to the means of the rows: (k, d)."""
        return self.first_moments / array_namespace(self.counts).where(self.counts > 0, self.counts, 1)[:, None]

    @property
    def lower_bound(self) -> float:
        """Mean log-evidence of the rows."""
        return float(self.log_likelihood / array_namespace(self.counts).sum(self.counts))


def maximize(statistics: SufficientStatistics, means: Array, covariance: Covariance, reg_covar: float) -> Parameters:
    """The M-step: the parameters of largest likelihood for these statistics, `reg_covar` added to each variance.

    A component without rows keeps its place: its mean stays that of `means`, its weight is 0.
    """
    xp = array_namespace(statistics.counts)
    counts = statistics.counts
    covariances = covariance.regularize(statistics.covariances(covariance), reg_covar)
    precision_cholesky = covariance.precision_cholesky(covariances)
    if not bool(xp.all(xp.isfinite(precision_cholesky))):
        component = covariance.first_singular(precision_cholesky)
        count = xp.sum(counts) if component is None else counts[component]
        raise singular_covariance(component, float(count), reg_covar)
    return Parameters(counts / xp.sum(counts), statistics.means(means), covariances, precision_cholesky)


def statistics_of(parameters: Parameters, covariance: Covariance, reg_covar: float) -> SufficientStatistics:
    """Statistics of weight 1 in all from which `maximize` makes these parameters; without a likelihood."""
    weights, means = parameters.weights, parameters.means
    estimated = covariance.regularize(parameters.covariances, -reg_covar)
    return SufficientStatistics(
        means, weights, 0 * means, covariance.scatter(estimated, weights, means.shape[1]), 0 * weights[0]
    )


class SingularCovarianceError(np.linalg.LinAlgError):
    """A covariance is not positive definite. Also a `torch.linalg.LinAlgError` where torch is loaded."""

    def __init__(self, component: int | None, count: float, reg_covar: float) -> None:
        self.component, self.count, self.reg_covar = component, count, reg_covar
        subject = (
            "the covariance that all components share"
            if component is None
            else f"the covariance of component {component}"
        )
        super().__init__(
            f"{subject} is not positive definite (estimated from {count:.6g} rows); increase the regularisation (now "
            f"{reg_covar:g}), use fewer components, or remove constant and duplicate features"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return singular_covariance, (self.component, self.count, self.reg_covar)


def singular_covariance(component: int | None, count: float, reg_covar: float) -> SingularCovarianceError:
    """The error, as a class that those who catch torch's LinAlgError catch too."""
    torch = sys.modules.get("torch")
    if torch is None:
        return SingularCovarianceError(component, count, reg_covar)
    both = type("SingularCovarianceError", (SingularCovarianceError, torch.linalg.LinAlgError), {})
    error: SingularCovarianceError = both(component, count, reg_covar)
    return error
