"""Where a fit stands, in a file that is always whole: what an interrupted fit goes on from.

The file is safetensors with JSON in its metadata, as saved estimators are: nothing in it is code.
"""

import dataclasses
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from gaussmix._arrays import to_numpy
from gaussmix._checks import check_integer, check_mixture
from gaussmix._covariance import COVARIANCES
from gaussmix._em import EMResult
from gaussmix._files import as_path, damaged, locked, read_arrays, replace, with_arrays
from gaussmix._parameters import Parameters
from gaussmix.rows._group import Group

# 1 did not say which rows and settings it was of.
FORMAT = 2
PARAMETERS = ("weights", "means", "covariances", "precision_cholesky")
# What `_dispatch`'s implementations call the forms of their E-steps.
FORMS = re.compile(r"(centred|expanded)-float(16x3|32|64)")
# What of an identity is a fingerprint.
DATA = "the data or its weights"
REMOVE_IT = "pass another path, or remove it to start anew"

T = TypeVar("T")


@dataclass(frozen=True)
class State:
    """Where a fit stands."""

    reached: EMResult  # in the start that is under way
    start: int = 0  # how many starts are done
    best: EMResult | None = None  # of those
    random_state: np.random.RandomState | None = None  # after the draws of the start that is under way


class Checkpoint:
    """A file in which a fit notes where it stands, every so many iterations.

    `identity` says what the fit is of: a file of another fit is refused. In a group, the first process alone reads and
    writes.
    """

    def __init__(
        self, path: str | bytes | os.PathLike[str], every: int, identity: dict[str, Any], group: Group | None = None
    ) -> None:
        check_integer("checkpoint_every", every, 1)
        try:
            self.path = as_path(path)
        except TypeError as error:
            raise TypeError(f"checkpoint must be the path of a file, got {path!r}") from error
        if "\0" in str(self.path):
            raise ValueError(f"checkpoint={path!r} has a null character in it, which no path has; pass another one")
        self.every, self._identity, self._group = every, identity, group

    def save(self, state: State) -> None:
        """Write the file aside and rename it."""
        self.in_first(lambda: self._write(state))

    def in_first(self, function: Callable[[], T]) -> T | None:
        """What the function gives in the only process, or the first one; None in the others."""
        return function() if self._group is None or self._group.rank == 0 else None

    def _write(self, state: State) -> None:
        arrays = _arrays("reached", state.reached)
        metadata: dict[str, Any] = {"format": FORMAT, "identity": self._identity, "form": state.reached.form}
        metadata |= {"start": state.start, "reached": state.reached.lower_bounds}
        if state.best is not None:
            arrays |= _arrays("best", state.best)
            metadata["best"] = state.best.lower_bounds
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

    @contextmanager
    def own(self) -> Iterator[None]:
        """The path for this fit alone; raises where what is there is no file that a checkpoint could replace."""
        name = f"checkpoint={str(self.path)!r}"
        if self.path.is_dir():
            raise IsADirectoryError(f"{name} is a directory; pass the path of a file")
        if self.path.is_symlink():
            raise ValueError(f"{name} is a link, which would be replaced; pass the path that it leads to")
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{name} is a pipe or a device; pass the path of a file")
        with ExitStack() as stack:
            with self._written():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                is_own = stack.enter_context(locked(self.path))
            if not is_own:
                raise ValueError(f"{name} belongs to a fit that is running; wait for it, or pass another path")
            yield

    def read(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The arrays and the metadata; None where nothing was saved yet. Raises for a file that is no checkpoint."""
        if not self.path.exists():
            return None
        arrays, metadata = read_arrays(self.path, REMOVE_IT)
        if not isinstance(metadata, dict) or not isinstance(metadata.get("identity"), dict):
            raise ValueError(f"{self.path} is no checkpoint; {REMOVE_IT}")
        return arrays, metadata

    def load(self) -> State | None:
        """Where the fit stood; None where nothing was saved yet."""
        found = self.read()
        if found is None:
            return None
        arrays, metadata = found
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{self.path} is no checkpoint of this version of gaussmix; {REMOVE_IT}")
        there = metadata["identity"]
        differing = [
            f"{name} is {reprlib.repr(there.get(name))} there and {reprlib.repr(value)} here" if name != DATA else DATA
            for name, value in self._identity.items()
            if there.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{self.path} is the checkpoint of another fit, which differs in: {'; '.join(differing)}; pass "
                "resume=False to start anew over it, or another path"
            )
        try:
            return _state(arrays, metadata)
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise damaged(self.path, f"{type(error).__name__}: {error}", REMOVE_IT) from error


def _arrays(prefix: str, result: EMResult) -> dict[str, Any]:
    return {
        f"{prefix}.{name}": to_numpy(getattr(result.parameters, name)).astype(np.float64, copy=False)
        for name in PARAMETERS
    }


# What is loaded: whoever wrote it, nothing else passes.


def _state(arrays: dict[str, Any], metadata: dict[str, Any]) -> State:
    start, n_starts = metadata["start"], metadata["identity"].get("n_init", 1)
    _require(type(start) is int and 0 <= start <= n_starts, "the number of starts that are done")
    _require("best" not in metadata or 0 < start < n_starts, "the best start")
    _require(FORMS.fullmatch(metadata["form"]) is not None, "the form of the E-step")
    best = _result("best", arrays, metadata) if "best" in metadata else None
    random_state = _generator(arrays, metadata["random_state"]) if "random_state" in metadata else None
    reached = dataclasses.replace(_result("reached", arrays, metadata), form=metadata["form"])
    return State(reached, start, best, random_state)


def _result(prefix: str, arrays: dict[str, Any], metadata: dict[str, Any]) -> EMResult:
    bounds, identity = metadata[prefix], metadata["identity"]
    is_list = isinstance(bounds, list) and all(type(bound) is float and math.isfinite(bound) for bound in bounds)
    _require(is_list, "the lower bounds")
    parameters = Parameters(*(arrays[f"{prefix}.{name}"] for name in PARAMETERS))
    k, d = identity.get("num_components", identity.get("n_components")), identity["shape"][1]
    covariance = COVARIANCES[identity["covariance_type"]]
    _require(parameters.means.shape == (k, d), "the number of components or features")
    check_mixture(parameters.weights, parameters.means, parameters.precision_cholesky, covariance, 1e-4)
    _require(all(value.dtype == np.float64 for value in vars(parameters).values()), "the dtype")
    covariances = parameters.covariances
    _require(covariances.shape == covariance.shape(k, d) and np.isfinite(covariances).all(), "the covariances")
    _require(covariance.variances(covariances).min() > 0, "the sign of variances")
    return EMResult(parameters, bounds, converged=False)


def _generator(arrays: dict[str, Any], rest: Any) -> np.random.RandomState:
    keys, (name, position, has_gauss, gauss) = arrays["random_state"], rest
    _require(name == "MT19937" and keys.dtype == np.uint32 and keys.shape == (624,), "the random numbers")
    # RandomState reads at any position, and beyond its memory.
    _require(type(position) is int and 0 <= position <= 624, "the position in the random numbers")
    is_number = type(has_gauss) is int and has_gauss in (0, 1) and type(gauss) is float and math.isfinite(gauss)
    _require(is_number, "the next random number")
    random_state = np.random.RandomState()
    random_state.set_state((name, keys, position, has_gauss, gauss))
    return random_state


def _require(is_so: Any, what: str) -> None:
    if not is_so:
        raise ValueError(f"{what} can not be so")


@contextmanager
def opened(
    path: str | bytes | os.PathLike[str] | None,
    every: int,
    identity: dict[str, Any],
    *,
    resume: bool,
    group: Group | None = None,
) -> Iterator[tuple[Checkpoint | None, State | None]]:
    """The checkpoint of a fit, which no other fit has at the same time, and where the fit stands in it."""
    if path is None:
        if resume:
            raise ValueError("resume=True goes on from a checkpoint; pass checkpoint, the path of its file")
        yield None, None
        return
    checkpoint = Checkpoint(path, every, identity, group)
    with ExitStack() as stack:

        def begin() -> State | None:
            stack.enter_context(checkpoint.own())
            if resume:
                return checkpoint.load()
            if checkpoint.path.exists() and checkpoint.path.stat().st_size:
                checkpoint.read()  # raises for what is not ours to write over
            return None

        state = checkpoint.in_first(begin)
        yield checkpoint, state if group is None else group.from_first(state)
