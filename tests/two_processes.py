"""A user's script that fits in two processes: `python two_processes.py STRATEGY FOLDER`.

Lightning Fabric runs it again for the second process. Each writes what it found to its own file in the folder.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from cases import blobs
from gaussmix import GaussianMixture, KMeans

X = blobs(n=401, d=3, k=3, seed=1, sort=True)
WEIGHT = np.random.RandomState(0).uniform(0.5, 2, size=len(X)) * (np.arange(len(X)) % 5 > 0)
# Of the rows of the second process, none counts.
FIRST_HALF = (np.arange(len(X)) < len(X) // 2).astype(float)
COLLAPSED = np.repeat([[0.0, 0.0], [1.0, 1.0]], 10, axis=0)


def fits(**trainer_params):
    """Estimators by name, with the arguments of their fits."""

    def mixture(k=3, max_epochs=8, **params):
        params = {"random_state": 0, "convergence_tolerance": 0} | params
        return GaussianMixture(k, trainer_params=trainer_params | {"max_epochs": max_epochs}, **params)

    found = {
        name: (mixture(covariance_type=name), dict(X=X, sample_weight=WEIGHT))
        for name in ("full", "tied", "diag", "spherical")
    }
    found |= {
        "random start": (mixture(init_strategy="random"), dict(X=X, sample_weight=WEIGHT)),
        "fresh seed": (mixture(random_state=None, init_strategy="random"), dict(X=X)),
        "two rows": (mixture(k=1, covariance_type="full"), dict(X=X[:2])),
        "three rows": (mixture(k=1), dict(X=X[:3])),
        "a share of weight 0": (mixture(covariance_type="tied"), dict(X=X, sample_weight=FIRST_HALF)),
        "float32": (mixture(covariance_type="full"), dict(X=X.astype(np.float32))),
        "singular": (mixture(k=2, covariance_type="full", covariance_regularization=0), dict(X=COLLAPSED)),
        "clusters": (KMeans(3, random_state=0, trainer_params=trainer_params), dict(X=X, sample_weight=WEIGHT)),
    }
    return found


def apart(rank, **trainer_params):
    """Fits that differ between processes, or fail in the second one, by name."""

    def callback(iteration, bound, parameters):
        if rank == 1 and iteration == 2:
            raise OSError("the disk is full")

    own = dict(X=X[: 200 + rank])
    return {
        "components": (GaussianMixture(2 + rank, trainer_params=trainer_params), dict(X=X)),
        "clusters": (KMeans(2, random_state=rank, trainer_params=trainer_params), dict(X=X)),
        "rows": (KMeans(2, trainer_params=trainer_params), own),
        "callback": (GaussianMixture(2, trainer_params=trainer_params), dict(X=X, callback=callback)),
    }


def outcome(estimator, arguments):
    """The fitted attributes as JSON has them, or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            estimator.fit(**arguments)
        except Exception as error:
            return {"error": [type(error).__name__, str(error), isinstance(error, np.linalg.LinAlgError)]}
    fitted = {name: getattr(estimator, name) for name in estimator.persistent_attributes}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fitted.items()}


def main(strategy, folder):
    chosen = fits(accelerator="cpu", devices=2, strategy=strategy)
    if strategy == "ddp_spawn":  # starts two processes for each fit
        chosen = {"full": chosen["full"]}
    found = {name: outcome(*fit) for name, fit in chosen.items()}
    if strategy == "ddp":
        differing = apart(int(os.environ.get("LOCAL_RANK", "0")), accelerator="cpu", devices=2, strategy=strategy)
        found["apart"] = {name: outcome(*fit)["error"][:2] for name, fit in differing.items()}
    report = {"pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS"), "found": found}
    (Path(folder) / f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
