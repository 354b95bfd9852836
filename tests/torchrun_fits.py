"""A user's script for torchrun: `torchrun --nproc-per-node 2 torchrun_fits.py FOLDER`.

Each process fits with its shard and writes what it found to its own file in the folder. In the end one of them has a
NaN, about which nobody catches the error.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from cases import blobs
from gaussmix import GaussianMixture
from gaussmix.sklearn import GaussianMixture as SklearnMixture

X = blobs(n=401, d=3, k=3, seed=1, sort=True)
WEIGHT = np.random.RandomState(0).uniform(0.5, 2, size=len(X)) * (np.arange(len(X)) % 5 > 0)
SECOND_HALF = (np.arange(len(X)) >= 200).astype(float)
HALF, NONE = 200, 401  # the row at which the second process's share begins
TYPES = ("full", "tied", "diag", "spherical")
ATTRIBUTES = (
    *("weights_", "means_", "covariances_", "precisions_cholesky_", "lower_bounds_", "converged_"),
    *("backend_", "precision_", "n_features_in_"),
)


class InBlocks:
    def __init__(self, x, size=70):
        self.x, self.size = x, size

    def __iter__(self):
        return (self.x[start : start + self.size] for start in range(0, len(self.x), self.size))


def as_tensor(x):
    import torch

    return torch.as_tensor(x)


def mixture(k=3, max_epochs=8, **params):
    params = {"random_state": 0, "convergence_tolerance": 0} | params
    return GaussianMixture(k, trainer_params={"max_epochs": max_epochs}, **params)


def fits():
    """Estimators by name, with rows, weights, where the second share begins, and what a share is made into."""
    found = {name: (mixture(covariance_type=name), X, WEIGHT, HALF, np.asarray) for name in TYPES}
    found |= {
        f"{name} of scikit-learn": (
            *(SklearnMixture(3, covariance_type=name, random_state=0), X, WEIGHT, HALF, np.asarray),
        )
        for name in TYPES
    }
    float32 = X.astype(np.float32)
    return found | {
        "random": (mixture(init_strategy="random"), X, WEIGHT, 37, np.asarray),
        "kmeans++": (mixture(init_strategy="kmeans++"), X, None, 37, np.asarray),
        "given means": (mixture(init_means=X[[0, 200, 400]]), X, None, HALF, np.asarray),
        "until convergence": (mixture(convergence_tolerance=1e-4, max_epochs=200), X, None, HALF, np.asarray),
        "fresh seed": (mixture(random_state=None, init_strategy="random"), X, None, HALF, np.asarray),
        "fresh seed of scikit-learn": (SklearnMixture(3, init_params="random", n_init=2), X, None, HALF, np.asarray),
        "empty share": (mixture(covariance_type="full"), X, WEIGHT, NONE, np.asarray),
        "empty first share": (mixture(covariance_type="tied"), X, None, 0, np.asarray),
        "share of weight 0": (mixture(), X, SECOND_HALF, HALF, np.asarray),
        "a row": (SklearnMixture(1, covariance_type="spherical"), X[:2], None, 1, np.asarray),
        "streams": (mixture(covariance_type="full"), X, WEIGHT, 150, InBlocks),
        "random start of streams": (mixture(init_strategy="random"), X, None, 150, InBlocks),
        "tensors": (mixture(covariance_type="full"), X, None, HALF, as_tensor),
        "float32": (mixture(covariance_type="full"), float32, None, HALF, np.asarray),
    }


def with_nan(rank):
    x = X[:HALF] if rank == 0 else X[HALF:].copy()
    if rank == 1:
        x[17, 1] = np.nan
    return x


def refused(rank):
    """What all processes raise, though one of them alone is wrong; by name."""
    own = X[:HALF] if rank == 0 else X[HALF:]
    return {
        "NaN": (mixture(), with_nan(rank), None),
        "widths": (mixture(), own[:, : 3 - rank], None),
        "weights": (mixture(), own, np.full(len(own), 1.0 - 2 * rank)),
        "too few rows": (mixture(k=3), X[rank : rank + 1], None),
        "no rows": (mixture(k=1), X[:0], None),
        "a NaN in a stream": (SklearnMixture(2), InBlocks(with_nan(rank)), None),
        "dimensions": (SklearnMixture(2), own if rank == 0 else own.ravel(), None),
    }


def told_otherwise(rank):
    """Fits of which the second process is told something else, or its source or callback fails; by name."""
    own = X[:HALF] if rank == 0 else X[HALF:]

    def on_second(value, other):
        return value if rank == 0 else other

    def callback(iteration, bound, parameters):
        return iteration == 3

    def raising(iteration, bound, parameters):
        if iteration == 2:
            raise KeyError("a callback's")

    settings = on_second({"max_epochs": 8}, {"max_epochs": 9})
    sources = {name: on_second(own, Failing(own, fails_in)) for name, fails_in in FAILING.items()}
    return {
        "num_components": (mixture(k=on_second(3, 4)), own, None, {}),
        "covariance_type": (mixture(covariance_type=on_second("full", "spherical")), own, None, {}),
        "init_strategy": (mixture(init_strategy=on_second("kmeans", "random")), own, None, {}),
        "num_components that is bad": (mixture(k=on_second(3, -1)), own, None, {}),
        "max_epochs": (mixture(max_epochs=settings["max_epochs"]), own, None, {}),
        "the dtype": (mixture(), own.astype(on_second(np.float64, np.float32)), None, {}),
        "resume": (mixture(), own, None, {"checkpoint": "nowhere/at all", "resume": on_second(False, True)}),
        "weights": (mixture(), own, on_second(None, np.ones(len(own))), {}),
        "tol of scikit-learn": (SklearnMixture(3, tol=on_second(1e-3, 1e-4)), own, None, {}),
        "trainer_params": (GaussianMixture(3, trainer_params=on_second({}, {"epochs": 3})), own, None, {}),
        "callback of the first": (mixture(), own, None, {"callback": on_second(callback, None)}),
        "callback of the second": (SklearnMixture(3, tol=0), own, None, {"callback": on_second(None, callback)}),
        "callback that fails": (mixture(covariance_type="full"), own, None, {"callback": on_second(None, raising)}),
        **{name: (mixture(covariance_type="full"), source, None, {}) for name, source in sources.items()},
        "as before": (mixture(), own, None, {}),
    }


class Failing(InBlocks):
    """Blocks that can not be read in one of the passes."""

    def __init__(self, x, fails_in):
        super().__init__(x)
        self.passes, self.fails_in = 0, fails_in

    def __iter__(self):
        self.passes += 1
        if self.passes == self.fails_in:
            raise OSError("the disk is gone")
        return super().__iter__()


# The pass in which the source of the second process fails.
FAILING = {"the first pass": 1, "the sample": 2, "the start": 3, "an iteration": 6}


def outcome(estimator, x, weight, **arguments):
    """The fitted attributes as JSON has them, or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            estimator.fit(x, sample_weight=weight, **arguments)
        except Exception as error:
            return [type(error).__name__, str(error)]
    fitted = {name: getattr(estimator, name) for name in ATTRIBUTES}
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in fitted.items()}


def main(folder):
    rank = int(os.environ["RANK"])
    found = {}
    for name, (estimator, x, weight, cut, made) in fits().items():
        own = slice(0, cut) if rank == 0 else slice(cut, len(x))
        share = made(x[own]), None if weight is None else weight[own]
        found[name] = outcome(estimator, *share, distributed="torch")
    for name, fit in refused(rank).items():
        found[name] = outcome(*fit, distributed="torch")
    found["told otherwise"] = {}
    for name, (*fit, arguments) in told_otherwise(rank).items():
        begin = time.monotonic()
        report = outcome(*fit, distributed="torch", **arguments)
        found["told otherwise"][name] = [report, time.monotonic() - begin]
    import torch.distributed

    whole = torch.distributed.group.WORLD
    found["group"] = outcome(mixture(), X[rank::2], None, distributed=whole)
    # A group of one's own: a mixture for each process.
    alone = [torch.distributed.new_group([index]) for index in range(2)][rank]
    found["alone"] = outcome(mixture(), X[rank::2], None, distributed=alone)
    # Without a word about it, each process is on its own.
    found["not distributed"] = outcome(mixture(), X[rank::2], None)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    mixture().fit(with_nan(rank), distributed="torch")


if __name__ == "__main__":
    main(*sys.argv[1:])
