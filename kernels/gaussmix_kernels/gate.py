"""The compile gate: every configuration of every kernel, compiled for every architecture, on a machine without a GPU.

Launchers run on tensors without storage, and `launch` compiles instead of launching: what is checked is what would run.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gaussmix_kernels import _em, _kmeans, _launch, _prepass, _sizes
from gaussmix_kernels._parameters import Natural, Parameters, Settings, decide, fill_operands, room_for_operands

TYPES = ("full", "tied", "diag", "spherical")
FEATURES = (1, 2, 3, 8, 16, 17, 32, 64, 100, 128, 256)
COMPONENTS = (1, 3, 16, 64, 1024)
ROWS = 5000

# Bytes of shared memory that a program may have, by architecture.
SHARED = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
STACK = 128
# The tensor-core instruction that a product of float16 or float64 tiles is to become; small tiles take the warp's.
INSTRUCTIONS = {
    (80, False): ("mma.sync",),
    (90, False): ("wgmma.mma_async", "mma.sync"),
    (100, False): ("tcgen05.mma", "mma.sync"),
    (120, False): ("mma.sync",),
    (80, True): ("mma.sync",),
    (90, True): ("mma.sync",),
    (100, True): ("mma.sync",),
    (120, True): ("fma.rn.f64",),  # has no tensor cores for float64
}
# Stacks that are let pass, and why.
EXCUSES = (
    ("float64 has no tensor cores there: products are unrolled", lambda a, exact, meta: a == 120 and exact),
    ("tiles of 256 features", lambda a, exact, meta: meta.get("D") == 256),
)
# A product that is added to what its loop carries on. sm_100 has its sums in a memory of their own, which is not seen.
CARRIED = re.compile(r"(tt\.dot|ttng\.warp_group_dot) %\S+, %\S+, %arg\d+")
PRODUCTS = ("_accumulate_kernel", "_normalize_kernel", "_responsibilities_kernel", "_logits_kernel", "_scatter_kernel")


class _Offline:
    """A driver for compiling alone: it names the architecture, and has no device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Case:
    """The kernels of one covariance type and kind of features for one shape and tier."""

    type: str
    kind: str
    exact: bool
    d: int
    k: int


@dataclass(frozen=True)
class Report:
    """One compiled kernel."""

    kernel: str
    architecture: int
    exact: bool
    settings: str
    registers: int
    stack: int
    shared: int
    violations: tuple[str, ...]
    excuse: str


def cases() -> Iterator[Case]:
    """Every type, kind, tier and shape."""
    for name, exact, d, k in itertools.product(TYPES, (False, True), FEATURES, COMPONENTS):
        for kind in _sizes.kinds(_em.type_of(name).QUADRATIC, d):
            yield Case(name, kind, exact, d, k)


def launch_all(case: Case) -> None:
    """Launch each kernel of a case on tensors without storage."""
    (d, k), n = (case.d, case.k), ROWS
    real = torch.float64 if case.exact else torch.float32

    def room(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = room(n, d, dtype=real)
    _prepass.measure(x, None)
    converted = _prepass.convert(x, room(d), room(d), exact=case.exact)
    data = _prepass.Data(*converted, room(d), room(d), None, float(n), 1.0)
    em = _em.EM(data, case.type, case.kind)
    shape = em.type.shape(k, d)
    parameters = Parameters(room(k), room(k, d), room(*shape), room(*shape))
    natural = Natural.of(k, data, case.kind)
    operands = room_for_operands(natural, data)
    settings = Settings.of(data)
    fill_operands(operands, natural, room(1), case.exact, em.step.never)
    statistics, evidence = em.step.expect(operands)
    em.step.normalize(operands)
    em.step.labels(operands)
    em.step.responsibilities(operands)
    labels = room(n, dtype=torch.int32)
    em.assign(labels, room(k, d))
    em.type.maximize(statistics, parameters, parameters, natural, data, settings, em.step.never)
    stop, bounds = room(2, dtype=torch.int32), room(2)
    decide(stop, bounds, settings, evidence, natural.shared, parameters, parameters, natural, 0)
    if case.kind == "none":
        _kmeans.nearest(data, room(k, d))


def check(name: str, architecture: int, meta: dict[str, Any], compiled: Any) -> Report:
    """What the compiler made of a kernel, and what is wrong with it."""
    exact = bool(meta.get("EXACT", False))
    ptx = compiled.asm["ptx"]
    registers, stack = resources(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    violations: list[str] = []
    excuse = ""
    if stack > STACK:
        excuse = next((reason for reason, holds in EXCUSES if holds(architecture, exact, meta)), "")
        violations += [] if excuse else [f"stack of {stack} bytes"]
    if shared > SHARED[architecture]:
        violations.append(f"{shared} bytes of shared memory")
    if name in PRODUCTS and "D" in meta and not any(i in ptx for i in INSTRUCTIONS[architecture, exact]):
        violations.append(f"none of {INSTRUCTIONS[architecture, exact]}")
    if not exact and CARRIED.search(compiled.asm["ttgir"]):
        violations.append("a sum that stays in the tensor cores, which cut it off")
    if not exact and ".tf32" in ptx:
        violations.append("TF32")
    if re.search(r"\b(red|atom)\.[\w.]*\.f(16|32|64)", ptx):
        violations.append("an atomic addition")
    settings = " ".join(f"{key}={value}" for key, value in meta.items() if key not in ("enable_fp_fusion", "EXACT"))
    return Report(name, architecture, exact, settings, registers, stack, shared, tuple(violations), excuse)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])


def compile_cases(architecture: int, some: list[Case]) -> list[Report]:
    """Reports on the distinct kernels of these cases."""
    driver.set_active(_Offline(architecture))
    reports: dict[int, Report] = {}
    kept = []

    def seen(kernel: Any, meta: dict[str, Any], compiled: Any) -> None:
        if id(compiled) not in reports:
            kept.append(compiled)
            reports[id(compiled)] = check(kernel.__name__, architecture, meta, compiled)

    with _launch.compiling(seen):
        for case in some:
            launch_all(case)
    return list(reports.values())


def main() -> int:
    """Compile everything, print the table, and return the number of violations."""
    architectures = [int(argument) for argument in sys.argv[1:]] or list(SHARED)
    groups: dict[tuple[str, str, bool], list[Case]] = {}
    for case in cases():
        groups.setdefault((case.type, case.kind, case.exact), []).append(case)
    jobs = [(architecture, group) for architecture in architectures for group in groups.values()]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(compile_cases, *zip(*jobs, strict=True)))
    reports = dict.fromkeys(report for group in found for report in group)
    bad = 0
    for report in reports:
        bad += bool(report.violations)
        print(
            f"sm_{report.architecture:<4}{report.kernel:26}{'exact' if report.exact else 'default':8}"
            f"{report.registers:4} registers {report.stack:6} stack {report.shared:7} shared  {report.settings}"
            f"{'  VIOLATION: ' + ', '.join(report.violations) if report.violations else ''}"
            f"{'  excused: ' + report.excuse if report.excuse else ''}"
        )
    print(f"triton {triton.__version__}: {len(reports)} kernels, {bad} violations")
    return bad


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
