"""The EM loop: restarts, convergence, history."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gaussmix._engine import Engine
from gaussmix._parameters import Parameters

logger = logging.getLogger("gaussmix")

Callback = Callable[[int, float, Parameters], None]


@dataclass(frozen=True)
class EMResult:
    """Where EM ended, and how it went."""

    parameters: Parameters
    lower_bounds: list[float]
    converged: bool


def run_em(
    engine: Engine,
    start: Parameters,
    *,
    tolerance: float,
    max_iter: int,
    previous: float = -math.inf,
    callback: Callback | None = None,
) -> EMResult:
    """EM from `start` until the mean log-evidence changes by less than `tolerance`, at most `max_iter` times.

    `previous` is the lower bound that the first one is compared with. `callback` sees (iteration, lower bound,
    parameters) after each iteration.
    """
    parameters, lower_bounds, converged = start, list[float](), False
    while len(lower_bounds) < max_iter and not converged:
        at_most = 1 if callback else max_iter - len(lower_bounds)
        progress = engine.advance(parameters, at_most=at_most, previous=previous, tolerance=tolerance)
        parameters, converged = progress.parameters, progress.converged
        lower_bounds.extend(progress.lower_bounds)
        previous = lower_bounds[-1]
        if not math.isfinite(previous):
            raise ValueError(
                f"the log-likelihood became {previous} in iteration {len(lower_bounds)}; rescale the data or start "
                "from means and covariances nearer to it"
            )
        if callback:
            callback(len(lower_bounds), previous, parameters)
    logger.info("%d EM iterations on %s, %s", len(lower_bounds), engine.backend, engine.precision)
    return EMResult(parameters, lower_bounds, converged)


def best_of(results: Iterable[EMResult]) -> EMResult:
    """The result of highest final lower bound, the first of equals; without iterations, the first."""
    return max(results, key=lambda result: result.lower_bounds[-1] if result.lower_bounds else -math.inf)
