"""The EM loop: restarts, convergence, history."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gaussmix._engine import Fitting
from gaussmix._parameters import Parameters

logger = logging.getLogger("gaussmix")

# Sees (iteration, lower bound, parameters after it); what is true of its answer ends the loop.
Callback = Callable[[int, float, Parameters], Any]


class DivergedError(ValueError):
    """The log-likelihood is not finite."""


@dataclass(frozen=True)
class EMResult:
    """How far EM has come, and how it went."""

    parameters: Parameters
    lower_bounds: list[float]
    converged: bool


def is_converged(lower_bounds: Sequence[float], tolerance: float, previous: float = -math.inf) -> bool:
    """Whether the last change of the lower bounds, the first of them from `previous`, is below the tolerance."""
    return len(lower_bounds) > 0 and abs(lower_bounds[-1] - [previous, *lower_bounds][-2]) < tolerance


def run_em(
    engine: Fitting,
    start: Parameters,
    *,
    tolerance: float,
    max_iter: int,
    previous: float = -math.inf,
    history: Sequence[float] = (),
    callbacks: Sequence[Callback] = (),
) -> EMResult:
    """EM from `start` until the mean log-evidence changes by less than `tolerance`, at most `max_iter` times in all.

    `history` has the lower bounds of the iterations that led to `start`; without any, the first one is compared with
    `previous`.
    """
    result = EMResult(start, list(history), converged=False)
    while len(result.lower_bounds) < max_iter and not result.converged:
        done = result.lower_bounds
        progress = engine.advance(
            result.parameters,
            at_most=1 if callbacks else max_iter - len(done),
            previous=done[-1] if done else previous,
            tolerance=tolerance,
        )
        result = EMResult(progress.parameters, [*done, *progress.lower_bounds], progress.converged)
        iteration, bound = len(result.lower_bounds), result.lower_bounds[-1]
        if not math.isfinite(bound):
            raise DivergedError(
                f"the log-likelihood became {bound} in iteration {iteration}; rescale the data or start from means and "
                "covariances nearer to it"
            )
        answers = [callback(iteration, bound, result.parameters) for callback in callbacks]
        if any(answers):
            break
    logger.info("%d EM iterations on %s, %s", len(result.lower_bounds), engine.backend, engine.precision)
    return result


class ProgressBar:
    """A bar on stderr over the rows of all iterations: rows per second, time left, a `value` and its change."""

    def __init__(self, bar: Any, value: str, n: int) -> None:
        self._bar, self._value, self._n = bar, value, n
        self._last, self._iteration = math.nan, 0

    def __call__(self, iteration: int, found: float, parameters: Parameters | None = None) -> None:
        """After an iteration."""
        self._iteration = iteration
        self._bar.update(iteration * self._n - self._bar.n)
        self._bar.set_postfix_str(f"iteration {iteration}, {self._value} {found:.6g}, change {found - self._last:.3g}")
        self._last = found

    def read(self, rows: int) -> None:
        """After a block of rows within an iteration."""
        end = (self._iteration + 1) * self._n
        self._bar.update(min(rows, end - self._bar.n))


@contextmanager
def progress_bar(show: bool, max_iter: int, value: str, n: int) -> Iterator[ProgressBar | None]:
    """A bar for iterations over n rows; None unless `show`."""
    if not show:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(total=max_iter * n, unit="rows", unit_scale=True) as bar:
        yield ProgressBar(bar, value, n)


def return_to(engine: Fitting, form: str) -> None:
    """Have an engine use a form that it used before; one that it never had says nothing."""
    while form in engine.forms and engine.forms[0] != form:
        engine.fall_back("as before the fit was interrupted")


def best_of(results: Iterable[EMResult]) -> EMResult:
    """The result of highest final lower bound, the first of equals; without iterations, the first."""
    return max(results, key=lambda result: result.lower_bounds[-1] if result.lower_bounds else -math.inf)
