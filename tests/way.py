"""The way of a fit through the code: which files call which, from `fit` to the hot loop, and how many are entered.

`python tests/way.py` prints both for each estimator and each place where rows may be. CONTRIBUTING.md has the result.
"""

import sys
from pathlib import Path

import numpy as np

import gaussmix
from gaussmix import GaussianMixture
from gaussmix.sklearn import GaussianMixture as SklearnMixture

ROOTS = [Path(gaussmix.__file__).parent, Path(gaussmix.__file__).parents[2] / "kernels" / "gaussmix_kernels"]
# Where the time of an iteration goes.
HOT = ("_expect_slab", "launch")
X = np.random.RandomState(0).normal(size=(200, 2))
ESTIMATORS = {
    "gaussmix": GaussianMixture(2, random_state=0, trainer_params={"max_epochs": 1}),
    "gaussmix.sklearn": SklearnMixture(2, random_state=0, max_iter=1),
}


class Blocks:
    """X, a block at a time."""

    def __iter__(self):
        return iter([X[:90], X[90:]])


def fit_numpy(estimator):
    estimator.fit(X)


def fit_blocks(estimator):
    estimator.fit(Blocks())


def fit_dask(estimator):
    import dask.array

    with dask.config.set(scheduler="synchronous"):
        estimator.fit(dask.array.from_array(X, chunks=(90, 2)))


def file_of(frame):
    """The name of the frame's file, where it is one of ours."""
    path = Path(frame.f_code.co_filename)
    return next((str(path.relative_to(root.parent)) for root in ROOTS if path.is_relative_to(root)), None)


def traced(function):
    """The files entered while the function runs, and those of the first call stack that reaches the hot loop."""
    entered, way = set(), []

    def see(frame, event, _):
        if event != "call" or (name := file_of(frame)) is None:
            return
        entered.add(name)
        if frame.f_code.co_name in HOT and not way:
            while frame is not None:
                name = file_of(frame)
                if name is not None and name not in way[-1:]:
                    way.append(name)
                frame = frame.f_back
            way.reverse()

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return entered, way
