"""One library in a process of its own: each line of its input is a task, each line of its output the answer, in JSON.

`python benchmarks/worker.py LIBRARY`, which run.py starts. The data of a case are made here.
"""

import json
import os
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import gemm_rates, machine
from sklearn.mixture import GaussianMixture as Reference
from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

from cases import Case
from gaussmix._covariance import COVARIANCES
from gaussmix._em import EMResult, run_em
from gaussmix._objective import MaximumLikelihood
from gaussmix.backends import _array_api
from gaussmix.backends._engine import Engine
from gaussmix.backends._features import QUADRATIC
from gaussmix.rows._data import Rows
from gaussmix.rows._passes import InMemory
from gaussmix.sklearn import GaussianMixture

TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
# Rows on which results are compared.
CHECKED = 20_000
# A longer fit that stops before it did so many iterations more than the shorter one cannot be timed.
FEWEST = 2
# Those on torch get no more, since each costs them much where rows are few.
TORCH_MORE = 10
# Times that small work is repeated in a round: fits, and calls for one row.
FITS, CALLS = 20, 200


class TimedReference(Reference):
    """scikit-learn's estimator, which notes when each iteration ended."""

    def _print_verbose_msg_iter_end(self, n_iter: int, diff_ll: float) -> None:
        self.times.append(time.perf_counter())

    def _print_verbose_msg_init_beg(self, n_init: int) -> None:
        self.times: list[float] = []


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds, and what came back."""
    began = time.perf_counter()
    found = function(*arguments)
    return time.perf_counter() - began, found


def fits(fit: Callable[[int], Any], n_iter: Callable[[Any], int], more: int) -> tuple[dict[str, Any], Any]:
    """Seconds of a fit of few and of many iterations, how many more those are, and the longer fit."""
    fit(1)  # the first one starts threads and touches the data
    few, one = timed(fit, 1)
    many, found = timed(fit, 1 + more)
    more = n_iter(found) - n_iter(one)
    if more < FEWEST:
        raise ValueError(f"it stopped after {n_iter(found)} iterations")
    return {"few": few, "many": many, "more": more}, found


def likelihood(case: Case, weights: Any, means: Any, covariances: Any) -> float:
    """Mean log-likelihood of rows from all of the data, as scikit-learn computes it in float64."""
    mixture = Reference(case.k, covariance_type=case.covariance_type)
    mixture.weights_, mixture.means_, covariances = (
        np.asarray(value, dtype=np.float64) for value in (weights, means, covariances)
    )
    mixture.precisions_cholesky_ = _compute_precision_cholesky(covariances, case.covariance_type)
    return float(mixture.score(case.x[:: -(-case.n // CHECKED)].astype(np.float64)))


class Estimator:
    """What is timed of scikit-learn and of gaussmix, which has the same methods."""

    estimator: type[Any]

    def rows(self, case: Case) -> Any:
        """The rows that this library is given."""
        return case.x

    def settings(self, case: Case) -> dict[str, Any]:
        """Where a fit of a given number of iterations starts."""
        return dict(covariance_type=case.covariance_type, tol=0, **case.start)

    def default(self, case: Case) -> dict[str, Any]:
        """A fit with its defaults, k-means included: of the same rows in each library."""
        self.fitted = self.estimator(case.k, covariance_type=case.covariance_type, random_state=0)
        seconds, _ = timed(self.fitted.fit, case.x[: case.peer_rows])
        bound, n_iter = float(self.fitted.lower_bound_), int(self.fitted.n_iter_)
        return {"seconds": [seconds], "lower_bound": bound, "n_iter": n_iter}

    def score_samples(self, case: Case) -> dict[str, Any]:
        """Of the default fit."""
        return self._calls(case, self.fitted.score_samples)

    def predict(self, case: Case) -> dict[str, Any]:
        """Of the default fit."""
        return self._calls(case, self.fitted.predict)

    def _calls(self, case: Case, method: Callable[[Any], Any]) -> dict[str, Any]:
        x = self.rows(case)
        times = [timed(method, x)[0] for _ in range(1 if case.n * case.k > 10**7 else 5)]
        return {"seconds": times, "rows": len(x)}

    def small(self, case: Case) -> dict[str, Any]:
        """A fit of few rows, and calls for one."""
        x = case.x
        mixture = self.estimator(case.k, covariance_type=case.covariance_type, random_state=0)
        found = {"fit": [timed(mixture.fit, x)[0] for _ in range(FITS)]}
        for name in ("predict", "score_samples"):
            found[name] = [timed(getattr(mixture, name), x[:1])[0] for _ in range(CALLS)]
        return found

    def large(self, case: Case) -> dict[str, Any]:
        """Two iterations, and the largest resident memory of the process meanwhile, data and libraries included."""
        mixture = self.estimator(case.k, max_iter=2, **self.settings(case))
        x = case.x
        peak = Path("/proc/self/clear_refs")
        if peak.exists():
            peak.write_text("5")  # the peak starts anew
        seconds, _ = timed(mixture.fit, x)
        return {"seconds": [seconds], "peak_mb": resident_peak_mb()}


class Ours(Estimator):
    """gaussmix."""

    estimator = GaussianMixture

    def iterations(self, case: Case) -> dict[str, Any]:
        """A short and a long fit from the given start."""

        def fit(iterations: int) -> Any:
            return GaussianMixture(case.k, max_iter=iterations, **self.settings(case)).fit(case.x)

        times, found = fits(fit, lambda mixture: mixture.n_iter_, case.more)
        reached = likelihood(case, found.weights_, found.means_, found.covariances_)
        n_features = 1 + case.d + QUADRATIC[COVARIANCES[case.covariance_type].quadratic].number(case.d)
        about = {"rows": case.n, "form": found.precision_, "n_features": n_features}
        return times | about | {"likelihood": reached}

    def inaccuracy(self, case: Case) -> dict[str, Any]:
        """What is wrong with five iterations on the first rows, compared with the array API in float64."""
        x = case.x[:CHECKED]
        settings = self.settings(case)
        found = GaussianMixture(case.k, max_iter=5, **settings).fit(x)
        covariance = COVARIANCES[case.covariance_type]
        objective, block = MaximumLikelihood(covariance, 1e-6), _array_api.Block(Rows(x))
        engine = Engine(block.rows, InMemory(block), block, covariance)
        begun = GaussianMixture(case.k, max_iter=5, **settings)._start(engine.rows)(
            engine, objective, np.random.RandomState(0)
        )
        exact = run_em(engine, objective, EMResult(begun, [], converged=False), tolerance=0, max_iter=5).parameters
        for name in ("weights", "means", "covariances"):
            value, expected = getattr(found, f"{name}_"), getattr(exact, name)
            error = float(np.abs(value - expected).max() / max(1, np.abs(expected).max()))
            if not error <= TOLERANCE[case.dtype]:
                return {"problem": f"{name} are off by {error:.2g}"}
        return {"problem": None}

    def memory(self, case: Case) -> dict[str, Any]:
        """The most that a fit allocates, beyond the data."""
        x, settings = case.x, self.settings(case)
        tracemalloc.start()
        GaussianMixture(case.k, max_iter=2, **settings).fit(x)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        return {"peak_mb": peak}

    def machine(self, sizes: list[int]) -> dict[str, Any]:
        """What runs, and the rate of matrix products of these sizes."""
        return {"machine": machine(), "gemm_gflops": gemm_rates(sizes)}


class Sklearn(Estimator):
    """scikit-learn."""

    estimator = Reference

    def rows(self, case: Case) -> Any:
        """Fewer where it takes long."""
        return case.x[: case.peer_rows]

    def iterations(self, case: Case) -> dict[str, Any]:
        """One fit: the times of its iterations are known."""
        x = self.rows(case)
        is_slow = case.covariance_type in ("full", "tied") and len(x) * case.k > 10**6
        more = 4 if is_slow else case.more
        mixture = TimedReference(case.k, max_iter=1 + more, **self.settings(case))
        many, _ = timed(mixture.fit, x)
        later = mixture.times[-1] - mixture.times[0]
        return {"few": many - later, "many": many, "more": more, "rows": len(x)}


class OneDAL:
    """Intel oneDAL, as daal4py calls it."""

    def __init__(self) -> None:
        import daal4py

        daal4py.daalinit(int(os.environ["OMP_NUM_THREADS"]))
        self.em_gmm = daal4py.em_gmm

    def iterations(self, case: Case) -> dict[str, Any]:
        """A short and a long fit from the given start."""
        x, start, dtype = case.x, case.start, case.dtype
        weights, means = start["weights_init"][None].astype(dtype), start["means_init"].astype(dtype)
        is_full = case.covariance_type == "full"
        # Precisions of 1 are covariances of 1; of a diagonal, oneDAL wants a row.
        covariances = list(start["precisions_init"].astype(dtype).reshape(case.k, -1, case.d))

        def fit(iterations: int) -> Any:
            algorithm = self.em_gmm(
                case.k,
                fptype="float" if dtype == "float32" else "double",
                maxIterations=iterations,
                accuracyThreshold=0.0,  # it stops nevertheless where the likelihood no longer rises
                covarianceStorage="full" if is_full else "diagonal",
            )
            return algorithm.compute(x, weights, means, covariances)

        times, found = fits(fit, lambda result: int(result.nIterations[0, 0]), case.more)
        reached = np.stack(found.covariances).reshape(start["precisions_init"].shape)
        if not all(np.isfinite(value).all() for value in (found.weights, found.means, reached)):
            raise ValueError("its result is not finite")
        return times | {"rows": case.n, "likelihood": likelihood(case, found.weights[0], found.means, reached)}


class Tgmm:
    """tgmm, on torch."""

    def iterations(self, case: Case) -> dict[str, Any]:
        """A short and a long fit from the given start."""
        import torch
        from tgmm import GaussianMixture as Peer

        x = torch.as_tensor(case.x[: case.peer_rows])
        means = torch.as_tensor(case.start["means_init"], dtype=x.dtype)
        # It refuses a tolerance of 0.
        options = dict(covariance_type=case.covariance_type, tol=1e-300, init_means=means)
        times, _ = fits(
            lambda iterations: Peer(n_components=case.k, n_features=case.d, max_iter=iterations, **options).fit(x),
            lambda peer: int(peer.n_iter_),
            min(TORCH_MORE, case.more),
        )
        return times | {"rows": len(x)}


class TorchGMM:
    """torchgmm, on torch and Lightning."""

    def iterations(self, case: Case) -> dict[str, Any]:
        """A short and a long fit from the given start."""
        import logging

        import torch
        from torchgmm.bayes import GaussianMixture as Peer

        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        x = torch.as_tensor(case.x[: case.peer_rows])
        means = torch.as_tensor(case.start["means_init"], dtype=x.dtype)
        trainer = dict(enable_progress_bar=False, logger=False, accelerator="cpu")
        if case.dtype == "float64":
            trainer["precision"] = 64
        options = dict(covariance_type=case.covariance_type, convergence_tolerance=0.0, init_means=means)
        times, _ = fits(
            lambda iterations: Peer(case.k, trainer_params=trainer | {"max_epochs": iterations}, **options).fit(x),
            lambda peer: int(peer.num_iter_),
            min(TORCH_MORE, case.more),
        )
        return times | {"rows": len(x)}


LIBRARIES: dict[str, Callable[[], Any]] = {
    "gaussmix": Ours,
    "scikit-learn": Sklearn,
    "oneDAL": OneDAL,
    "torchgmm": TorchGMM,
    "tgmm": Tgmm,
}


def resident_peak_mb() -> float | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), None)


def main() -> None:
    # What libraries print is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    library = None
    for line in sys.stdin:
        task = json.loads(line)
        try:
            library = library or LIBRARIES[sys.argv[1]]()
            argument = Case(**task["case"]) if "case" in task else task["sizes"]
            answer = getattr(library, task["do"])(argument)
        except Exception as error:  # whatever a library raises is the answer: the next task may go well
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
