"""Time gaussmix and its peers in turns, each in a process of its own, and write a snapshot.

`python benchmarks/run.py` runs every case; `--quick` the smaller ones, compared with the committed snapshot as ratios
to scikit-learn; `--table FILE` prints the tables of a snapshot. A cell whose accuracy check fails is not measured.
`--dry-run` runs tiny cases: a test of this script, whose times mean nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tables
from machine import commit, cores, load

from cases import Case, cases

HERE = Path(__file__).parent
# The libraries' modules, in the order of their turns, and the libraries that are in every table.
MODULES = {
    "gaussmix": "gaussmix",
    "scikit-learn": "sklearn",
    "oneDAL": "daal4py",
    "torchgmm": "torchgmm",
    "tgmm": "tgmm",
}
BOTH = ("gaussmix", "scikit-learn")
ROUNDS, QUICK_ROUNDS = 5, 3
# No further round begins after so many seconds.
LONG, QUICK_LONG = 180.0, 5.0
ITERATIONS = 20
# Sizes of the square products whose rate is measured, in a dry run and otherwise.
GEMM = ((256,), (1024, 2048, 3072))
# Relative difference of log-likelihoods at which a peer's result counts as another one.
SAME = 1e-2


class Worker:
    """A library in a process of its own."""

    def __init__(self, library: str, threads: int) -> None:
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | limits,
        )

    def ask(self, task: str, case: Case | None = None, **options: Any) -> dict[str, Any]:
        """The answer; {"error": reason} where there is none."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            message = {"do": task, **options} | ({"case": asdict(case)} if case else {})
            print(json.dumps(message), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            return {"error": f"its process ended with {self.process.wait()}"}

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


class Bench:
    """The workers, and how often each is asked."""

    def __init__(self, extent: str, threads: int, seconds: float) -> None:
        self.extent, self.threads = extent, threads
        self.libraries = [name for name, module in MODULES.items() if find_spec(module)]
        if extent == "quick":
            self.libraries = list(BOTH)
        self.workers = {library: Worker(library, threads) for library in self.libraries}
        self.rounds = {"all": ROUNDS, "quick": QUICK_ROUNDS, "dry": 1}[extent]
        self.long = seconds if extent == "all" else QUICK_LONG

    def worker(self, library: str) -> Worker:
        """That of this library, started anew where it has ended."""
        if self.workers[library].process.poll() is not None:
            self.workers[library] = Worker(library, self.threads)
        return self.workers[library]

    def ask(self, library: str, task: str, case: Case | None = None, **options: Any) -> dict[str, Any]:
        """Its answer; raises where there is none."""
        answer = self.worker(library).ask(task, case, **options)
        if "error" in answer:
            raise ValueError(f"{library}, {task}: {answer['error']}")
        return answer

    def in_turns(self, libraries: list[str], task: str, case: Case, fresh: bool = False) -> tuple[Any, dict[str, str]]:
        """The answers of each library, and why others have none; `fresh` starts a process for each answer."""
        answers: dict[str, list[dict[str, Any]]] = {library: [] for library in libraries}
        reasons: dict[str, str] = {}
        began = time.monotonic()
        for _ in range(self.rounds):
            for library in list(answers):
                worker = Worker(library, self.threads) if fresh else self.worker(library)
                answer = worker.ask(task, case)
                if fresh:
                    worker.close()
                if "error" in answer:
                    reasons[library] = answer["error"]
                    del answers[library]
                else:
                    answers[library].append(answer)
            if time.monotonic() - began > self.long:
                break
        if "gaussmix" in reasons:
            raise ValueError(f"gaussmix, {task}: {reasons['gaussmix']}")
        return answers, reasons

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller cases, compared with the committed snapshot")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases: a test of this script")
    parser.add_argument("--only", default="", help="only cases with this in their label; the rest of --output stays")
    parser.add_argument("--table", type=Path, help="print the tables of this snapshot")
    parser.add_argument("--output", type=Path, help="where the snapshot goes")
    parser.add_argument("--seconds", type=float, default=LONG, help="no further round of a cell begins after so many")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of each library; by default all cores")
    arguments = parser.parse_args()
    if arguments.table:
        print(tables.markdown(json.loads(arguments.table.read_text())))
        return 0
    run = {"only": arguments.only, "date": time.strftime("%Y-%m-%d"), "commit": commit(), "load_before": load()}
    extent = "quick" if arguments.quick else "dry" if arguments.dry_run else "all"
    bench = Bench(extent, arguments.threads, arguments.seconds)
    snapshot: dict[str, Any] = {"runs": [], "cells": {}}
    if arguments.only and arguments.output and arguments.output.exists():
        snapshot = json.loads(arguments.output.read_text())
    snapshot["runs"].append(run)
    snapshot |= bench.ask("gaussmix", "machine", sizes=GEMM[bench.extent != "dry"])
    print(json.dumps(snapshot | {"cells": len(snapshot["cells"])}, indent=1), flush=True)
    failed = 0
    for case in cases(bench.extent):
        if arguments.only not in case.label:
            continue
        try:
            cell = measure(bench, case, snapshot["gemm_gflops"][case.dtype])
        except ValueError as error:
            failed += 1
            snapshot["cells"].pop(case.label, None)
            print(f"{case.label}: NOT MEASURED, {error}", flush=True)
        else:
            snapshot["cells"][case.label] = cell
            print(f"{case.label}: {json.dumps(cell)}", flush=True)
        run["load_after"] = load()
        if arguments.output:
            arguments.output.write_text(json.dumps(snapshot, indent=1) + "\n")
    bench.close()
    print(tables.markdown(snapshot))
    if arguments.quick:
        print(tables.compared(snapshot, HERE / "snapshots" / "cpu.json"))
    return 1 if failed else 0


def measure(bench: Bench, case: Case, gemm: float) -> dict[str, Any]:
    """A cell: of each time and library the least and the median in milliseconds, and why some are left out."""
    both = list(BOTH)
    if case.group == "small work":
        answers, left_out = bench.in_turns(both, "small", case)
        names = ("fit", "predict", "score_samples")
        times = {name: {library: spread(case, found, name) for library, found in answers.items()} for name in names}
        return {"group": case.group, "times": times, "left_out": left_out}
    if case.group == "large d":
        answers, left_out = bench.in_turns(both, "large", case, fresh=bench.extent == "all")
        times = {"fit": {library: spread(case, found) for library, found in answers.items()}}
        peaks = {library: max(answer["peak_mb"] or 0 for answer in found) for library, found in answers.items()}
        return {"group": case.group, "times": times, "peak_mb": peaks, "left_out": left_out}

    problem = bench.ask("gaussmix", "inaccuracy", case)["problem"]
    if problem:
        raise ValueError(problem)
    libraries = [library for library in bench.libraries if takes(library, case)]
    answers, left_out = bench.in_turns(libraries, "iterations", case)
    if problem := difference(answers):
        left_out["oneDAL"] = problem
        del answers["oneDAL"]
    for library in list(answers):
        if iterations(answers[library], case, 0, 1)[0] <= 0:
            left_out[library] = "its longer fits took no longer than the shorter ones: the machine is too busy"
            del answers[library]
    if "gaussmix" not in answers:
        raise ValueError(left_out["gaussmix"])
    times = {
        "iteration": {library: iterations(found, case, 0, 1) for library, found in answers.items()},
        "20 iterations": {library: iterations(found, case, 1, ITERATIONS - 1) for library, found in answers.items()},
    }
    rounds, ours = {"iteration": len(answers["gaussmix"])}, answers["gaussmix"][0]
    bounds = {}
    is_fast = bench.extent != "quick" or case.n * case.k < 10**6
    for task in ("default", "score_samples", "predict") if is_fast else ():
        answers, reasons = bench.in_turns(both, task, case)
        left_out |= {f"{library}, {task}": reason for library, reason in reasons.items()}
        times[task] = {library: spread(case, found) for library, found in answers.items()}
        rounds[task] = len(answers["gaussmix"])
        if task == "default":
            bounds = {library: found[0]["lower_bound"] for library, found in answers.items()}
    flops = 4 * case.n * case.k * ours["n_features"]
    cell = {
        "group": case.group,
        "form": ours["form"],
        "peer_rows": case.peer_rows,
        "times": times,
        "rounds": rounds,
        "default_lower_bound": bounds,
        "gemm_share": flops / times["iteration"]["gaussmix"][0] / 1e6 / gemm,
        "left_out": left_out,
    }
    if bench.extent != "quick":
        cell |= bench.ask("gaussmix", "memory", case)
    return cell


def takes(library: str, case: Case) -> bool:
    """Whether a library has this covariance type and would end within reason."""
    if library == "oneDAL":
        return case.covariance_type in ("full", "diag")
    return library in BOTH or case.peer_rows <= 100_000


def difference(answers: dict[str, list[dict[str, Any]]]) -> str | None:
    """In what oneDAL's result differs from ours after the same iterations."""
    if "oneDAL" not in answers:
        return None
    theirs, ours = (answers[library][0]["likelihood"] for library in ("oneDAL", "gaussmix"))
    if abs(theirs - ours) <= SAME * max(1, abs(ours)):
        return None
    return f"its mean log-likelihood is {theirs:.6g}, ours {ours:.6g}"


def iterations(answers: list[dict[str, Any]], case: Case, fits: int, more: int) -> tuple[float, float]:
    """Least and median milliseconds of so many fits of one iteration and so many iterations more."""

    def of(few: float, many: float) -> float:
        return 1e3 * (fits * few + more * (many - few) / answers[0]["more"]) * case.n / answers[0]["rows"]

    # A shorter fit that was disturbed would make a difference too small: the least of each are subtracted.
    least = of(*(min(answer[name] for answer in answers) for name in ("few", "many")))
    return least, statistics.median(of(answer["few"], answer["many"]) for answer in answers)


def spread(case: Case, answers: list[dict[str, Any]], name: str = "seconds") -> tuple[float, float]:
    """Least and median milliseconds, scaled to the rows of the case."""
    scale = 1e3 * case.n / answers[0].get("rows", case.n)
    times = [scale * seconds for answer in answers for seconds in answer[name]]
    return min(times), statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
