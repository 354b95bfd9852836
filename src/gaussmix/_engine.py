"""What an implementation of EM and k-means offers to the loops and the estimators."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gaussmix._data import Rows
from gaussmix._parameters import Parameters, SufficientStatistics
from gaussmix._typing import Array


@dataclass(frozen=True)
class Progress:
    """What `Engine.advance` did: the parameters it reached and the lower bound of each iteration's E-step."""

    parameters: Parameters
    lower_bounds: tuple[float, ...]
    converged: bool


class Engine(Protocol):
    """EM and inference on one data set for one covariance type, in one implementation."""

    @property
    def backend(self) -> str:
        """Name of the implementation."""

    @property
    def precision(self) -> str:
        """The arithmetic of the E-step that is in use."""

    @property
    def rows(self) -> Rows:
        """The rows, in the library that computes."""

    def from_means(self, means: Array) -> Parameters:
        """Parameters of the rows that are nearest to each of `means` (k, d)."""

    def from_responsibilities(self, k: int, draw: Callable[[int], Array]) -> Parameters:
        """Parameters for the responsibilities (b, k), on the host, that `draw(b)` gives for the next b rows."""

    def expect(self, parameters: Parameters) -> SufficientStatistics:
        """The E-step: statistics of all rows."""

    def advance(self, parameters: Parameters, *, at_most: int, previous: float, tolerance: float) -> Progress:
        """Up to `at_most` EM iterations; stops where a lower bound is within `tolerance` of the one before."""

    def log_evidence(self, parameters: Parameters) -> Array:
        """Log-density of each row under the mixture: (n,)."""

    def responsibilities(self, parameters: Parameters) -> Array:
        """Posterior probability of each component given the row: (n, k)."""

    def labels(self, parameters: Parameters) -> Array:
        """The component of largest responsibility for each row: (n,)."""


class Clusters(Protocol):
    """k-means on one data set, in one implementation."""

    @property
    def rows(self) -> Rows:
        """The rows, in the library that computes."""

    def labels(self, centroids: Array) -> Array:
        """The centroid nearest to each row, the first of equals: (n,)."""

    def squared_distances(self, centroids: Array) -> Array:
        """Squared distance of each row, of weight 0 or not, to the nearest centroid: (n,)."""

    def sums(self, centroids: Array, origin: Array) -> tuple[Array, Array]:
        """Weight of the rows that are nearest to each centroid (k,), and the sums of their x - origin (k, d)."""
