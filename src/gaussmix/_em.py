"""The EM loop: restarts, convergence, history."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gaussmix._engine import Fitting
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
    engine: Fitting,
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


@contextmanager
def progress_bar(show: bool, max_iter: int, value: str) -> Iterator[Callable[..., None] | None]:
    """A bar on stderr that shows the iteration, a `value` by this name, and its change; None unless `show`."""
    if not show:
        yield None
        return
    from tqdm.auto import tqdm

    last = math.nan
    with tqdm(total=max_iter, unit="iteration") as bar:

        def update(iteration: int, found: float, parameters: Parameters | None = None) -> None:
            nonlocal last
            bar.update(iteration - bar.n)
            bar.set_postfix_str(f"{value} {found:.6g}, change {found - last:.3g}")
            last = found

        yield update


def best_of(results: Iterable[EMResult]) -> EMResult:
    """The result of highest final lower bound, the first of equals; without iterations, the first."""
    return max(results, key=lambda result: result.lower_bounds[-1] if result.lower_bounds else -math.inf)
