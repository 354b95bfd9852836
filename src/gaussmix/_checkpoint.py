"""Where a fit stands, in a file that is always whole: what an interrupted fit goes on from.

The file is safetensors with JSON in its metadata, as saved estimators are: nothing in it is code.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gaussmix._arrays import to_numpy
from gaussmix._distributed import Group
from gaussmix._em import Callback, EMResult, return_to, run_em
from gaussmix._engine import Fitting
from gaussmix._files import damaged, read_arrays, replace, with_arrays
from gaussmix._parameters import Parameters
from gaussmix._validation import check_integer

FORMAT = 1
PARAMETERS = ("weights", "means", "covariances", "precision_cholesky")
START_ANEW = "pass resume=False to start anew over it, or another path"


@dataclass(frozen=True)
class State:
    """Where a fit stands."""

    reached: EMResult  # in the start that is under way
    form: str  # of its E-step
    start: int = 0  # how many starts are done
    best: EMResult | None = None  # of those
    random_state: np.random.RandomState | None = None  # after the draws of the start that is under way


class Checkpoint:
    """A file in which a fit notes where it stands, every so many iterations.

    `identity` says what the fit is of: a file of another fit is refused.
    """

    def __init__(
        self, path: str | os.PathLike[str], every: int, identity: dict[str, Any], *, writes: bool = True
    ) -> None:
        check_integer("checkpoint_every", every, 1)
        self._writes = writes
        self.path, self.every, self._identity = Path(path), every, identity
        if self.path.is_dir():
            raise IsADirectoryError(f"checkpoint={str(path)!r} is a directory; pass the path of a file")
        with self._written():
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def save(self, state: State) -> None:
        """Write the file aside and rename it, in the process whose task it is."""
        if not self._writes:
            return
        arrays = _arrays("reached", state.reached)
        metadata: dict[str, Any] = {"format": FORMAT, "identity": self._identity, "form": state.form}
        metadata |= {"start": state.start, "reached": _history(state.reached)}
        if state.best is not None:
            arrays |= _arrays("best", state.best)
            metadata["best"] = _history(state.best)
        if state.random_state is not None:
            name, keys, *rest = state.random_state.get_state(legacy=True)
            arrays["random_state"] = keys
            metadata["random_state"] = [name, *rest]
        with self._written():
            replace(self.path, with_arrays(arrays, metadata))

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Says of an error which file it is about."""
        try:
            yield
        except OSError as error:
            why = f"checkpoint={str(self.path)!r} can not be written ({error}); pass a path where it can be"
            raise type(error)(error.errno, why) from error

    def load(self) -> State | None:
        """Where the fit stood; None where nothing was saved yet."""
        if not self.path.exists():
            return None
        arrays, metadata = read_arrays(self.path, START_ANEW)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or "identity" not in metadata:
            raise ValueError(f"{self.path} is no checkpoint of this version of gaussmix; {START_ANEW}")
        differing = [name for name, value in self._identity.items() if metadata["identity"].get(name) != value]
        if differing:
            there = {name: metadata["identity"].get(name) for name in differing}
            here = {name: self._identity[name] for name in differing}
            raise ValueError(f"{self.path} is the checkpoint of another fit ({there}, not {here}); {START_ANEW}")
        try:
            random_state = None
            if "random_state" in metadata:
                name, *rest = metadata["random_state"]
                random_state = np.random.RandomState()
                random_state.set_state((name, arrays["random_state"], *rest))
            best = _result("best", arrays, metadata["best"]) if "best" in metadata else None
            reached = _result("reached", arrays, metadata["reached"])
            return State(reached, metadata["form"], metadata["start"], best, random_state)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(self.path, error, START_ANEW) from error


def _arrays(prefix: str, result: EMResult) -> dict[str, Any]:
    return {f"{prefix}.{name}": to_numpy(getattr(result.parameters, name)) for name in PARAMETERS}


def _history(result: EMResult) -> dict[str, Any]:
    return {"lower_bounds": result.lower_bounds, "converged": result.converged}


def _result(prefix: str, arrays: dict[str, Any], history: dict[str, Any]) -> EMResult:
    return EMResult(Parameters(*(arrays[f"{prefix}.{name}"] for name in PARAMETERS)), **history)


def opened(
    path: str | os.PathLike[str] | None,
    every: int,
    identity: dict[str, Any],
    *,
    resume: bool,
    group: Group | None = None,
) -> tuple[Checkpoint | None, State | None]:
    """The checkpoint of a fit, and where it stands in it; in a group, the first process reads and writes."""
    if path is None:
        if resume:
            raise ValueError("resume=True goes on from a checkpoint; pass checkpoint, the path of its file")
        return None, None
    checkpoint = Checkpoint(path, every, identity, writes=group is None or group.rank == 0)
    if not resume:
        return checkpoint, None
    if group is None:
        return checkpoint, checkpoint.load()
    return checkpoint, group.from_first(checkpoint.load() if group.rank == 0 else None)


def run(
    engine: Fitting,
    start: Callable[[], Parameters],
    *,
    tolerance: float,
    max_iter: int,
    previous: float = -math.inf,
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoint | None = None,
    state: State | None = None,
    noted: Callable[[EMResult, str], State] = State,
) -> EMResult:
    """`run_em` from a start, or from where `state` stands, noted in a checkpoint.

    `noted` makes a state of how far EM has come and of the form that it is in.
    """
    if state is None:
        reached = EMResult(start(), [], converged=False)
    else:
        parameters = state.reached.parameters.moved(engine.rows.like, engine.rows.dtype)
        reached = dataclasses.replace(state.reached, parameters=parameters)
        return_to(engine, state.form)
    bounds = list(reached.lower_bounds)

    def note(result: EMResult) -> None:
        if checkpoint is not None:
            checkpoint.save(noted(result, engine.forms[0]))

    def note_sometimes(iteration: int, bound: float, parameters: Parameters) -> None:
        bounds.append(bound)
        if checkpoint is not None and iteration % checkpoint.every == 0:
            before = bounds[-2] if len(bounds) > 1 else previous
            note(EMResult(parameters, list(bounds), converged=abs(bound - before) < tolerance))

    note(reached)
    if reached.converged:
        return reached
    reached = run_em(
        engine,
        reached.parameters,
        tolerance=tolerance,
        max_iter=max_iter,
        previous=previous,
        history=reached.lower_bounds,
        callbacks=callbacks if checkpoint is None else [note_sometimes, *callbacks],
    )
    note(reached)
    return reached
