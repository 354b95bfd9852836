"""A fit: what it was told, as a value, and the one function that runs it for both estimators and in every process."""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from gaussmix._arrays import asarray_like
from gaussmix._em import Callback, DivergedError, EMResult, best_of, is_converged, progress_bar, run_em
from gaussmix._initialization import find_means, initialize
from gaussmix._objective import MaximumLikelihood, Objective
from gaussmix._parameters import Parameters, SingularCovarianceError
from gaussmix._typing import Array
from gaussmix._warnings import warn_user
from gaussmix.backends._dispatch import engine
from gaussmix.backends._engine import Engine
from gaussmix.rows._data import Rows, Stream
from gaussmix.rows._processes import Share
from gaussmix.storage._checkpoint import State, opened


class Start(Protocol):
    """Where EM starts."""

    def __call__(self, on_rows: Engine, objective: Objective, random_state: np.random.RandomState) -> Parameters:
        """Parameters for these rows."""


@dataclass(frozen=True)
class Found:
    """A start that is found in the data, but for what is given."""

    k: int
    strategy: str
    means: Array | None = None  # that each row is to belong to the nearest of
    given: dict[str, Array] = field(default_factory=dict)  # arrays of `Parameters` that are taken as they are
    keeps_means: bool = False  # for those that nobody improves on: without iterations, seeds are the means

    def __call__(self, on_rows: Engine, objective: Objective, random_state: np.random.RandomState) -> Parameters:
        """Parameters for these rows."""
        rows, means = on_rows.rows, self.means
        given = {name: asarray_like(value, rows.like, rows.dtype) for name, value in self.given.items()}
        if {"weights", "means", "precision_cholesky"} <= given.keys():
            return Parameters(**given)
        if means is None and self.strategy in ("kmeans++", "random_from_data"):
            means = find_means(rows, self.k, self.strategy, random_state)
        found = initialize(on_rows, objective, self.k, self.strategy, random_state, means)
        if self.keeps_means and means is not None:
            found = replace(found, means=asarray_like(means, rows.like, rows.dtype))
        return replace(found, **given)


@dataclass(frozen=True)
class Continued:
    """A start from parameters that are known."""

    parameters: Parameters

    def __call__(self, on_rows: Engine, objective: Objective, random_state: np.random.RandomState) -> Parameters:
        """The parameters."""
        return self.parameters.moved(on_rows.rows.like, on_rows.rows.dtype)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A fit, apart from its data and its random numbers; picklable, for other processes."""

    objective: MaximumLikelihood
    start: Start
    tolerance: float
    max_iter: int
    n_init: int = 1
    previous: float = -math.inf  # the bound that the first one is compared with
    shows_bar: bool = False
    verbose: int = 0  # what is printed of each start, as scikit-learn has it
    verbose_interval: int = 10
    callback: Callback | None = None
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int = 10
    identity: dict[str, Any] = field(default_factory=dict)  # what a checkpoint is of
    resume: bool = False

    def __call__(self, rows: Rows | Stream | Share, random_state: np.random.RandomState) -> tuple[EMResult, str]:
        """The best of the starts, and the implementation that ran."""
        group, callback = None, self.callback
        if isinstance(rows, Share):
            group = rows.group
            random_state, callback = group.from_first(random_state), group.agreed(callback)
        shows_bar = self.shows_bar and (group is None or group.rank == 0)
        with (
            opened(self.checkpoint, self.checkpoint_every, self.identity, resume=self.resume, group=group) as noted,
            progress_bar(shows_bar, self.max_iter, "log-likelihood", rows.shape[0]) as bar,
        ):
            checkpoint, state = noted
            if bar is not None and isinstance(rows, Stream):
                rows = rows.watched(bar.read)
            on_rows = engine(rows, self.objective.covariance, level=logging.INFO)
            callbacks = [each for each in (bar, callback) if each is not None]
            save = None if checkpoint is None else checkpoint.save
            return self._best(on_rows, random_state, state, callbacks, save), on_rows.backend

    def _best(
        self,
        on_rows: Engine,
        random_state: np.random.RandomState,
        state: State | None,
        callbacks: list[Callback],
        save: Callable[[State], None] | None,
    ) -> EMResult:
        """The best of `n_init` starts, some of which may be done in `state`."""

        def run_from(i: int, state: State | None, best: EMResult | None) -> EMResult:
            def note(reached: EMResult) -> None:
                if save is not None:
                    save(State(reached, i, best, random_state))

            return self._run(on_rows, i, random_state, state, callbacks, None if save is None else note)

        first, before = (0, None) if state is None else (state.start, state.best)
        if state is not None and state.random_state is not None:
            random_state = state.random_state
        best, failures = before, []
        for i in range(first, self.n_init):
            try:
                found = run_from(i, state, best)
                best = found if best is None else best_of([best, found])
            except (SingularCovarianceError, DivergedError) as error:
                failures.append(error)
            state = None
        if failures and best is None:
            raise failures[0]
        if failures:
            warn_user(
                f"{len(failures)} of {self.n_init} starts failed, and the best of the others is kept; "
                f"the first failure: {failures[0]}",
                ConvergenceWarning,
            )
        if best is not None and best is before:
            # It was done with another tolerance, or with fewer iterations.
            best = replace(best, converged=is_converged(best.lower_bounds, self.tolerance))
            if not best.converged and len(best.lower_bounds) < self.max_iter:
                state = State(best)
        if state is not None:
            best = run_from(self.n_init, state, None)
        assert best is not None
        # Of what a checkpoint has of a start that is done, the arithmetic is not known.
        return replace(best, precision=best.precision or best.form or on_rows.forms[0].precision)

    def _run(
        self,
        on_rows: Engine,
        index: int,
        random_state: np.random.RandomState,
        state: State | None,
        callbacks: list[Callback],
        note: Callable[[EMResult], None] | None,
    ) -> EMResult:
        """EM from one start, or from where `state` stands."""
        done = [] if state is None else state.reached.lower_bounds
        is_finished, printed = is_converged(done, self.tolerance, self.previous), None
        if self.verbose:
            printed = _Printed(self.verbose, self.verbose_interval, index, done[-1] if done else self.previous)
            callbacks = [printed, *callbacks]

        def begun() -> EMResult:
            if state is None:
                with on_rows.during_steps():
                    parameters = self.start(on_rows, self.objective, random_state)
                found = EMResult(parameters, [], converged=False, form=on_rows.forms[0].precision)
            else:
                parameters = state.reached.parameters.moved(on_rows.rows.like, on_rows.rows.dtype)
                found = replace(state.reached, parameters=parameters, converged=is_finished)
            if note is not None:
                note(found)
            return found

        def note_sometimes(reached: EMResult) -> None:
            if note is not None and len(reached.lower_bounds) % self.checkpoint_every == 0:
                note(reached)

        # Nobody but EM holds what it begins with, which may be as large as all that it computes.
        result = run_em(
            on_rows,
            self.objective,
            begun(),
            tolerance=self.tolerance,
            max_iter=self.max_iter,
            previous=self.previous,
            callbacks=callbacks,
            note=None if note is None else note_sometimes,
        )
        if note is not None and not is_finished:
            note(result)
        if printed is not None and self.max_iter:
            printed.end(result)
        return result


class _Printed:
    """Prints what scikit-learn prints about a start: times and changes where `verbose` > 1."""

    def __init__(self, verbose: int, interval: int, index: int, previous: float) -> None:
        self._details, self._interval, self._bound = verbose > 1, interval, previous
        self._began = self._last = time.perf_counter()
        print(f"Initialization {index}")

    def __call__(self, iteration: int, lower_bound: float, parameters: Parameters) -> None:
        change, self._bound = lower_bound - self._bound, lower_bound
        if iteration % self._interval:
            return
        now = time.perf_counter()
        details = f"\t time lapse {now - self._last:.5f}s\t ll change {change:.5f}" if self._details else ""
        self._last = now
        print(f"  Iteration {iteration}{details}")

    def end(self, result: EMResult) -> None:
        """After the last iteration."""
        elapsed = time.perf_counter() - self._began
        details = f" time lapse {elapsed:.5f}s\t lower bound {self._bound:.5f}." if self._details else ""
        print(f"Initialization {'converged' if result.converged else 'did not converge'}.{details}")
