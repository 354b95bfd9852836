"""What an E-step hands to an M-step, and back: `SufficientStatistics` and `Parameters`."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gaussmix._arrays import array_namespace, asarray_like, device
from gaussmix._covariance import Covariance
from gaussmix._typing import Array, DType

# The name of the most exact arithmetic that there is.
CENTRED_PRECISION = "centred-float64"


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
    precision: str = ""  # the arithmetic that they were computed in, where that is known

    @classmethod
    def of_nothing(cls, origin: Array, covariance: Covariance) -> "SufficientStatistics":
        """Those of no rows about `origin` (k, d)."""
        xp, (k, d) = array_namespace(origin), origin.shape
        shapes = ((k,), (k, d), covariance.moments_shape(k, d), ())
        return cls(origin, *(xp.zeros(shape, dtype=origin.dtype, device=device(origin)) for shape in shapes))

    def __add__(self, other: "SufficientStatistics") -> "SufficientStatistics":
        if other.origin is not self.origin and not bool(array_namespace(self.origin).all(self.origin == other.origin)):
            raise ValueError("statistics about different origins do not add; compute both with the same parameters")
        sums = (mine + others for mine, others in zip(self.sums, other.sums, strict=True))
        # Some blocks may be computed in a more exact arithmetic than the rest, and always in the same one.
        precision = self.precision if other.precision == CENTRED_PRECISION else other.precision
        return replace(self.summed(sums), precision=precision)

    def scaled(self, factor: float) -> "SufficientStatistics":
        """The statistics of so many times the rows."""
        return self.summed(factor * value for value in self.sums)

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
            self.precision,
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

    def lower_bound(self, penalty: float = 0.0) -> float:
        """Mean log-evidence of the rows, with the penalty added to their sum."""
        return float((self.log_likelihood + penalty) / array_namespace(self.counts).sum(self.counts))

    @property
    def sums(self) -> tuple[Array, ...]:
        """What adds."""
        return self.counts, self.first_moments, self.second_moments, self.log_likelihood

    def summed(self, sums: Iterable[Array]) -> "SufficientStatistics":
        """These statistics with other sums."""
        counts, first_moments, second_moments, log_likelihood = sums
        return SufficientStatistics(self.origin, counts, first_moments, second_moments, log_likelihood, self.precision)


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
