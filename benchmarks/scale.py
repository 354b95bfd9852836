"""Fits of data that lies in a file: cost against its size, peak memory, processes, Dask workers, killed fits.

`python benchmarks/scale.py` does all of it on one file that it makes and deletes; `--only` some parts, `--rows` sets
the largest size. `--model` prints what the cost model says of 10^10 rows on many GPUs, `--table FILE` the tables of a
snapshot. `--dry-run` runs each part on a tiny file: a test of this script, whose times mean nothing.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from math import ceil, log2, prod
from pathlib import Path
from typing import Any

import numpy as np

from gaussmix import GaussianMixture, estimate
from gaussmix._covariance import COVARIANCES
from gaussmix.rows._blocks import BLOCK_BYTES, Slices
from gaussmix.rows._data import slices
from gaussmix.storage._checkpoint import Checkpoint, State

PARTS = ("sizes", "memory", "ranks", "dask", "kills")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
# Rows that are written at a time, rows that a fit in memory still gets, and those of fits in several processes.
CHUNK, IN_MEMORY, SHARED, KILLED = 2**18, 10**7, 4 * 10**6, 2 * 10**5
# A fit of n rows has so many iterations that this many rows are gone through; sizes up to IN_MEMORY run several times.
GONE_THROUGH, REPEATS = 2 * 10**7, 3
# Relative difference of log-likelihoods at which a fit counts as another one.
TOLERANCE = 1e-6
# Kills at random times, and those that wait for a checkpoint to be under way.
AT_RANDOM, AIMED = 20, 5


# What runs in a process of its own: one task, whose answer is a line of JSON


@dataclass(frozen=True)
class File:
    """The first n rows of an .npy file, opened anew wherever they are read: what a Dask worker gets is the path."""

    path: str
    n: int

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return self.n, np.load(self.path, mmap_mode="r").shape[1]

    ndim, dtype = 2, np.dtype(np.float32)

    def __getitem__(self, part: Any) -> Any:
        return np.array(np.load(self.path, mmap_mode="r")[: self.n][part])


def child(task: dict[str, Any]) -> dict[str, Any]:
    """Fit as the task says."""
    warnings.simplefilter("ignore")
    x = np.load(task["path"], mmap_mode="r")[: task["n"]]
    means = np.load(Path(task["path"]).with_name("means.npy"))
    times: list[float] = []
    options: dict[str, Any] = {"callback": lambda *_: times.append(time.perf_counter())}
    rank, closing = int(os.environ.get("RANK", "0")), ExitStack()
    if task["how"] == "memory":
        x = np.array(x)
    elif task["how"] == "ranks":
        world = int(os.environ["WORLD_SIZE"])
        x = x[len(x) * rank // world : len(x) * (rank + 1) // world]
        options["distributed"] = "torch"
    elif task["how"] == "dask":
        x = on_cluster(File(task["path"], task["n"]), task["workers"], closing)
    elif task["how"] == "kills":
        options = dict(checkpoint=task["checkpoint"], checkpoint_every=task["every"], resume=True)
    mixture = GaussianMixture(
        len(means),
        covariance_type="full",
        init_means=means,
        convergence_tolerance=0,
        trainer_params={"max_epochs": task["iterations"], "enable_progress_bar": False},
    )
    print("ready", flush=True)
    began = time.perf_counter()
    try:
        mixture.fit(x, **options)
    except (TypeError, ValueError) as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    finally:
        closing.close()
    answer = {"seconds": time.perf_counter() - began, "log_likelihood": -mixture.nll_, "peak_mb": peak_mb()}
    if len(times) > 1:
        # The first iteration comes after the start, which is paid once.
        iteration = (times[-1] - times[0]) / (len(times) - 1)
        answer |= {"iteration": iteration, "start": times[0] - began - iteration, "form": mixture.precision_}
    return answer if rank == 0 else {}


def on_cluster(file: File, workers: int, closing: ExitStack) -> Any:
    """The rows as a Dask array, which a cluster of processes will read."""
    import dask.array as da
    from distributed import Client, LocalCluster

    options = dict(threads_per_worker=1, processes=True, dashboard_address=None)
    closing.enter_context(Client(closing.enter_context(LocalCluster(n_workers=workers, **options))))
    rows = max(1, min(block_rows(file.shape[1]), file.n // 4))
    return da.from_array(file, chunks=(rows, file.shape[1]), name=False, meta=np.empty((0, 0), file.dtype))


def block_rows(d: int) -> int:
    """Rows of a block of a file, as a fit reads it."""
    return BLOCK_BYTES // (4 * d)


def peak_mb() -> float | None:
    """The largest resident memory that this process has had, pages of mapped files included."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), None)


# The parts


@dataclass
class Bench:
    """A file of rows, and what has been found about fits of them."""

    path: Path
    rows: int
    dry: bool
    found: dict[str, Any] = field(default_factory=dict)
    cells: dict[int, dict[str, Any]] = field(default_factory=dict)

    def ask(self, how: str, n: int, launcher: tuple[str, ...] = (), threads: int | None = None, **task: Any) -> Any:
        """The answer of a process of its own; in a dry run, of this one where any will do."""
        if self.dry and not launcher:
            return child({"how": how, "path": str(self.path), "n": n} | task)
        command = [*self.command(how, n, launcher, **task)]
        limit = {} if threads is None else {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "OPENBLAS", "MKL")}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | limit, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise RuntimeError(f"{how} with {n} rows ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(lines[-1])

    def command(self, how: str, n: int, launcher: tuple[str, ...] = (), **task: Any) -> Iterator[str]:
        """The command that runs a task."""
        yield from (sys.executable, *launcher, __file__)
        yield from ("--child", json.dumps({"how": how, "path": str(self.path), "n": n} | task))

    def add(self, part: str, **row: Any) -> None:
        """Keep a row of the snapshot, and print it."""
        self.found.setdefault(part, []).append(row)
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        print(f"{part}: " + ", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)

    def cell(self, n: int) -> dict[str, Any]:
        """Seconds of a pass over n rows: read from the disk, read again, and an iteration in memory and streamed."""
        if n in self.cells:
            return self.cells[n]
        iterations = 1 + min(50, max(2, GONE_THROUGH // n))
        found: dict[str, list[Any]] = {"cold": [], "again": [], "memory": [], "streamed": []}
        for _ in range(REPEATS if n <= IN_MEMORY and not self.dry else 1):
            cold_by = drop_cache(self.path, everything=not self.dry)
            found["cold"].append(self.read(n))
            found["again"].append(self.read(n))
            found["streamed"].append(self.ask("streamed", n, iterations=iterations))
            if n <= IN_MEMORY:
                found["memory"].append(self.ask("memory", n, iterations=iterations))
        fits = found["memory"] + found["streamed"]
        if refused := [fit["refused"] for fit in fits if "refused" in fit]:
            raise RuntimeError(f"the fit of {n} rows failed: {refused[0]}")
        check_same(n, fits)
        cell = {"rows": n, "gb": self.gigabytes(n), "cold_by": cold_by, "form": fits[-1]["form"]}
        cell |= {name: 1e9 / n * statistics.median(found[name]) for name in ("cold", "again")}
        for how in ("memory", "streamed"):
            if found[how]:
                cell[how] = 1e9 / n * statistics.median(fit["iteration"] for fit in found[how])
        cell["start_seconds"] = statistics.median(fit["start"] for fit in found["streamed"])
        if all(fit["peak_mb"] for fit in found["streamed"]):
            cell["peak_mb"] = max(fit["peak_mb"] for fit in found["streamed"])
        self.cells[n] = cell
        return cell

    def read(self, n: int) -> float:
        """Seconds that a pass over the first n rows takes where nothing is done with them."""
        began = time.perf_counter()
        for _ in Slices(np.load(self.path, mmap_mode="r")[:n], None):
            pass
        return time.perf_counter() - began

    def gigabytes(self, n: int) -> float:
        """The size of n rows."""
        return n * np.load(self.path, mmap_mode="r").shape[1] * 4 / 1e9


def check_same(n: int, fits: list[dict[str, Any]]) -> None:
    """Raise where fits of the same rows differ."""
    values = [fit["log_likelihood"] for fit in fits]
    if not max(values) - min(values) <= TOLERANCE * max(1, abs(values[0])):
        raise RuntimeError(f"NOT MEASURED: fits of the same {n} rows end with mean log-likelihoods {values}")


def drop_cache(path: Path, *, everything: bool) -> str:
    """Have the file read from the disk again; says how."""
    if everything and os.access(DROP_CACHES, os.W_OK):
        try:
            DROP_CACHES.write_text("3")
        except OSError:  # root of a container, say
            pass
        else:
            return "drop_caches"
    if not hasattr(os, "posix_fadvise"):
        return "nothing: the file may be in memory"
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "posix_fadvise"


def sizes(bench: Bench) -> None:
    """Nanoseconds per row against the number of rows."""
    for n in [bench.rows] if bench.dry else sorted({*(10**e for e in range(4, 9) if 10**e < bench.rows), bench.rows}):
        bench.add("sizes", **bench.cell(n))


def memory(bench: Bench) -> None:
    """Peak memory at the largest size, and the rate beside what limits it: the disk, or the fit itself."""
    largest, whole = bench.cell(bench.rows), bench.cell(min(bench.rows, IN_MEMORY))
    # The fit reads after it has read: with room in the cache, that is faster than the first time.
    limits = {"reading it again": largest["again"], "a fit in memory": whole["memory"]}
    limit = max(limits, key=limits.__getitem__)
    bench.add(
        "memory",
        rows=bench.rows,
        gb=largest["gb"],
        peak_mb=largest.get("peak_mb"),
        streamed=largest["streamed"],
        **{name.replace(" ", "_"): value for name, value in limits.items()},
        limit=limit,
        share_of_limit=limits[limit] / largest["streamed"],
    )


def ranks(bench: Bench) -> None:
    """Rows per second of one and of two processes that torchrun starts, each of which streams its share."""
    if not find_spec("torch"):
        print("ranks: skipped, torch is not installed", flush=True)
        return
    n = min(bench.rows, SHARED)
    cases = [(2, 1)] if bench.dry else [(1, 1), (1, 2), (2, 1)]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")

    def ask(processes: int, threads: int) -> Any:
        return bench.ask("ranks", n, (*torchrun, str(processes)), threads, iterations=5)

    found = in_turns(bench, cases, ask)
    compare(bench, "ranks", n, {f"{p} x {t}": fits for (p, t), fits in found.items()})


def dask(bench: Bench) -> None:
    """Rows per second of one and of two Dask workers."""
    if not find_spec("distributed"):
        print("dask: skipped, dask and distributed are not installed", flush=True)
        return
    n = min(bench.rows, SHARED)
    found = in_turns(
        bench,
        [(1,)] if bench.dry else [(1,), (2,)],
        lambda workers: bench.ask("dask", n, workers=workers, iterations=5),
    )
    compare(bench, "dask", n, {str(workers): fits for (workers,), fits in found.items()})


def in_turns(bench: Bench, cases: list[Any], ask: Callable[..., Any]) -> dict[Any, list[Any]]:
    """What is answered in each case, asked in turns."""
    found: dict[Any, list[Any]] = {case: [] for case in cases}
    for _ in range(1 if bench.dry else REPEATS):
        for case, answers in found.items():
            answers.append(ask(*case))
    return found


def compare(bench: Bench, part: str, n: int, found: dict[str, list[Any]]) -> None:
    """Rows per second in each case, and the ratio to the first case."""
    fits = [fit for answers in found.values() for fit in answers]
    if refused := [fit["refused"] for fit in fits if "refused" in fit]:
        print(f"{part}: skipped, fit refuses it: {refused[0]}", flush=True)
        return
    check_same(n, fits)
    rates = {case: n / statistics.median(fit["iteration"] for fit in answers) for case, answers in found.items()}
    first = next(iter(rates.values()))
    for case, rate in rates.items():
        bench.add(part, case=case, rows=n, rows_per_second=rate, speedup=rate / first)


def kills(bench: Bench) -> None:
    """Fits that are killed again and again and go on from their checkpoint, compared with one that was not."""
    n, iterations = min(bench.rows, KILLED), 10 if bench.dry else 30
    folder, dice = bench.path.parent, random.Random(0)
    # Kills are aimed every few times.
    plan = [True] if bench.dry else [i % (AT_RANDOM // AIMED + 1) == 1 for i in range(AT_RANDOM + AIMED)]

    def task(checkpoint: Path, every: int) -> dict[str, Any]:
        return dict(checkpoint=str(checkpoint), every=every, iterations=iterations)

    undisturbed = folder / "undisturbed"
    seconds = bench.ask("kills", n, **task(undisturbed, 1))["seconds"]
    expected = state_in(undisturbed)
    fit = 0
    while plan:
        fit += 1
        every, checkpoint = 1 + fit % 3, folder / f"fit-{fit}"
        resumed, mid_write, killed, done = [], 0, 0, False
        while not done:
            command = [*bench.command("kills", n, **task(checkpoint, every))]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                process.stdout.readline()  # "ready"
                if plan and kill(process, checkpoint, dice.uniform(0, seconds / 2), aimed=plan[0]):
                    plan.pop(0)
                    killed += 1
                answers = process.stdout.read()
            done = process.returncode == 0
            if "refused" in answers or process.returncode not in (0, -signal.SIGKILL):
                raise RuntimeError(f"the fit did not go on: {answers or process.returncode}")
            # Raises where it is damaged.
            state = state_in(checkpoint)
            resumed.append(0 if state is None else len(state.reached.lower_bounds))
            for rest in aside(checkpoint):
                mid_write += 1
                rest.unlink()
        difference = distance(state, expected)
        if not difference <= 1e-12:
            raise RuntimeError(f"fit {fit}, killed {killed} times, differs by {difference:.2g}")
        bench.add(
            "kills", fit=fit, every=every, killed=killed, mid_write=mid_write, reached=resumed, difference=difference
        )
    total = sum(row["killed"] for row in bench.found["kills"])
    print(
        f"kills: {total} kills in {fit} fits of {n} rows, no damaged file, every final model the same to 1e-12",
        flush=True,
    )


def kill(process: Any, checkpoint: Path, delay: float, *, aimed: bool) -> bool:
    """Kill a process after a delay, or after it while it writes a checkpoint; whether it was still there."""
    time.sleep(delay)
    while aimed and process.poll() is None and not aside(checkpoint):
        time.sleep(1e-4)
    if process.poll() is not None:
        return False
    process.kill()
    return process.wait() == -signal.SIGKILL


def aside(checkpoint: Path) -> list[Path]:
    """What is being written, or was when its process was killed."""
    return list(checkpoint.parent.glob(f".{checkpoint.name}.*"))


def state_in(checkpoint: Path) -> State | None:
    """Where a fit stands."""
    return Checkpoint(checkpoint, 1, {}).load()


def distance(state: Any, expected: Any) -> float:
    """The largest difference of two results, relative to the largest value of an array."""
    found, wanted = vars(state.reached.parameters), vars(expected.reached.parameters)
    found, wanted = (
        [*parameters.values(), np.asarray(of.reached.lower_bounds)]
        for parameters, of in ((found, state), (wanted, expected))
    )
    return max(float(np.abs(a - b).max() / max(1, np.abs(b).max())) for a, b in zip(found, wanted, strict=True))


# The model of many GPUs


# Bytes and operations per second, and seconds: assumptions, none of them measured here.
GPU_BYTES = 139 * 2**30
NODE = 8  # GPUs of one machine
WITHIN_NODE, BETWEEN_NODES, HOP = 300e9, 40e9, 10e-6  # of all_reduce, for each GPU; a step in its tree
PAGEABLE, PINNED = 10e9, 50e9  # between host and GPU: statistics, and the most of PCIe 5
READER = 10e9  # of the thread that reads blocks of host memory
DISKS = 25e9  # of a node
FACTORISATION = 1e12  # float64 operations of batched Cholesky factors and their inverses
HOST_LOOP = 1e-3  # Python between two E-steps


@dataclass(frozen=True)
class Iteration:
    """Seconds of an EM iteration on GPUs that each have a share of the rows in their memory."""

    share: int  # rows of a GPU
    held: float  # bytes on a GPU
    compute: float  # of the E-step and its sums, at least
    volume: int  # bytes of statistics
    exchange: float  # of all_reduce, and of statistics between GPU and host
    same: float  # what every GPU does for itself: factors of covariances, Python

    @property
    def fits(self) -> bool:
        """Whether the rows are in the memory of the GPU."""
        return self.held <= GPU_BYTES

    @property
    def seconds(self) -> float:
        """Of it all, one after the other."""
        return self.compute + self.exchange + self.same

    @property
    def efficiency(self) -> float:
        """The share of the E-step in it."""
        return self.compute / self.seconds


def iteration(n: int, d: int, k: int, covariance_type: str, gpus: int) -> Iteration:
    """What the model says; float32 rows and `gaussmix.estimate` for an H200."""
    share = ceil(n / gpus)
    cost = estimate(share, d, k, covariance_type)
    # Matrices are sent whole, not as triangles.
    volume = 8 * (k * (1 + d) + prod(COVARIANCES[covariance_type].shape(k, d)) + 1)
    exchange = 0.0
    if gpus > 1:
        exchange = 2 * (gpus - 1) / gpus * volume / (WITHIN_NODE if gpus <= NODE else BETWEEN_NODES)
        exchange += 2 * ceil(log2(gpus)) * HOP
        exchange += 4 * volume / PAGEABLE  # to the host, back to be summed, to the host, back as parameters
    matrices = {"full": k, "tied": 1}.get(covariance_type, 0)
    same = matrices * d**3 / FACTORISATION + HOST_LOOP
    return Iteration(share, 4.0 * share * d + cost.memory, cost.time, volume, exchange, same)


def rows_for(efficiency: float, d: int, k: int, covariance_type: str, gpus: int) -> int:
    """Rows that each GPU needs for this efficiency, to two digits."""
    low, high = 1.0, 1e12
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        below = iteration(int(middle) * gpus, d, k, covariance_type, gpus).efficiency < efficiency
        low, high = (middle, high) if below else (low, middle)
    return int(float(f"{high:.2g}"))


def model() -> str:
    """The tables of docs/scaling.md."""
    n, d, k = 10**10, 64, 64
    in_memory, streamed, limits = [], [], []
    for covariance_type in ("diag", "full"):
        for gpus in (8, 64, 512):
            found = iteration(n, d, k, covariance_type, gpus)
            x, gb = 4 * found.share * d / 1e9, f"{found.held / 1e9:,.0f}"
            first = [covariance_type, gpus, f"{found.share / 1e6:,.1f}", f"{x:,.0f}", gb]
            if found.fits:
                times = [milliseconds(value) for value in (found.exchange, found.same, found.seconds)]
                rest = [f"{found.volume / 1e6:.3g}", *times, f"{found.efficiency:.0%}"]
            else:
                rest = ["", "", "", "does not fit", ""]
            in_memory.append([*first, milliseconds(found.compute), *rest])
            blocks = found.share / block_rows(d)
            compute = blocks * estimate(block_rows(d), d, k, covariance_type).time
            now, best = (max(compute, 1e9 * x / rate) for rate in (READER, PINNED))
            times = [f"{value:.3g}" for value in (compute, now, best, 1e9 * x * min(gpus, NODE) / DISKS)]
            streamed.append([covariance_type, gpus, *times])
    for covariance_type, d, k in (
        ("diag", 64, 64),
        ("full", 64, 64),
        ("diag", 128, 1024),
        ("full", 128, 1024),
        ("full", 256, 1024),
    ):
        found = iteration(512 * 10**6, d, k, covariance_type, 512)
        needed = [f"{rows_for(share, d, k, covariance_type, 512):,}" for share in (0.5, 0.9)]
        times = [milliseconds(found.exchange), milliseconds(found.same), f"{1e9 * found.compute / found.share:.3g}"]
        limits.append([covariance_type, d, k, f"{found.volume / 1e6:.3g}", *times, *needed])
    least = next(gpus for gpus in range(1, 10**4) if iteration(n, 64, 64, "full", gpus).fits)
    about = f"10^10 rows of 64 features in float32 ({4 * n * 64 / 1e12:.2f} TB), k = 64"
    return "\n".join(
        [
            f"{about}, in the memory of the GPUs, for which {least} of them are needed:",
            *markdown(
                "covariance | GPUs | million rows each | X each, GB | with the kernels' copy, GB | E-step, ms | "
                "all_reduce, MB | exchange, ms | factors and Python, ms | iteration, ms | efficiency",
                in_memory,
            ),
            "The same, read block by block in each iteration, in seconds:",
            *markdown(
                "covariance | GPUs | E-step | with blocks read by one thread, as now | "
                "with blocks at the rate of PCIe | reading from disks of the node",
                streamed,
            ),
            "On 512 GPUs, with rows in their memory:",
            *markdown(
                "covariance | d | k | all_reduce, MB | exchange, ms | factors and Python, ms | E-step, ns per row | "
                "rows each for 50 % | for 90 %",
                limits,
            ),
        ]
    )


def milliseconds(seconds: float) -> str:
    """Three digits of it."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def markdown(titles: str, rows: list[list[Any]]) -> list[str]:
    """Lines of a table."""
    lines = [f"| {titles} |", "|" + "---|" * (1 + titles.count(" | "))]
    return ["", *lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


# The whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="these parts; the others of --output stay"
    )
    parser.add_argument("--rows", type=int, default=10**8, help="rows of the file, of 256 bytes each (default 10^8)")
    parser.add_argument(
        "--folder", type=Path, help="where the file lies while it is needed; the system's own by default"
    )
    parser.add_argument("--output", type=Path, help="where the snapshot goes")
    parser.add_argument("--table", type=Path, help="print the tables of this snapshot")
    parser.add_argument("--model", action="store_true", help="print what the cost model says of many GPUs")
    parser.add_argument("--dry-run", action="store_true", help="try this script out on a tiny file")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        if answer := child(arguments.child):
            print(json.dumps(answer), flush=True)
        return 0
    if arguments.model or arguments.table:
        print(model() if arguments.model else tables(json.loads(arguments.table.read_text())))
        return 0
    # As an exception does, it has the file deleted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    dry = arguments.dry_run
    rows, d, k = (2000, 6, 3) if dry else (arguments.rows, 64, 16)
    with tempfile.TemporaryDirectory(prefix="gaussmix-scale-", dir=arguments.folder) as folder:
        free, needed = shutil.disk_usage(folder).free, rows * d * 4
        if needed > 0.95 * free:
            there = f"{folder} has {free / 1e9:.0f} GB, and {rows} rows take {needed / 1e9:.0f}"
            print(f"scale.py: {there}; pass --rows or --folder", file=sys.stderr)
            return 2
        about = machine()
        print(json.dumps(about, indent=1), flush=True)
        bench = Bench(Path(folder) / "rows.npy", rows, dry)
        began = time.perf_counter()
        write(bench.path, rows, d, k)
        took = time.perf_counter() - began
        print(f"file: {rows} rows, {needed / 1e9:.3g} GB, d {d}, k {k}, float32, made in {took:.0f} s", flush=True)
        found: dict[str, Any] = {}
        if arguments.output and arguments.output.exists():
            found = json.loads(arguments.output.read_text())
        for part in arguments.only:
            {"sizes": sizes, "memory": memory, "ranks": ranks, "dask": dask, "kills": kills}[part](bench)
            if part in bench.found:
                found[part] = {"machine": about, "d": d, "k": k, "found": bench.found[part]}
            if arguments.output:
                arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found))
    if dry:
        print("A dry run: the times above mean nothing.")
    return 0


def write(path: Path, n: int, d: int, k: int) -> None:
    """Separated Gaussian clusters in random order, and beside them means that are half a width off their centres."""
    rng = np.random.default_rng(0)
    centres = 6 * rng.standard_normal((k, d), dtype=np.float32)
    np.save(path.with_name("means.npy"), (centres + 0.5 * rng.standard_normal((k, d))).astype(np.float64))
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": (n, d)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in slices(n, CHUNK):
            size = part.stop - part.start
            x = rng.standard_normal((size, d), dtype=np.float32)
            x += centres[rng.integers(k, size=size)]
            x.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def machine() -> dict[str, Any]:
    """What runs, and on what."""
    from machine import machine as of_cpu

    def answer(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip().partition("\n")[0]

    about = of_cpu()
    about["versions"] |= {name: version(name) for name in ("dask", "distributed") if find_spec(name)}
    about |= {
        "commit": answer("git", "rev-parse", "HEAD"),
        "changed": bool(answer("git", "status", "--porcelain", "--untracked-files=no")),
    }
    if hasattr(os, "sysconf"):
        about["memory_gb"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return about


# Columns of the tables: what they are called, where they come from, how they are printed.
TABLES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "sizes": (
        ("rows", "rows", ",d"),
        ("file, GB", "gb", ".3g"),
        ("reading it first", "cold", ".0f"),
        ("reading it again", "again", ".0f"),
        ("iteration in memory", "memory", ".0f"),
        ("iteration streamed", "streamed", ".0f"),
        ("start, s", "start_seconds", ".2g"),
        ("peak MB", "peak_mb", ".0f"),
    ),
    "memory": (
        ("rows", "rows", ",d"),
        ("file, GB", "gb", ".3g"),
        ("peak MB", "peak_mb", ".0f"),
        ("iteration streamed", "streamed", ".0f"),
        ("reading it again", "reading_it_again", ".0f"),
        ("iteration in memory", "a_fit_in_memory", ".0f"),
        ("the slower of the two", "limit", ""),
        ("rate, of the slower one's", "share_of_limit", ".0%"),
    ),
    "ranks": (
        ("processes x threads", "case", ""),
        ("rows", "rows", ",d"),
        ("million rows/s", "rows_per_second", ".3g"),
        ("ratio", "speedup", ".2f"),
    ),
    "dask": (
        ("workers", "case", ""),
        ("rows", "rows", ",d"),
        ("million rows/s", "rows_per_second", ".3g"),
        ("ratio", "speedup", ".2f"),
    ),
    "kills": (
        ("fit", "fit", ""),
        ("checkpoint every", "every", ""),
        ("killed", "killed", ""),
        ("of these while writing", "mid_write", ""),
        ("iterations in the file after each run", "reached", ""),
        ("difference", "difference", ".1g"),
    ),
}


def tables(snapshot: dict[str, Any]) -> str:
    """The snapshot as Markdown; times in nanoseconds per row where nothing else is said."""
    lines = []
    for part, columns in TABLES.items():
        if part not in snapshot:
            continue
        about = snapshot[part]["machine"]
        commit = about["commit"][:12] + (" with changes" if about["changed"] else "")
        rows = []
        for row in snapshot[part]["found"]:
            shown = row | {"rows_per_second": row.get("rows_per_second", 0) / 1e6}
            values = [(shown.get(name), form) for _, name, form in columns]
            rows.append(["" if value is None else format(value, form) if form else value for value, form in values])
        lines.append(f"{part}: {about['date']}, {about['cpu']}, {about['threads']} threads, commit {commit}")
        lines += markdown(" | ".join(title for title, _, _ in columns), rows)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
