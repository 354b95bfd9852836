"""What EM maximises: how parameters follow from statistics, and the density that an E-step reads of them."""

from dataclasses import dataclass
from typing import Protocol

from gaussmix._arrays import array_namespace
from gaussmix._covariance import Covariance
from gaussmix._density import Density, log_offsets
from gaussmix._parameters import Parameters, SufficientStatistics, singular_covariance
from gaussmix._typing import Array


class Objective(Protocol):
    """A value, picklable: it travels to other processes."""

    @property
    def covariance(self) -> Covariance:
        """The covariance type."""

    @property
    def kernels_add(self) -> float | None:
        """What the M-step that GPU kernels have of their own adds to each variance; None where it is not theirs."""

    def covariances(self, statistics: SufficientStatistics) -> Array:
        """Those that `maximize` gives, positive definite or not."""

    def maximize(self, statistics: SufficientStatistics, means: Array) -> Parameters:
        """The M-step. A component without rows keeps its place: its mean stays that of `means` (k, d)."""

    def density(self, parameters: Parameters) -> Density:
        """What the next E-step reads."""

    def penalty(self, parameters: Parameters) -> float:
        """What is added to the log-likelihood of all rows in the lower bound."""


@dataclass(frozen=True)
class MaximumLikelihood:
    """The largest likelihood, with `reg_covar` added to each variance."""

    covariance: Covariance
    reg_covar: float

    @property
    def kernels_add(self) -> float | None:
        """What the M-step that GPU kernels have of their own adds to each variance."""
        return self.reg_covar

    def covariances(self, statistics: SufficientStatistics) -> Array:
        """Those that `maximize` gives, positive definite or not."""
        return self.covariance.regularize(statistics.covariances(self.covariance), self.reg_covar)

    def maximize(self, statistics: SufficientStatistics, means: Array) -> Parameters:
        """The parameters of largest likelihood for these statistics.

        Raises SingularCovarianceError for a covariance that is not positive definite.
        """
        xp = array_namespace(statistics.counts)
        counts = statistics.counts
        covariances = self.covariances(statistics)
        precision_cholesky = self.covariance.precision_cholesky(covariances)
        if not bool(xp.all(xp.isfinite(precision_cholesky))):
            component = self.covariance.first_singular(precision_cholesky)
            count = xp.sum(counts) if component is None else counts[component]
            raise singular_covariance(component, float(count), self.reg_covar)
        return Parameters(counts / xp.sum(counts), statistics.means(means), covariances, precision_cholesky)

    def density(self, parameters: Parameters) -> Density:
        """The mixture with these parameters."""
        weights, means, covariances, factor = vars(parameters).values()
        offsets = log_offsets(weights, factor, self.covariance, means.shape[1])
        return Density(offsets, means, covariances, factor, self.covariance)

    def penalty(self, parameters: Parameters) -> float:
        """Nothing: the bound is the likelihood."""
        return 0.0

    def statistics_of(self, parameters: Parameters) -> SufficientStatistics:
        """Statistics of weight 1 in all from which `maximize` makes these parameters; without a likelihood."""
        weights, means = parameters.weights, parameters.means
        estimated = self.covariance.regularize(parameters.covariances, -self.reg_covar)
        second_moments = self.covariance.scatter(estimated, weights, means.shape[1])
        return SufficientStatistics(means, weights, 0 * means, second_moments, 0 * weights[0])


def density_of(parameters: Parameters, covariance: Covariance) -> Density:
    """The mixture with these parameters, whatever they were fitted for."""
    return MaximumLikelihood(covariance, 0.0).density(parameters)
