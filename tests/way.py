"""The way of a fit through the code: which files call which, from `fit` to the hot loop, and how many are entered.

`TRITON_INTERPRET=1 python tests/way.py` prints both for each class and each place where rows may be; CONTRIBUTING.md
has what it prints.
"""

import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import gaussmix
from gaussmix import GaussianMixture
from gaussmix.sklearn import GaussianMixture as SklearnMixture

ROOTS = [Path(gaussmix.__file__).parent, Path(gaussmix.__file__).parents[2] / "kernels"]
# Where an iteration's time goes: the softmax of a slab of rows, or the launch of a kernel.
HOT = ("_softmax", "launch")
X = np.random.RandomState(0).normal(size=(20, 2)) + 5 * (np.arange(20)[:, None] % 2)
CLASSES = {"gaussmix": GaussianMixture, "gaussmix.sklearn": SklearnMixture}


class Blocks:
    """X, a block at a time."""

    def __iter__(self):
        return iter([X[:12], X[12:]])


def fitted(cls, x=X, **settings):
    """A fit of one iteration."""
    ends = {"trainer_params": {"max_epochs": 1}} if cls is GaussianMixture else {"max_iter": 1}
    return cls(2, random_state=0, covariance_type="diag", **ends).fit(x, **settings)


def dask(cls):
    """Blocks as tasks, in this thread."""
    import dask.array

    with dask.config.set(scheduler="synchronous"):
        return fitted(cls, dask.array.from_array(X, chunks=(12, 2)))


def interpreter(cls):
    """The kernels, in Triton's interpreter."""
    os.environ["GAUSSMIX_BACKEND"] = "triton"
    import torch

    try:
        return fitted(cls, torch.asarray(X))
    finally:
        del os.environ["GAUSSMIX_BACKEND"]


def processes(cls):
    """The first of two processes, which are threads here."""
    from gaussmix import _methods
    from test_distributed import groups_of

    original = _methods.process_group
    _methods.process_group = lambda distributed, X, device: distributed
    groups = groups_of(2)
    try:
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda: fitted(cls, X[12:], distributed=groups[1]))
            found = fitted(cls, X[:12], distributed=groups[0])
            other.result()
        return found
    finally:
        _methods.process_group = original


PLACES = {
    "memory": fitted,
    "blocks": partial(fitted, x=Blocks()),
    "Dask": dask,
    "processes": processes,
    "kernels": interpreter,
}


def name_of(frame):
    """The frame's file below its package, where it is one of ours."""
    path = Path(frame.f_code.co_filename)
    return next((str(path.relative_to(root)) for root in ROOTS if path.is_relative_to(root)), None)


def traced(function):
    """The files that are entered while the function runs, and those of the call stack at the first hot loop of EM."""
    entered, way = set(), []

    def see(frame, event, _):
        if event != "call" or (name := name_of(frame)) is None:
            return
        entered.add(name)
        if frame.f_code.co_name in HOT and not way:
            stack = []
            while frame is not None:
                stack.append(name_of(frame))
                frame = frame.f_back
            if "_em.py" in stack:  # and not where it starts
                way.extend(dict.fromkeys(name for name in reversed(stack) if name))

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return entered, way


def table():
    """A line for each place: files entered with either class, and the way, which is the same for both."""
    for place, fit in PLACES.items():
        entered, ways = {}, {}
        for label, cls in CLASSES.items():
            with warnings.catch_warnings(), threadpool_limits(1):
                warnings.simplefilter("ignore")  # one iteration does not converge
                fit(cls)  # imports what it needs
                entered[label], ways[label] = traced(partial(fit, cls))
        assert len({tuple(way) for way in ways.values()}) == 1
        way = ways["gaussmix"]
        counts = " and ".join(str(len(files)) for files in entered.values())
        yield f"| {place} | {' > '.join(way)} | {len(way)} | {counts} |"


if __name__ == "__main__":
    print(*table(), sep="\n")
