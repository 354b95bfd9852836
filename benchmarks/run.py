"""Time gaussmix against its peers, interleaved in one run, and write a snapshot.

`python benchmarks/run.py` runs every case; `--quick` the smaller ones, compared with the committed snapshot as ratios
to scikit-learn; `--table FILE` prints the table of a snapshot. A cell whose accuracy check fails is not printed.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.mixture import GaussianMixture as Reference
from threadpoolctl import threadpool_info

from cases import Case, cases
from gaussmix import _threads
from gaussmix._covariance import COVARIANCES
from gaussmix._em import EMResult, run_em
from gaussmix._objective import MaximumLikelihood
from gaussmix.backends import _array_api
from gaussmix.backends._engine import Engine
from gaussmix.backends._features import QUADRATIC
from gaussmix.rows._data import Rows
from gaussmix.rows._passes import InMemory
from gaussmix.sklearn import GaussianMixture

SNAPSHOTS = Path(__file__).parent / "snapshots"
ITERATIONS = 20
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
# Cells that differ less than this from the snapshot, as a factor, are noise on a shared machine.
NOISE = 1.5


class TimedReference(Reference):
    """scikit-learn's estimator, which notes when each iteration ended."""

    def _print_verbose_msg_iter_end(self, n_iter: int, diff_ll: float) -> None:
        self.times.append(time.perf_counter())

    def _print_verbose_msg_init_beg(self, n_init: int) -> None:
        self.times: list[float] = []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller cases, compared with the committed snapshot")
    parser.add_argument("--only", default="", help="only cases with this in their label; the rest of --output stays")
    parser.add_argument("--table", type=Path, help="print the table of this snapshot")
    parser.add_argument("--output", type=Path, help="where the snapshot goes")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return 0
    warnings.simplefilter("ignore")
    snapshot: dict[str, Any] = {"machine": machine(), "gemm_gflops": gemm_rates(), "cells": {}}
    print(json.dumps(snapshot, indent=1), flush=True)
    failed = 0
    if arguments.only and arguments.output.exists():
        snapshot["cells"] = json.loads(arguments.output.read_text())["cells"]
    for case in cases(arguments.quick):
        if arguments.only not in case.label:
            continue
        problem = inaccuracy(case)
        if problem:
            failed += 1
            print(f"{case.label}: NOT MEASURED, {problem}", flush=True)
            continue
        try:
            cell = measure(case, snapshot["gemm_gflops"][case.x.dtype.name], arguments.quick)
        except ValueError as error:
            failed += 1
            print(f"{case.label}: NOT MEASURED, scikit-learn or gaussmix failed: {error}", flush=True)
            continue
        snapshot["cells"][case.label] = cell
        print(f"{case.label}: {json.dumps(cell)}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(snapshot, indent=1) + "\n")
    print(summary(snapshot))
    if arguments.quick:
        compare(snapshot)
    return 1 if failed else 0


def measure(case: Case, gemm: float, quick: bool) -> dict[str, Any]:
    """All times of a case, in milliseconds; those of peers scaled to the rows of the case."""
    x, k, kind = case.x, case.k, case.covariance_type
    peer_x = x[: case.peer_rows]
    scale = len(x) / len(peer_x)
    repeats = 3 if len(x) * k < 10**7 else 1
    settings = dict(covariance_type=kind, tol=0, **case.start)
    ours, theirs = (cls(k, max_iter=ITERATIONS, **settings) for cls in (GaussianMixture, TimedReference))
    theirs.set_params(max_iter=ITERATIONS if len(peer_x) * k < 10**7 and kind in ("diag", "spherical") else 4)

    seconds = interleaved({"ours": lambda: ours.fit(x), "theirs": lambda: theirs.fit(peer_x)}, repeats)
    their_iteration = statistics.median(np.diff(theirs.times))
    their_fit = seconds["theirs"] + (ITERATIONS - theirs.max_iter) * their_iteration
    our_iteration = iteration_time(case)
    cell: dict[str, Any] = {
        "form": ours.precision_,
        "iteration": our_iteration * 1e3,
        "sklearn_iteration": their_iteration * scale * 1e3,
        "fit": seconds["ours"] * 1e3,
        "sklearn_fit": their_fit * scale * 1e3,
    }
    if scale > 1:
        cell["sklearn_rows"] = len(peer_x)
    n_features = 1 + x.shape[1] + QUADRATIC[COVARIANCES[kind].quadratic].number(x.shape[1])
    cell["gemm_share"] = 4 * len(x) * k * n_features / our_iteration / 1e9 / gemm

    ours.set_params(tol=1e-3, max_iter=100, weights_init=None, means_init=None, precisions_init=None, random_state=0)
    defaults = Reference(k, covariance_type=kind, random_state=0)
    # The start's share depends on the number of rows: both get the same ones.
    seconds = interleaved({"ours": lambda: ours.fit(peer_x), "theirs": lambda: defaults.fit(peer_x)}, min(repeats, 2))
    cell["default"], cell["sklearn_default"] = (1e3 * seconds[name] for name in ("ours", "theirs"))
    cell["default_bound"], cell["sklearn_default_bound"] = ours.lower_bound_, float(defaults.lower_bound_)

    seconds = interleaved(
        {"ours": lambda: ours.score_samples(x), "theirs": lambda: defaults.score_samples(peer_x)}, repeats
    )
    cell["score_samples"], cell["sklearn_score_samples"] = 1e3 * seconds["ours"], 1e3 * seconds["theirs"] * scale
    if not quick:
        tracemalloc.start()
        GaussianMixture(k, max_iter=2, **settings).fit(x)
        cell["peak_mb"] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        cell |= peers(case, peer_x, scale)
    return cell


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def iteration_time(case: Case) -> float:
    """Seconds of an iteration: the difference between a long fit and one of a single iteration."""
    settings = dict(covariance_type=case.covariance_type, tol=0, **case.start)
    small = len(case.x) * case.k < 10**7
    more = ITERATIONS if small else 4
    one, many = (GaussianMixture(case.k, max_iter=i, **settings) for i in (1, 1 + more))
    seconds = interleaved({"one": lambda: one.fit(case.x), "many": lambda: many.fit(case.x)}, 5 if small else 1)
    return (seconds["many"] - seconds["one"]) / more


def inaccuracy(case: Case) -> str | None:
    """What is wrong with five iterations on the first rows, compared with the array API in float64."""
    x = case.x[:20_000]
    settings = dict(covariance_type=case.covariance_type, tol=0, max_iter=5, **case.start)
    found = GaussianMixture(case.k, **settings).fit(x)
    covariance = COVARIANCES[case.covariance_type]
    objective, block = MaximumLikelihood(covariance, 1e-6), _array_api.Block(Rows(x))
    engine = Engine(block.rows, InMemory(block), block, covariance)
    begun = GaussianMixture(case.k, **settings)._start(engine.rows)(engine, objective, np.random.RandomState(0))
    exact = run_em(engine, objective, EMResult(begun, [], converged=False), tolerance=0, max_iter=5).parameters
    for name in ("weights", "means", "covariances"):
        value, expected = getattr(found, f"{name}_"), getattr(exact, name)
        error = float(np.abs(value - expected).max() / max(1, np.abs(expected).max()))
        if not error <= TOLERANCE[x.dtype.name]:
            return f"{name} are off by {error:.2g}"
    return None


def peers(case: Case, x: Any, scale: float) -> dict[str, float]:
    """Milliseconds of an iteration of torchgmm and tgmm where they are installed and can be timed."""
    if not importlib.util.find_spec("torch"):
        return {}
    out = {}
    for name, fit in (("tgmm", _tgmm), ("torchgmm", _torchgmm)):
        if importlib.util.find_spec(name) and len(x) <= 100_000:
            try:
                if fit(case, x, 12) != 12:
                    continue  # it stopped early: there is no iteration to time
                times = [min(_timed(fit, case, x, i) for _ in range(3)) for i in (2, 12)]
            except Exception as error:  # a peer that fails is reported, not fatal
                out[f"{name}_error"] = f"{type(error).__name__}: {error}"[:200]
            else:
                out[f"{name}_iteration"] = (times[1] - times[0]) / 10 * scale * 1e3
    return out


def _timed(function: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def _tgmm(case: Case, x: Any, iterations: int) -> int:
    import torch
    from tgmm import GaussianMixture as Peer

    means = torch.as_tensor(case.start["means_init"], dtype=torch.as_tensor(x).dtype)
    peer = Peer(
        n_components=case.k,
        n_features=x.shape[1],
        covariance_type=case.covariance_type,
        max_iter=iterations,
        tol=1e-300,  # 0 is refused
        init_means=means,
    ).fit(torch.as_tensor(x))
    return int(peer.n_iter_)


def _torchgmm(case: Case, x: Any, iterations: int) -> int:
    import logging

    import torch
    from torchgmm.bayes import GaussianMixture as Peer

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    options = dict(max_epochs=iterations, enable_progress_bar=False, logger=False, accelerator="cpu")
    if x.dtype == np.float64:
        options["precision"] = 64
    means = torch.as_tensor(case.start["means_init"], dtype=torch.as_tensor(x).dtype)
    peer = Peer(
        case.k,
        covariance_type=case.covariance_type,
        init_means=means,
        convergence_tolerance=0.0,
        trainer_params=options,
    ).fit(torch.as_tensor(x))
    return int(peer.num_iter_)


def machine() -> dict[str, Any]:
    """What ran, and on what."""
    with _threads.one_blas_thread() as threads:
        pass
    names = ("gaussmix", "numpy", "scipy", "scikit-learn", "torch", "torchgmm", "tgmm")
    installed = {
        name: version(name) for name in names if importlib.util.find_spec(name.replace("scikit-learn", "sklearn"))
    }
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": threads,
        "blas": " ".join(str(blas[0].get(key, "")) for key in ("internal_api", "version", "architecture"))
        if blas
        else "",
        "versions": installed,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def gemm_rates() -> dict[str, float]:
    """Largest rate of a square product, in GFLOP/s, with all threads."""
    rates = {}
    for dtype in ("float32", "float64"):
        best = 0.0
        for n in (1024, 2048, 3072):
            a = np.random.RandomState(0).normal(size=(n, n)).astype(dtype)
            out = np.empty_like(a)
            best = max(best, *(2 * n**3 / _timed(np.matmul, a, a, out) / 1e9 for _ in range(4)))
        rates[dtype] = best
    return rates


RATIOS = ("iteration", "fit", "default", "score_samples")


def ratios(cell: dict[str, Any]) -> dict[str, float]:
    """scikit-learn's time divided by ours."""
    return {name: cell[f"sklearn_{name}"] / cell[name] for name in RATIOS}


def summary(snapshot: dict[str, Any]) -> str:
    """Geometric means and minima over the blobs."""
    blobs = {label: ratios(cell) for label, cell in snapshot["cells"].items() if label.startswith("[")}
    lines = [f"scikit-learn / gaussmix over {len(blobs)} cells of blobs:"]
    for name in RATIOS:
        values = {label: ratio[name] for label, ratio in blobs.items()}
        lowest = min(values, key=values.__getitem__)
        mean = statistics.geometric_mean(values.values())
        lines.append(f"  {name:14} geometric mean {mean:5.1f}, lowest {values[lowest]:.1f} ({lowest})")
    return "\n".join(lines)


def compare(snapshot: dict[str, Any]) -> None:
    """Print the cells whose ratio to scikit-learn moved by more than noise since the committed snapshot."""
    snapshot_path = SNAPSHOTS / "cpu.json"
    if not snapshot_path.exists():
        print(f"no snapshot to compare with: {snapshot_path} is missing")
        return
    committed = json.loads(snapshot_path.read_text())["cells"]
    moved = 0
    for label, cell in snapshot["cells"].items():
        for name, ratio in ratios(cell).items() if label in committed else ():
            before = ratios(committed[label])[name]
            if not 1 / NOISE < ratio / before < NOISE:
                moved += 1
                print(f"  {label}, {name}: {before:.1f} -> {ratio:.1f} ({'slower' if ratio < before else 'faster'})")
    print(f"{moved} figures moved by more than a factor of {NOISE} against the committed snapshot.")


def table(snapshot: dict[str, Any]) -> str:
    """The snapshot as a Markdown table."""
    lines = [
        "| case | form | iteration, ms | GEMM share | ratio: iteration | 20 iterations | default fit | score_samples | "
        "peak MB | torchgmm | tgmm |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label, cell in snapshot["cells"].items():
        ratio = ratios(cell)
        note = "*" if "sklearn_rows" in cell else ""
        others = [
            f"{cell[f'{name}_iteration'] / cell['iteration']:.1f}" if f"{name}_iteration" in cell else ""
            for name in ("torchgmm", "tgmm")
        ]
        columns = [
            label + note,
            cell["form"],
            f"{cell['iteration']:.3g}",
            f"{cell['gemm_share']:.0%}",
            *(f"{ratio[name]:.1f}" for name in RATIOS),
            f"{cell['peak_mb']:.0f}" if "peak_mb" in cell else "",
            *others,
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join([*lines, "", summary(snapshot)])


if __name__ == "__main__":
    sys.exit(main())
