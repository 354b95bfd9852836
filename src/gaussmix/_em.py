"""The EM loop: forms of the E-step, convergence, history."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from gaussmix._arrays import array_namespace
from gaussmix._density import Density
from gaussmix._guard import CENTRED, Forms
from gaussmix._objective import MaximumLikelihood, Objective
from gaussmix._parameters import Parameters, SingularCovarianceError, SufficientStatistics
from gaussmix.backends._engine import Engine

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
    form: str = ""  # of the next E-step; the fastest one where none is named
    precision: str = ""  # the arithmetic of the last E-step


def is_converged(lower_bounds: Sequence[float], tolerance: float, previous: float = -math.inf) -> bool:
    """Whether the last change of the lower bounds, the first of them from `previous`, is below the tolerance."""
    return len(lower_bounds) > 0 and abs(lower_bounds[-1] - [previous, *lower_bounds][-2]) < tolerance


def run_em(
    engine: Engine,
    objective: Objective,
    begun: EMResult,
    *,
    tolerance: float,
    max_iter: int,
    previous: float = -math.inf,
    callbacks: Sequence[Callback] = (),
    note: Callable[[EMResult], None] | None = None,
) -> EMResult:
    """EM from where it stands until the lower bound changes by less than `tolerance`, at most `max_iter` times in all.

    Without iterations so far, the first bound is compared with `previous`. `note` sees where EM stands after each
    iteration, before the callbacks do.
    """
    bounds, converged = list(begun.lower_bounds), begun.converged
    at = _State(begun.parameters, objective.density(begun.parameters), _from(engine.forms, begun.form))
    del begun
    is_watched = bool(callbacks) or note is not None
    # Once for all iterations, but callbacks are to have the threads that the caller has.
    whole, each = (nullcontext, engine.during_steps) if is_watched else (engine.during_steps, nullcontext)
    with whole():
        if len(bounds) < max_iter and not converged:
            at = replace(at, forms=engine.choose(at.forms, at.density))
        while len(bounds) < max_iter and not converged:
            at_most, last = 1 if is_watched else max_iter - len(bounds), bounds[-1] if bounds else previous
            with each():
                at = _advance(engine, objective, at, at_most, last, tolerance)
            bounds.extend(at.bounds)
            converged = is_converged(bounds, tolerance, previous)
            if not math.isfinite(bounds[-1]):
                raise DivergedError(
                    f"the log-likelihood became {bounds[-1]} in iteration {len(bounds)}; rescale the data or start "
                    "from means and covariances nearer to it"
                )
            if note is not None:
                note(EMResult(at.parameters, list(bounds), False, at.forms[0].precision, at.precision))
            answers = [callback(len(bounds), bounds[-1], at.parameters) for callback in callbacks]
            if any(answers):
                break
    precision = at.precision or at.forms[0].precision
    logger.info("%d EM iterations on %s, %s", len(bounds), engine.backend, precision)
    return EMResult(at.parameters, bounds, converged, at.forms[0].precision, precision)


def stepwise(
    engine: Engine, objective: MaximumLikelihood, parameters: Parameters, size: float
) -> tuple[float, Parameters, str]:
    """One iteration of stepwise EM: statistics move by `size` of the way to those of the rows.

    The lower bound of the rows, the parameters after it and the arithmetic. Online EM of Cappe and Moulines (2009), J.
    R. Statist. Soc. B 71, 593-613, in the form of Liang and Klein (2009).
    """
    before = objective.statistics_of(parameters).scaled(1 - size)

    def blend(statistics: SufficientStatistics) -> SufficientStatistics:
        total = float(array_namespace(statistics.counts).sum(statistics.counts))
        return before + statistics.about(parameters.means, objective.covariance).scaled(size / total)

    density = objective.density(parameters)
    at = _iterate(engine, objective, _State(parameters, density, engine.choose(engine.forms, density)), blend)
    return at.bounds[0], at.parameters, at.precision


def _from(forms: Forms, name: str) -> Forms:
    """The forms from the one of this name on; all of them where there is none."""
    return next((forms[i:] for i, form in enumerate(forms) if form.precision == name), forms)


@dataclass(frozen=True)
class _State:
    """Where the loop stands after some iterations."""

    parameters: Parameters
    density: Density  # of the parameters
    forms: Forms  # that are left
    precision: str = ""  # the arithmetic of the last E-step
    bounds: tuple[float, ...] = ()  # of those iterations


def _advance(
    engine: Engine, objective: Objective, at: _State, at_most: int, previous: float, tolerance: float
) -> _State:
    """Up to `at_most` iterations: one, or several where kernels have the M-step as well."""
    at = replace(at, bounds=())
    while engine.advance is not None and objective.kernels_add is not None and at.forms[0].has_kernels:
        form = at.forms[0]
        found = engine.advance(at.parameters, at.density, form, objective.kernels_add, at_most, previous, tolerance)
        density = objective.density(found.parameters)
        at = _State(found.parameters, density, at.forms, form.precision, found.lower_bounds)
        if found.reason:
            if len(at.forms) == 1:
                break  # the host names the component that is singular, or its own step counts
            at = replace(at, forms=engine.next_form(at.forms, found.reason))
        if at.bounds:
            return at
    return _iterate(engine, objective, at)


def _iterate(
    engine: Engine,
    objective: Objective,
    at: _State,
    blend: Callable[[SufficientStatistics], SufficientStatistics] = lambda statistics: statistics,
) -> _State:
    """One iteration, in the first of the forms that is exact enough for what comes out.

    `blend` makes of the statistics of the rows those that the M-step sees.
    """
    forms, before = at.forms, at.parameters
    while True:
        statistics = engine.expect(at.density, forms[0])
        precision = statistics.precision or forms[0].precision
        bound = statistics.lower_bound(objective.penalty(before))
        is_last = len(forms) == 1
        if not math.isfinite(bound):
            if is_last:
                return replace(at, precision=precision, bounds=(*at.bounds, bound))
            forms = engine.next_form(forms, f"the log-likelihood came out as {bound}")
            continue
        try:
            after = objective.maximize(blend(statistics), before.means)
        except SingularCovarianceError:
            if is_last:
                raise
            forms = engine.next_form(forms, "a covariance came out singular")
            continue
        density = objective.density(after)
        # The moments cancel as far as the new parameters say; those that are centred do not.
        left = engine.choose(forms, density, (before.weights, after.weights))
        if left == forms or precision == CENTRED.precision:
            return _State(after, density, left, precision, (*at.bounds, bound))
        forms = left


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


def best_of(results: Iterable[EMResult]) -> EMResult:
    """The result of highest final lower bound, the first of equals; without iterations, the first."""
    return max(results, key=lambda result: result.lower_bounds[-1] if result.lower_bounds else -math.inf)
