"""What an implementation of EM and k-means offers to the loops and the estimators, and the iteration they share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

from gaussmix._arrays import array_namespace
from gaussmix._covariance import Covariance
from gaussmix._data import Described, Rows, Stream
from gaussmix._parameters import (
    Parameters,
    SingularCovarianceError,
    SufficientStatistics,
    maximize,
    statistics_of,
)
from gaussmix._typing import Array


@dataclass(frozen=True)
class Progress:
    """What `Engine.advance` did: the parameters it reached and the lower bound of each iteration's E-step."""

    parameters: Parameters
    lower_bounds: tuple[float, ...]
    converged: bool


class Fitting(Protocol):
    """EM on one data set for one covariance type, in one implementation."""

    covariance: Covariance
    reg_covar: float
    backend: str

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of the E-step that are left, the one in use first, the most exact last."""

    def fall_back(self, reason: str) -> None:
        """Leave the form in use for the next one."""

    @property
    def precision(self) -> str:
        """The arithmetic of the E-step that is in use."""

    @property
    def rows(self) -> Described:
        """The rows, in the library that computes."""

    def assign(self, means: Array, origin: Array) -> SufficientStatistics:
        """Statistics about `origin` (k, d) of the rows that are nearest to each of `means` (k, d)."""

    def spread(self, k: int, draw: Callable[[int], Array]) -> SufficientStatistics:
        """Statistics for the responsibilities (b, k), on the host, that `draw(b)` gives for the next b rows."""

    def expect(self, parameters: Parameters) -> SufficientStatistics:
        """The E-step: statistics of all rows."""

    def advance(self, parameters: Parameters, *, at_most: int, previous: float, tolerance: float) -> Progress:
        """Up to `at_most` EM iterations; stops where a lower bound is within `tolerance` of the one before."""


class Engine(Fitting, Protocol):
    """EM and inference."""

    @property
    def rows(self) -> Rows | Stream:
        """The rows, in the library that computes."""

    def log_evidence(self, parameters: Parameters) -> Array:
        """Log-density of each row under the mixture: (n,)."""

    def responsibilities(self, parameters: Parameters) -> Array:
        """Posterior probability of each component given the row: (n, k)."""

    def labels(self, parameters: Parameters) -> Array:
        """The component of largest responsibility for each row: (n,)."""


class Steps(Protocol):
    """What an iteration needs: an E-step whose form can be left where it is not exact enough."""

    covariance: Covariance
    reg_covar: float

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of the E-step that are left, the one in use first, the most exact last."""

    def expect(self, parameters: Parameters) -> SufficientStatistics:
        """The E-step: statistics of all rows."""

    def is_exact_for(self, parameters: Parameters) -> bool:
        """Whether statistics in the form in use are exact enough for an M-step to these; the form is left where not."""

    def fall_back(self, reason: str) -> None:
        """Leave the form in use for the next one."""


class BlockEngine(Engine, Steps, Protocol):
    """An engine for rows in memory, which may be a block of a data set."""

    # What saves work in the next pass over the same rows, and is nothing but that.
    hints: Array | None

    def on(self, rows: Rows) -> Self:
        """The engine for other rows: about the same point, in the same form from now on."""


class Clusters(Protocol):
    """k-means on one data set, in one implementation."""

    @property
    def rows(self) -> Rows | Stream:
        """The rows, in the library that computes."""

    def labels(self, centroids: Array) -> Array:
        """The centroid nearest to each row, the first of equals: (n,)."""

    def squared_distances(self, centroids: Array) -> Array:
        """Squared distance of each row, of weight 0 or not, to the nearest centroid: (n,)."""

    def sums(self, centroids: Array, origin: Array) -> tuple[Array, Array]:
        """Weight of the rows that are nearest to each centroid (k,), and the sums of their x - origin (k, d)."""


def stepwise(steps: Steps, parameters: Parameters, size: float) -> tuple[float, Parameters]:
    """One iteration of stepwise EM: statistics move by `size` of the way to those of the rows.

    Online EM of Cappe and Moulines (2009), J. R. Statist. Soc. B 71, 593-613, in the form of Liang and Klein (2009).
    """
    before = statistics_of(parameters, steps.covariance, steps.reg_covar).scaled(1 - size)

    def blend(statistics: SufficientStatistics) -> SufficientStatistics:
        total = float(array_namespace(statistics.counts).sum(statistics.counts))
        return before + statistics.about(parameters.means, steps.covariance).scaled(size / total)

    steps.is_exact_for(parameters)
    return iterate(steps, parameters, blend)


def advance(steps: Steps, parameters: Parameters, *, at_most: int, previous: float, tolerance: float) -> Progress:
    """`Engine.advance` by E-steps and M-steps."""
    bounds: list[float] = []
    converged = False
    while len(bounds) < at_most and not converged:
        bound, parameters = iterate(steps, parameters)
        bounds.append(bound)
        if not math.isfinite(bound):
            break
        converged = abs(bound - previous) < tolerance
        previous = bound
    return Progress(parameters, tuple(bounds), converged)


def iterate(
    steps: Steps,
    parameters: Parameters,
    blend: Callable[[SufficientStatistics], SufficientStatistics] = lambda statistics: statistics,
) -> tuple[float, Parameters]:
    """One EM iteration: the lower bound of `parameters`, and the parameters after it.

    `blend` makes of the statistics of the rows those that the M-step sees.
    """
    while True:
        statistics = steps.expect(parameters)
        bound = statistics.lower_bound
        if not math.isfinite(bound):
            if len(steps.forms) == 1:
                return bound, parameters
            steps.fall_back(f"the log-likelihood came out as {bound}")
            continue
        try:
            new = maximize(blend(statistics), parameters.means, steps.covariance, steps.reg_covar)
        except SingularCovarianceError:
            if len(steps.forms) == 1:
                raise
            steps.fall_back("a covariance came out singular")
            continue
        if steps.is_exact_for(new):
            return bound, new


class Summed:
    """EM whose statistics are sums of those of blocks; which form they are in is up to the engine of the blocks."""

    rows: Any

    def __init__(self, rows: Described, on_block: BlockEngine) -> None:
        self.rows, self._on_block = rows, on_block
        self.covariance, self.reg_covar, self.backend = on_block.covariance, on_block.reg_covar, on_block.backend

    @property
    def precision(self) -> str:
        """The arithmetic of the E-step that is in use."""
        return self._on_block.precision

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of the E-step that are left, the one in use first, the most exact last."""
        return self._on_block.forms

    def is_exact_for(self, parameters: Parameters) -> bool:
        """Whether the form in use is exact enough for an M-step to these parameters; it is left where not."""
        return self._on_block.is_exact_for(parameters)

    def fall_back(self, reason: str) -> None:
        """Leave the form in use for the next one."""
        self._on_block.fall_back(reason)

    def expect(self, parameters: Parameters) -> SufficientStatistics:
        """The E-step: statistics of all rows."""
        raise NotImplementedError

    def advance(self, parameters: Parameters, *, at_most: int, previous: float, tolerance: float) -> Progress:
        """Up to `at_most` EM iterations; stops where a lower bound is within `tolerance` of the one before."""
        self.is_exact_for(parameters)
        return advance(self, parameters, at_most=at_most, previous=previous, tolerance=tolerance)
