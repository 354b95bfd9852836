"""Check the kernels on a CUDA device, time them beside their floors and their peers, and write a snapshot.

`PYTHONPATH=src:kernels python benchmarks/gpu.py` does all of it in less than 8 minutes; `--table FILE` prints the
tables of a snapshot. `--dry-run`, with TRITON_INTERPRET=1, runs each part on tiny tensors in host memory: a test of
this script, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# scikit-learn asks for it where arrays are not NumPy's. It has to be set before scipy is imported.
os.environ.setdefault("SCIPY_ARRAY_API", "1")

NEEDED = (
    "torch",
    "triton",
    "array_api_compat",
    "sklearn",
    "safetensors",
    "threadpoolctl",
    "gaussmix",
    "gaussmix_kernels",
)
MISSING = [name for name in NEEDED if not find_spec(name)]
if not MISSING:
    import numpy as np
    import torch

    import gaussmix
    import gaussmix_kernels as kernels
    from gaussmix import _estimate
    from gaussmix._covariance import COVARIANCES
    from gaussmix._em import EMResult, run_em
    from gaussmix._objective import MaximumLikelihood
    from gaussmix._parameters import Parameters
    from gaussmix.backends import _array_api
    from gaussmix.backends._engine import Engine
    from gaussmix.rows import _gpu, _placement
    from gaussmix.rows._data import Rows
    from gaussmix.rows._passes import InMemory
    from gaussmix_kernels import _centred, _features, _parameters, _prepass, _sizes

SNAPSHOTS = Path(__file__).parent / "snapshots"
TYPES = ("spherical", "tied", "diag", "full")
# Milliseconds of an iteration on an H200 that are aimed at, default tier.
TARGETS = {
    (10_000, 8, 4): dict(spherical=0.2, tied=0.2, diag=0.2, full=0.3),
    (100_000, 32, 16): dict(spherical=0.2, tied=0.2, diag=0.2, full=0.3),
    (1_000_000, 64, 64): dict(spherical=0.15, tied=0.15, diag=0.25, full=6.0),
    (10_000_000, 32, 64): dict(spherical=0.6, tied=0.6, diag=1.0, full=16.0),
    (1_000_000, 128, 1024): dict(spherical=5.0, tied=5.0, diag=10.0, full=280.0),
}
COMPILED = (((1_000_000, 64, 64), "diag"), ((100_000, 32, 16), "full"))
# (n, d, k), and whether the exact tier is checked as well. Beside the first: components that do not fit on the chip,
# and matrices of more than one block, whose M-step is torch's.
CHECKS = (((3001, 13, 7), True), ((8009, 37, 70), False), ((2003, 70, 3), False))
TOLERANCE = {"parameters": {False: 1e-4, True: 1e-9}, "nats": {False: 1e-3, True: 1e-9}}
REGULARIZATION = 1e-6
RUNS = 25
# Seconds: of everything, and of a peer in a cell.
BUDGET, PEER_SECONDS = 450.0, 20.0
# Seconds that single kernels leave to iterations, and these to peers.
FOR_ITERATIONS, FOR_PEERS = 240.0, 60.0
# Elements of the arrays (k, rows, d) that the plain EM of full covariances holds at a time.
PLAIN_ELEMENTS = 2**28
DRY = (150, 5, 3)
# Rows in host memory, 2 GB of them, and the largest relative difference of a fit that they pass through the device for.
HOST, HOST_TOLERANCE = (8_000_000, 64, 16), 1e-5


@dataclass
class Bench:
    """Where things run, how long there is, and what has been found."""

    device: str
    budget: float = BUDGET
    began: float = field(default_factory=time.perf_counter)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def dry(self) -> bool:
        """Whether times mean nothing."""
        return self.device == "cpu"

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (time.perf_counter() - self.began)

    @property
    def rates(self) -> _estimate.Device | None:
        """The rates of this device, where they are known."""
        return _estimate.DEVICES.get(self.name)

    @property
    def name(self) -> str:
        """What `gaussmix.estimate` calls the device; in a dry run, one of those."""
        if self.dry:
            return "h200"
        model = torch.cuda.get_device_name().lower()
        return next((name for name in _estimate.DEVICES if name in model), "")

    def add(self, part: str, **row: Any) -> None:
        """Keep a row of the snapshot, and print it."""
        self.found.setdefault(part, []).append(row)
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        print(f"{part}: " + ", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)

    def skip(self, what: str, why: str) -> None:
        """Keep what was not measured."""
        self.found.setdefault("skipped", []).append({"what": what, "why": why})
        print(f"skipped: {what}: {why}", flush=True)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails within it is kept as not measured, and the rest goes on."""
        try:
            yield
        except Exception as error:
            self.skip(what, explained(error))

    def is_right(self, covariance_type: str) -> bool:
        """Whether every path of the type that was checked came out right; says so where not."""
        wrong = [row["path"] for row in self.found.get("correctness", []) if not row["right"]]
        mine = [path for path in wrong if path.startswith(f"{covariance_type}, ")]
        if mine:
            self.skip(covariance_type, f"it came out wrong in {'; '.join(mine)}")
        return not mine

    def write(self, output: Path | None) -> None:
        """Write the snapshot as far as it goes; nothing of a dry run."""
        self.found["seconds"] = time.perf_counter() - self.began
        if self.dry and output is None:
            return
        slug = re.sub(r"[^a-z0-9]+", "-", self.found["machine"]["device"].lower()).strip("-")
        output = output or SNAPSHOTS / f"{slug}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        partial_ = output.with_suffix(".partial")
        partial_.write_text(json.dumps(self.found, indent=1) + "\n")
        partial_.replace(output)
        print(f"written to {output}", flush=True)

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any]) -> float:
        """Wall-clock time of a call."""
        self.synchronize()
        began = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - began

    def milliseconds(self, function: Callable[[], Any]) -> float:
        """Median time that the device spends on a call."""
        if self.dry:
            return 1e3 * self.seconds(function)
        for _ in range(3):
            function()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
        torch.cuda.synchronize()
        # While the device sleeps the host gets ahead of it: what is timed is kernels, not launches.
        torch.cuda._sleep(20_000_000)
        for first, last in events:
            first.record()
            function()
            last.record()
        torch.cuda.synchronize()
        return statistics.median(first.elapsed_time(last) for first, last in events)


@dataclass(frozen=True)
class Blobs:
    """Gaussian clusters of unit width, and where EM starts."""

    x: torch.Tensor  # (n, d)
    means: torch.Tensor  # (k, d), float64: about half a width from the centres in each feature

    @classmethod
    def of(
        cls, shape: tuple[int, int, int], device: str, dtype: torch.dtype | None = None, spread: float = 6.0
    ) -> Blobs:
        """Blobs of n rows, d features and k clusters, drawn on the device, their centres as far apart as `spread`."""
        n, d, k = shape
        random = torch.Generator(device=device).manual_seed(0)
        normal = partial(torch.randn, generator=random, device=device)
        centres = spread * normal((k, d), dtype=torch.float64)
        x = torch.empty((n, d), dtype=dtype or torch.float32, device=device)
        for start in range(0, n, 2**20):
            rows = x[start : start + 2**20]
            labels = torch.randint(k, (len(rows),), generator=random, device=device)
            rows.copy_(centres[labels] + normal(rows.shape))
        return cls(x, centres + 0.5 * normal((k, d), dtype=torch.float64))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, d, k)."""
        return (*self.x.shape, self.means.shape[0])

    def identity(self, covariance_type: str) -> torch.Tensor:
        """Unit covariances as the type stores them."""
        k, d = self.means.shape
        ones = torch.ones((k, d), dtype=torch.float64, device=self.x.device)
        eye = torch.eye(d, dtype=torch.float64, device=self.x.device)
        return {"full": eye.repeat(k, 1, 1), "tied": eye, "diag": ones, "spherical": ones[:, 0].clone()}[
            covariance_type
        ]

    def start(self, covariance_type: str, shift: torch.Tensor | float = 0.0) -> kernels.Parameters:
        """Parameters that EM starts from, means as offsets from `shift`."""
        k = self.means.shape[0]
        weights = torch.full((k,), 1 / k, dtype=torch.float64, device=self.x.device)
        unit = self.identity(covariance_type)
        return kernels.Parameters(weights, self.means - shift, unit, unit.clone())

    def density(self, covariance_type: str, shift: torch.Tensor | float = 0.0) -> kernels.Density:
        """What an E-step reads of them: log det U is 0."""
        start, d = self.start(covariance_type, shift), self.means.shape[1]
        offsets = torch.log(start.weights) - 0.5 * d * math.log(2 * math.pi)
        return kernels.Density(offsets, start.means, start.precision_cholesky)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where the snapshot goes; snapshots/<device>.json by default")
    parser.add_argument("--table", type=Path, help="print the tables of this snapshot")
    parser.add_argument("--dry-run", action="store_true", help="try this script out without a GPU")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="what all of it may take")
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(json.loads(arguments.table.read_text())))
        return 0
    if reason := why_not(arguments.dry_run):
        print(f"gpu.py: {reason}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    bench = Bench("cpu" if arguments.dry_run else "cuda", arguments.seconds)
    bench.found["machine"] = machine(bench)
    print(json.dumps(bench.found["machine"], indent=1), flush=True)
    for part in (check, kernels_alone, iterations, split, from_host, peers):
        with bench.attempt(part.__name__):
            part(bench)
        # A process that dies later leaves what was found so far.
        bench.write(arguments.output)
    print(tables(bench.found))
    wrong = [row["path"] for row in bench.found.get("correctness", []) if not row["right"]]
    if wrong:
        print(f"WRONG: {', '.join(wrong)}")
        return 1
    if bench.dry:
        print("A dry run: every part ran, and the times above mean nothing.")
    return 0


def why_not(dry: bool) -> str | None:
    """The reason why this can not run here; None if it can."""
    if MISSING:
        return f"{', '.join(MISSING)} can not be imported; install them, or set PYTHONPATH=src:kernels for our own"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if dry:
        return None if interpreted else "--dry-run needs TRITON_INTERPRET=1"
    if interpreted:
        return "TRITON_INTERPRET=1 is set, and kernels would run in the interpreter; unset it"
    return None if torch.cuda.is_available() else "no CUDA device is here; --dry-run tries the script out without one"


def explained(error: Exception) -> str:
    """What went wrong, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def machine(bench: Bench) -> dict[str, Any]:
    """What runs, and on what."""

    def answer(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip().partition("\n")[0]

    versions = {}
    for name in ("torch", "triton", "numpy", "scikit-learn", "torchgmm"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if find_spec("cupy"):
        import cupy

        versions["cupy"] = cupy.__version__
    return {
        "device": "the interpreter" if bench.dry else torch.cuda.get_device_name(),
        "driver": "" if bench.dry else answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions | {"gaussmix": gaussmix.__version__},
        "commit": answer("git", "rev-parse", "HEAD"),
        "changed": bool(answer("git", "status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
    }


def check(bench: Bench) -> None:
    """Every type, kind of features and tier: a step of EM and inference against the array API on the CPU in float64."""
    for shape, exact_too in [((70, 5, 3), True), ((40, 17, 2), False)] if bench.dry else CHECKS:
        for exact in (False, True) if exact_too else (False,):
            # They overlap: of separate clusters, responsibilities are 0 and 1.
            blobs = Blobs.of(shape, bench.device, torch.float64 if exact else torch.float32, spread=0.5)
            data = kernels.prepare(blobs.x, exact=exact)
            for covariance_type in TYPES:
                for kind in kernels.kinds(COVARIANCES[covariance_type].quadratic, shape[1]):
                    found = partial(step_errors, blobs, data, covariance_type, kind)
                    compare(bench, f"{covariance_type}, {kind}, {list(shape)}", exact, found)
            compare(bench, f"k-means, {list(shape)}", exact, partial(k_means_errors, blobs, data))
    if find_spec("cupy") and not bench.dry:
        compare(bench, "CuPy array through GaussianMixture", False, cupy_errors)


def compare(bench: Bench, path: str, exact: bool, find: Callable[[], dict[str, float]]) -> None:
    """Keep the errors of a path, and whether they are small enough; a path that fails is wrong."""
    try:
        errors = find()
    except Exception as error:
        bench.add("correctness", path=path, tier="exact" if exact else "default", right=False, failed=explained(error))
        return
    limits = {name: TOLERANCE["nats" if name in ("bound", "evidence") else "parameters"][exact] for name in errors}
    right = all(error <= limits[name] for name, error in errors.items())  # NaN is not
    row = {name: float(error) for name, error in errors.items()}
    bench.add("correctness", path=path, tier="exact" if exact else "default", right=right, **row)


def step_errors(blobs: Blobs, data: kernels.Data, covariance_type: str, kind: str) -> dict[str, float]:
    """Largest errors of a step and of inference, of parameters relative to their largest."""
    em = kernels.EM(data, covariance_type, kind)
    start, density = blobs.start(covariance_type, data.shift), blobs.density(covariance_type, data.shift)
    settings = kernels.Settings.of(data, regularization=REGULARIZATION)
    progress = em.advance(start, density, at_most=1, previous=0.0, settings=settings)

    covariance = COVARIANCES[covariance_type]
    objective = MaximumLikelihood(covariance, REGULARIZATION)
    block = _array_api.Block(Rows(blobs.x.double().cpu()))
    on_rows = Engine(block.rows, InMemory(block), block, covariance)
    begun = Parameters(*(value.cpu() for value in vars(blobs.start(covariance_type)).values()))
    expected = run_em(on_rows, objective, EMResult(begun, [], converged=False), tolerance=0.0, max_iter=1)
    found = {name: value.cpu() for name, value in vars(progress.parameters).items()}
    found["means"] = found["means"] + data.shift.cpu()
    errors = {}
    for name, value in found.items():
        reference = getattr(expected.parameters, name)
        errors[name] = float((value - reference).abs().max() / max(1.0, float(reference.abs().max())))
    bound = progress.bounds[0] if progress.bounds else float("nan")
    errors["bound"] = abs(bound - expected.lower_bounds[0])
    exact = objective.density(begun)
    errors["evidence"] = float((em.log_evidence(density).cpu() - block.log_evidence(exact)).abs().max())
    r = block.responsibilities(exact)
    errors["responsibilities"] = float((em.responsibilities(density).cpu() - r).abs().max())
    # A label may be any of those that are as good as the best.
    chosen = torch.take_along_dim(r, em.labels(density).cpu().long()[:, None], dim=1)[:, 0]
    errors["labels"] = float((r.amax(dim=1) - chosen).max())
    return errors


def k_means_errors(blobs: Blobs, data: kernels.Data) -> dict[str, float]:
    """Largest errors of distances to the nearest centroid, and of the sums of clusters."""
    x, k = blobs.x.double(), blobs.means.shape[0]
    labels = kernels.nearest(data, blobs.means - data.shift)
    distances = torch.cdist(x, blobs.means)
    chosen = torch.take_along_dim(distances, labels.long()[:, None], dim=1)[:, 0]
    counts, sums = kernels.sums(data, labels, k)
    one_hot = torch.nn.functional.one_hot(labels.long(), k).double()
    reference = one_hot.T @ (x - data.shift)
    return {
        "distances": float((chosen - distances.amin(dim=1)).max()),
        "counts": float((counts - one_hot.sum(dim=0)).abs().max() / len(x)),
        "sums": float((sums - reference).abs().max() / reference.abs().max()),
    }


def cupy_errors() -> dict[str, float]:
    """Difference between a fit of a CuPy array and one of the torch tensor on the same memory."""
    import cupy

    blobs = Blobs.of((3001, 13, 7), "cuda")
    arrays = {"torch": blobs.x, "cupy": cupy.from_dlpack(blobs.x)}
    settings = dict(init_means=blobs.means.cpu().numpy(), convergence_tolerance=0.0, trainer_params={"max_epochs": 5})
    fits = {name: gaussmix.GaussianMixture(7, **settings).fit(x) for name, x in arrays.items()}
    if fits["cupy"].backend_ != fits["torch"].backend_:
        return {"backend": float("nan")}
    difference = fits["cupy"].means_.get() - fits["torch"].means_.cpu().numpy()
    return {"means": float(np.abs(difference).max())}


def kernels_alone(bench: Bench) -> None:
    """Times of single kernels beside the floor of their bytes and products."""
    for shape in [DRY] if bench.dry else [(1_000_000, 64, 64), (10_000_000, 32, 64), (1_000_000, 16, 8)]:
        blobs = Blobs.of(shape, bench.device)
        with bench.attempt(f"prepass {list(shape)}"):
            prepass(bench, blobs)
        data = kernels.prepare(blobs.x, exact=False)
        for covariance_type in filter(bench.is_right, TYPES):
            for kind in kernels.kinds(COVARIANCES[covariance_type].quadratic, shape[1]):
                with bench.attempt(f"kernels of {covariance_type}, {kind}, {list(shape)}"):
                    single_kernels(bench, blobs, data, covariance_type, kind)
    for shape in [] if bench.dry else [(100_000, 128, 1024)]:
        blobs = Blobs.of(shape, bench.device)
        data = kernels.prepare(blobs.x, exact=False)
        for covariance_type, kind in (("diag", "squares"), ("full", "centred")):
            with bench.attempt(f"kernels of {covariance_type}, {kind}, {list(shape)}"):
                single_kernels(bench, blobs, data, covariance_type, kind)


def kernel(
    bench: Bench, name: str, shape: tuple[int, ...], function: Callable[[], Any], products: float, moved: float
) -> None:
    """Time a kernel. `products` are the operations that tensor cores are given, `moved` the bytes of device memory."""
    if bench.left < FOR_ITERATIONS:
        bench.skip(f"{name} {list(shape)}", "the time that is left is for whole iterations")
        return
    try:
        ms = bench.milliseconds(function)
    except Exception as error:
        bench.skip(f"{name} {list(shape)}", explained(error))
        return
    row = dict(kernel=name, shape=list(shape), ms=ms, gflop=products / 1e9, mb=moved / 1e6)
    if bench.rates:
        floor = 1e3 * max(products / bench.rates.tensor, moved / bench.rates.bandwidth)
        row |= dict(floor_ms=floor, share=floor / ms)
    bench.add("kernels", **row)


def prepass(bench: Bench, blobs: Blobs) -> None:
    x, (n, d, _) = blobs.x, blobs.shape
    shift = x[0].double()
    scale = torch.ones_like(shift)
    ld = _sizes.multiple(d, 16)
    kernel(bench, "measure", (n, d), lambda: _prepass.measure(x, None), 0, 4 * n * d)
    convert = partial(_prepass.convert, x, shift, scale, exact=False)
    kernel(bench, "convert", (n, d), convert, 0, 4 * n * (d + ld + 1))


def single_kernels(bench: Bench, blobs: Blobs, data: kernels.Data, covariance_type: str, kind: str) -> None:
    """The kernels of an iteration one by one: of features the whole step, of centred rows those of one chunk."""
    (n, d, k), label = blobs.shape, f"{covariance_type}, {kind}"
    em = kernels.EM(data, covariance_type, kind)
    parameters = blobs.start(covariance_type, data.shift)
    natural, operands = em._start(blobs.density(covariance_type, data.shift))
    settings = kernels.Settings.of(data, regularization=REGULARIZATION)
    if isinstance(em.step, _features.Step):
        work = _estimate._features(n, d, k, False, kind)
        name = "fused step" if em.step.fused(k) else "step, logits twice"
        step = partial(em.step.expect, operands)
        kernel(bench, f"{label}: {name}", blobs.shape, step, work.tensor_flops, work.bytes)
        logits = work.tensor_flops / (2 if em.step.fused(k) else 3)
        moved = n * (4 * _sizes.multiple(d, 16) + 4 + 4 * (kind == "norm"))
        log_prob = partial(em.step.normalize, operands)
        kernel(bench, f"{label}: log_prob, log-sum-exp", blobs.shape, log_prob, logits, moved)
        statistics_ = step()[0]
    else:
        statistics_ = chunk_kernels(bench, em.step, operands, label, blobs.shape)
    if covariance_type not in ("full", "tied"):
        return
    new, stop = parameters.empty_like(), em.step.never
    matrices = k if covariance_type == "full" else 1
    stacked = parameters.covariances.reshape(matrices, d, d)
    factors = torch.empty_like(stacked)
    # Their operations are float64 outside of tensor cores, one column after the other: the floor is that of the bytes.
    factor = partial(_parameters.factor, stacked, factors, natural.log_det, natural.singular, stop)
    kernel(bench, f"{label}: factor, log-determinant", (matrices, d), factor, 0, 16 * stacked.numel())
    if not bench.dry:
        kernel(
            bench, "the same by cuSOLVER and cuBLAS", (matrices, d), partial(cusolver, stacked), 0, 16 * stacked.numel()
        )
    m_step = partial(em.type.maximize, statistics_, parameters, new, natural, data, settings, stop)
    moved = 8 * (statistics_.numel() + natural.products.numel() + 4 * stacked.numel())
    kernel(bench, f"{label}: M-step", (matrices, d), m_step, 0, moved)


def cusolver(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors and log-determinants of `factor` by torch's functions."""
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device).expand_as(matrices)
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(matrices)[0], eye, upper=False)
    return inverse.mT, inverse.diagonal(dim1=1, dim2=2).log().sum(dim=1)


def chunk_kernels(
    bench: Bench, step: _centred.Step, operands: Any, label: str, shape: tuple[int, int, int]
) -> torch.Tensor:
    """The three kernels of centred rows on the first chunk, whose logits and rows may stay in the cache."""
    (_, d, k), (start, rows) = shape, next(step._chunks(shape[2]))
    shape = (rows, d, k)
    work = _estimate._centred(rows, d, k, False)
    ld = _sizes.multiple(d, 16)
    logits = step._logits(operands, start, rows, step.never)
    normalizer = step._room(step.data.dtype)
    log_prob = partial(step._logits, operands, start, rows, step.never)
    kernel(
        bench,
        f"{label}: log_prob",
        shape,
        log_prob,
        3 * _estimate.centred_flops("logits", rows, d, k, False),
        4 * rows * (ld + k),
    )
    normalize = partial(step._normalize, logits, normalizer, start, step.never)
    kernel(bench, f"{label}: log-sum-exp", shape, normalize, 0, 4 * rows * (k + 1))
    normalize()
    scatter = partial(step._scatter, operands.centres, logits, normalizer, None, start, rows, step.never, None)
    moved = work.bytes - 8 * rows - 4 * rows * ld + 4 * rows * k
    products = 3 * _estimate.centred_flops("scatter", rows, d, k, False)
    kernel(bench, f"{label}: weighted covariance", shape, scatter, products, moved)
    return scatter()


def iterations(bench: Bench) -> None:
    """EM iterations of the default tier beside the target and what `gaussmix.estimate` predicts."""
    for shape in [DRY] if bench.dry else TARGETS:
        if bench.left < FOR_PEERS:
            bench.skip(f"iterations {list(shape)}", "no time left")
            continue
        with bench.attempt(f"iterations {list(shape)}"):
            blobs = Blobs.of(shape, bench.device)
            for covariance_type in filter(bench.is_right, TYPES):
                with bench.attempt(f"iterations {list(shape)} {covariance_type}"):
                    iteration(bench, blobs, covariance_type)


def iteration(bench: Bench, blobs: Blobs, covariance_type: str) -> None:
    """A cell of `iterations`."""
    shape, before = blobs.shape, 0
    if not bench.dry:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    ms = 1e3 * interleaved(bench, {"gaussmix": ours(blobs, covariance_type)})["gaussmix"]
    row: dict[str, Any] = dict(shape=list(shape), type=covariance_type, ms=ms)
    row["target_ms"] = TARGETS.get(shape, {}).get(covariance_type)
    if bench.rates:
        cost = gaussmix.estimate(*shape, covariance_type, device=bench.name)
        predicted = 1e3 * cost.time
        row |= dict(predicted_ms=predicted, limit=cost.limit, share=predicted / ms)
        row |= dict(gflop=cost.flops / 1e9, mb=cost.bytes / 1e6, predicted_memory_mb=cost.memory / 1e6)
    if not bench.dry:
        row["memory_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    bench.add("iterations", **row)


def split(bench: Bench) -> None:
    """What each kernel of an iteration takes, as the profiler sees it."""
    activity = torch.profiler.ProfilerActivity.CPU if bench.dry else torch.profiler.ProfilerActivity.CUDA
    for shape in [DRY] if bench.dry else TARGETS:
        if bench.left < FOR_PEERS:
            bench.skip(f"split of {list(shape)}", "no time left")
            continue
        with bench.attempt(f"split of {list(shape)}"):
            blobs = Blobs.of(shape, bench.device)
            for covariance_type in filter(bench.is_right, TYPES):
                run, often = ours(blobs, covariance_type), 1 if bench.dry else 4
                run(often)
                with torch.profiler.profile(activities=[activity]) as profile:
                    run(often)
                    bench.synchronize()
                for event in profile.key_averages():
                    total = event.self_cpu_time_total if bench.dry else event.self_device_time_total
                    row = dict(shape=list(shape), type=covariance_type, kernel=event.key[:60])
                    if total:
                        bench.found.setdefault("split", []).append(
                            row | dict(launches=event.count / often, ms=total / 1e3 / often)
                        )


def ours(blobs: Blobs, covariance_type: str) -> Callable[[int], Any]:
    """EM by the kernels, for a number of iterations."""
    data = kernels.prepare(blobs.x, exact=False)
    em = kernels.EM(data, covariance_type, kernels.kinds(COVARIANCES[covariance_type].quadratic, data.shape[1])[0])
    start, density = blobs.start(covariance_type, data.shift), blobs.density(covariance_type, data.shift)
    settings = kernels.Settings.of(data, regularization=REGULARIZATION)

    def run(n: int) -> None:
        progress = em.advance(start, density, at_most=n, previous=0.0, settings=settings)
        if len(progress.bounds) != n:
            raise RuntimeError(f"EM stopped after {len(progress.bounds)} of {n} iterations, reason {progress.reason}")

    return run


def interleaved(bench: Bench, runs: dict[str, Callable[[int], Any]]) -> dict[str, float]:
    """Median seconds of an iteration of each, in turns: 25 iterations less 5, or 3 less 1 of a slow peer."""
    numbers = {}
    for name, run in runs.items():
        run(1)
        first = bench.seconds(partial(run, 1))
        few, many = (1, 2) if bench.dry else (5, 25) if name == "gaussmix" or first < 0.2 else (1, 3)
        numbers[name] = (few, many)
        if (few + many) * first > PEER_SECONDS and name != "gaussmix" and not bench.dry:
            bench.skip(name, f"{few + many} iterations would take {(few + many) * first:.0f} s")
            del numbers[name]
    times: dict[str, list[float]] = {name: [] for name in numbers}
    rounds = 1 if bench.dry else 3
    for round_ in range(rounds):
        for name, (few, many) in numbers.items():
            if round_ and statistics.median(times[name]) * (few + many) > 1:
                continue  # long runs vary little
            seconds = [bench.seconds(partial(runs[name], i)) for i in (few, many)]
            times[name].append((seconds[1] - seconds[0]) / (many - few))
    return {name: statistics.median(values) for name, values in times.items()}


def from_host(bench: Bench) -> None:
    """Iterations on rows of host memory, beside copies of page-locked memory alone and rows that the device holds."""
    if bench.dry:
        bench.skip("rows of host memory", "a dry run has no device to copy them to")
        return
    blobs = Blobs.of(HOST, bench.device)
    x = blobs.x.cpu()
    blocks = torch.split(x, _gpu.BLOCK_BYTES // (4 * x.shape[1]))
    pinned = blocks[0].pin_memory()
    place = partial(_placement._moved, where="cuda:0")
    limit = bench.milliseconds(lambda: place(pinned)) * x.nbytes / pinned.nbytes

    def go_through() -> None:
        for _ in _gpu.sent("cuda:0", place, blocks):
            pass

    go_through()
    passing = 1e3 * statistics.median(bench.seconds(go_through) for _ in range(3))
    for covariance_type in filter(bench.is_right, TYPES):
        with bench.attempt(f"rows of host memory, {covariance_type}"):
            there, expected = callback_fit(blobs, blobs.x, covariance_type)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ms, means = callback_fit(blobs, x, covariance_type, batch_size=len(blocks[0]))
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6
            difference = float((means - expected.cpu()).abs().max() / expected.abs().max())
            if not difference <= HOST_TOLERANCE:
                raise RuntimeError(f"means are off by {difference:.2g}")
            row = dict(ms=ms, copies_ms=limit, passing_ms=passing, there_ms=there, memory_mb=peak)
            bench.add("host", shape=list(HOST), type=covariance_type, **row, share=max(limit, there) / ms)


def callback_fit(
    blobs: Blobs, x: torch.Tensor, covariance_type: str, batch_size: int | None = None
) -> tuple[float, torch.Tensor]:
    """Milliseconds of an iteration on x, of which each is followed by a callback, and the means after five."""
    times: list[float] = []
    mixture = gaussmix.GaussianMixture(
        len(blobs.means),
        covariance_type=covariance_type,
        init_means=blobs.means.to(x),
        convergence_tolerance=0.0,
        batch_size=batch_size,
        trainer_params={"max_epochs": 5, "accelerator": "gpu", "enable_progress_bar": False},
    )
    mixture.fit(x, callback=lambda *_: times.append(time.perf_counter()))
    return 1e3 * (times[-1] - times[0]) / (len(times) - 1), mixture.means_


def peers(bench: Bench) -> None:
    """Iterations of others beside ours, in turns."""
    for shape in [DRY] if bench.dry else TARGETS:
        with bench.attempt(f"peers of {list(shape)}"):
            blobs = Blobs.of(shape, bench.device)
            for covariance_type in filter(bench.is_right, TYPES):
                with bench.attempt(f"peers of {list(shape)} {covariance_type}"):
                    beside_peers(bench, blobs, covariance_type)
            if not bench.dry:
                torch.cuda.empty_cache()


def beside_peers(bench: Bench, blobs: Blobs, covariance_type: str) -> None:
    """A cell of `peers`."""
    shape = blobs.shape
    label = f"{list(shape)} {covariance_type}"
    if bench.left < 45:
        bench.skip(f"peers of {label}", "no time left")
        return
    runs: dict[str, Callable[[int], Any]] = {"gaussmix": ours(blobs, covariance_type)}
    for name, make in makers(shape, covariance_type).items():
        estimated = 6 * peer_seconds(shape, covariance_type, name)
        if not bench.dry and estimated > PEER_SECONDS:
            bench.skip(f"{name} of {label}", f"estimated at {estimated:.0f} s")
            continue
        if name == "torch.compile" and bench.left < 120:
            bench.skip(f"{name} of {label}", "no time left to compile")
            continue
        with bench.attempt(f"{name} of {label}"):
            run = make(blobs, covariance_type)
            run(1)
            runs[name] = run
    if len(runs) > 1:
        seconds = interleaved(bench, runs)
        milliseconds = {name: 1e3 * value for name, value in seconds.items()}
        bench.add("peers", shape=list(shape), type=covariance_type, **milliseconds)


def makers(shape: tuple[int, int, int], covariance_type: str) -> dict[str, Callable[..., Callable[[int], Any]]]:
    """The peers of a cell."""
    found: dict[str, Callable[..., Callable[[int], Any]]] = {
        "torch, float32": partial(plain, precision="highest"),
        "torch, TF32": partial(plain, precision="high"),
    }
    if (shape, covariance_type) in COMPILED:
        found["torch.compile"] = partial(plain, precision="highest", compiled=True)
    if find_spec("sklearn"):
        found["scikit-learn"] = scikit_learn
    if find_spec("torchgmm") and shape[0] <= 100_000 and torch.cuda.is_available():
        found["torchgmm"] = torchgmm
    return found


def peer_seconds(shape: tuple[int, int, int], covariance_type: str, peer: str) -> float:
    """A rough iteration of a peer: float32 products at 20 TFLOP/s, 12 passes over its arrays at 1.5 TB/s."""
    n, d, k = shape
    # scikit-learn multiplies all rows with the shared factor once more for each component.
    matrices = covariance_type == "full" or (covariance_type == "tied" and peer == "scikit-learn")
    flops = 4 * n * k * d * (d if matrices else 2)
    elements = n * k * (d if matrices else 1)
    return flops / 20e12 + 12 * 4 * elements / 1.5e12


def plain(blobs: Blobs, covariance_type: str, *, precision: str, compiled: bool = False) -> Callable[[int], Any]:
    """EM as it is written in torch without kernels of one's own; its products are cuBLAS's."""
    start = blobs.start(covariance_type)
    begun = tuple(value.float() for value in (start.weights, start.means, start.covariances))
    step = {"full": plain_full, "tied": plain_tied}.get(covariance_type, plain_diagonal)
    if compiled:
        step = torch.compile(step)

    def run(n: int) -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            parameters = begun
            for _ in range(n):
                *parameters, _ = step(blobs.x, *parameters)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def plain_diagonal(x: Any, weights: Any, means: Any, variances: Any) -> tuple[Any, ...]:
    """A step of diagonal and, where variances are (k,), of spherical covariances."""
    spherical = variances.ndim == 1
    precisions = 1 / (variances[:, None].expand(means.shape) if spherical else variances)
    square = x * x
    constants = weights.log() + 0.5 * precisions.log().sum(dim=1) - 0.5 * (precisions * means * means).sum(dim=1)
    logits = x @ (precisions * means).T - 0.5 * square @ precisions.T + constants
    bound = torch.logsumexp(logits, dim=1).mean()
    r = torch.softmax(logits, dim=1)
    counts = r.sum(dim=0)
    means = r.T @ x / counts[:, None]
    variances = r.T @ square / counts[:, None] - means * means + REGULARIZATION
    return counts / x.shape[0], means, variances.mean(dim=1) if spherical else variances, bound


def plain_tied(x: Any, weights: Any, means: Any, covariance: Any) -> tuple[Any, ...]:
    lower = torch.linalg.cholesky_ex(covariance)[0]
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor = torch.linalg.solve_triangular(lower, eye, upper=False).T
    y, centres = x @ factor, means @ factor
    logits = y @ centres.T + (weights.log() - 0.5 * (centres * centres).sum(dim=1))
    bound = (torch.logsumexp(logits, dim=1) - 0.5 * (y * y).sum(dim=1)).mean()
    r = torch.softmax(logits, dim=1)
    counts = r.sum(dim=0)
    weights, means = counts / x.shape[0], r.T @ x / counts[:, None]
    covariance = x.T @ x / x.shape[0] - (weights[:, None] * means).T @ means + REGULARIZATION * eye
    return weights, means, covariance, bound


def plain_full(x: Any, weights: Any, means: Any, covariances: Any) -> tuple[Any, ...]:
    """A step of full covariances, all components in one batched product of as many rows as memory holds."""
    (n, d), k = x.shape, means.shape[0]
    lower = torch.linalg.cholesky_ex(covariances)[0]
    eye = torch.eye(d, dtype=x.dtype, device=x.device).expand(k, d, d)
    factors = torch.linalg.solve_triangular(lower, eye, upper=False).mT
    constants = weights.log() + factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    offsets = means[:, None, :] @ factors
    counts, sums, products, bound = 0, 0, 0, 0
    for rows in torch.split(x, max(1, PLAIN_ELEMENTS // (k * d))):
        whitened = rows @ factors - offsets
        logits = constants - 0.5 * (whitened * whitened).sum(dim=2).T
        bound = bound + torch.logsumexp(logits, dim=1).sum() / n
        r = torch.softmax(logits, dim=1)
        counts = counts + r.sum(dim=0)
        sums = sums + r.T @ rows
        products = products + (r.T[:, :, None] * rows).mT @ rows
    means = sums / counts[:, None]
    covariances = products / counts[:, None, None] - means[:, :, None] * means[:, None, :] + REGULARIZATION * eye
    return counts / n, means, covariances, bound


def scikit_learn(blobs: Blobs, covariance_type: str) -> Callable[[int], Any]:
    """scikit-learn's estimator with its array API support."""
    from sklearn import config_context
    from sklearn.mixture import GaussianMixture

    start = blobs.start(covariance_type)
    begun = dict(weights_init=start.weights, means_init=start.means, precisions_init=start.covariances)
    begun = {name: value.float() for name, value in begun.items()}

    def run(n: int) -> None:
        with config_context(array_api_dispatch=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = dict(covariance_type=covariance_type, tol=0.0, max_iter=n, init_params="random_from_data")
            GaussianMixture(len(blobs.means), **settings, **begun).fit(blobs.x)

    return run


def torchgmm(blobs: Blobs, covariance_type: str) -> Callable[[int], Any]:
    """The estimator of torchgmm; a fit that stops early is an error, as its iterations could not be counted."""
    import logging

    from torchgmm.bayes import GaussianMixture

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    means = blobs.means.float()

    def run(n: int) -> None:
        options = dict(max_epochs=n, enable_progress_bar=False, logger=False, accelerator="gpu", devices=1)
        settings = dict(covariance_type=covariance_type, init_means=means, convergence_tolerance=0.0)
        fitted = GaussianMixture(len(means), **settings, trainer_params=options).fit(blobs.x)
        if fitted.num_iter_ != n:
            raise RuntimeError(f"stopped after {fitted.num_iter_} of {n} iterations")

    return run


def tables(snapshot: dict[str, Any]) -> str:
    """A snapshot as Markdown tables."""
    machine, checked = snapshot["machine"], snapshot.get("correctness", [])
    names = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    parts = [
        f"{machine['device']}, driver {machine['driver']}, CUDA {machine['cuda']}, Python {machine['python']}, "
        f"{names}; {machine['date']}, commit {machine['commit'][:12]}{' with changes' if machine['changed'] else ''}.",
        f"{sum(row['right'] for row in checked)} of {len(checked)} paths agree with float64 on the CPU."
        + "".join(f"\n- WRONG: {row['path']} {row.get('failed', '')}" for row in checked if not row["right"]),
        table(
            ["EM iteration", "type", "ms", "target ms", "predicted ms", "limit", "share", "memory MB", "predicted MB"],
            [
                [row["shape"], row["type"], row["ms"], row["target_ms"], *(row.get(key) for key in PREDICTED)]
                for row in snapshot.get("iterations", [])
            ],
        ),
        table(
            ["kernel", "shape", "ms", "GFLOP", "MB", "floor ms", "share"],
            [
                [row[key] for key in ("kernel", "shape", "ms", "gflop", "mb")] + [row.get("floor_ms"), row.get("share")]
                for row in snapshot.get("kernels", [])
            ],
        ),
    ]
    of_kernels = sorted(snapshot.get("split", []), key=lambda row: (row["shape"], row["type"], -row["ms"]))
    parts.append(
        table(
            ["kernels of an iteration", "type", "kernel", "launches", "ms"],
            [
                [row[key] for key in ("shape", "type", "kernel", "launches", "ms")]
                for row in of_kernels
                if row["ms"] > 1e-3
            ],
        )
    )
    host = ("ms", "copies_ms", "passing_ms", "there_ms", "share", "memory_mb")
    parts.append(
        table(
            [
                "rows of host memory",
                "type",
                "ms",
                "copies ms",
                "blocks alone ms",
                "rows there ms",
                "share",
                "memory MB",
            ],
            [[row["shape"], row["type"], *(row[key] for key in host)] for row in snapshot.get("host", [])],
        )
    )
    cells = snapshot.get("peers", [])
    others = list(dict.fromkeys(name for cell in cells for name in cell if name not in ("shape", "type", "gaussmix")))
    rows = [[cell["shape"], cell["type"], *(cell.get(name) for name in ("gaussmix", *others))] for cell in cells]
    parts.append(table(["ms of an iteration", "type", "gaussmix", *others], rows))
    skipped = [f"- {row['what']}: {row['why']}" for row in snapshot.get("skipped", [])]
    if skipped:
        parts.append("Not measured:\n\n" + "\n".join(skipped))
    return "\n\n".join(parts)


PREDICTED = ("predicted_ms", "limit", "share", "memory_mb", "predicted_memory_mb")


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; a column called share is in per cent."""

    def text(name: str, value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, (float, int)):
            return f"{value:.0%}" if name == "share" else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
        return str(value)

    lines: Iterator[list[str]] = ([text(name, value) for name, value in zip(head, row, strict=True)] for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


if __name__ == "__main__":
    sys.exit(main())
