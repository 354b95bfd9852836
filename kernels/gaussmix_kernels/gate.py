"""The compile gate: every configuration of every kernel, compiled for every architecture, on a machine without a GPU.

Launchers run on tensors without storage, and `launch` compiles instead of launching: what is checked is what would run.
"""

import itertools
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gaussmix_kernels import _em, _kmeans, _launch, _prepass, _sizes
from gaussmix_kernels._features import Operands
from gaussmix_kernels._instructions import count, printed_by
from gaussmix_kernels._parameters import Natural, Parameters, Settings, decide, fill_operands, room_for_operands

TYPES = ("full", "tied", "diag", "spherical")
FEATURES = (1, 2, 3, 8, 16, 17, 32, 64, 100, 128, 256)
COMPONENTS = (1, 3, 16, 64, 1024)
ROWS = 5000

# Bytes of shared memory that a program may have, by architecture.
SHARED = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
# Bytes of stack above which registers have spilled, and the share of the instructions within loops that may then access
# it. A processor issues four instructions a clock and its cache serves one of them: below a quarter, spilling costs the
# instructions that it takes, which the floors count.
STACK = 128
SPILLED = 1 / 6
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


class Offline:
    """A driver for compiling alone: it names the architecture, and has no device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        """The architecture."""
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        """A device for each architecture: Triton keeps compiled kernels by device."""
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        """None is needed."""
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


def _room(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _start(case: Case, n: int) -> tuple[_em.EM, Parameters, Natural, Operands, Settings]:
    """EM of n rows without storage, and what its iterations begin with."""
    d, k = case.d, case.k
    halves = _room(n, _sizes.Features(case.kind, d).ld, dtype=torch.float64 if case.exact else torch.float16)
    squares = _room(n, dtype=torch.float64 if case.exact else torch.float32)
    data = _prepass.Data(halves, halves, squares, _room(d), _room(d), None, float(n), 1.0)
    em = _em.EM(data, case.type, case.kind)
    shape = em.type.shape(k, d)
    parameters = Parameters(_room(k), _room(k, d), _room(*shape), _room(*shape))
    natural = Natural.of(k, data, case.kind)
    return em, parameters, natural, room_for_operands(natural, data), Settings.of(data)


def launch_all(case: Case) -> None:
    """Launch each kernel of a case on tensors without storage."""
    x = _room(ROWS, case.d, dtype=torch.float64 if case.exact else torch.float32)
    _prepass.measure(x, None)
    _prepass.convert(x, _room(case.d), _room(case.d), exact=case.exact)
    em, parameters, natural, operands, settings = _start(case, ROWS)
    statistics, evidence = em.step.expect(operands)
    em.step.normalize(operands)
    em.step.labels(operands)
    em.step.responsibilities(operands)
    em.assign(_room(ROWS, dtype=torch.int32), parameters.means)
    em.type.maximize(statistics, parameters, parameters, natural, em.data, settings, em.step.never)
    stop, bounds = _room(2, dtype=torch.int32), _room(2)
    decide(stop, bounds, settings, evidence, natural.shared, parameters, parameters, natural, 0)
    fill_operands(operands, natural, _room(1), case.exact, em.step.never)
    if case.kind == "none":
        _kmeans.nearest(em.data, parameters.means)


def launch_iteration(case: Case, n: int) -> None:
    """Launch the kernels of one iteration on n rows without storage."""
    em, parameters, natural, operands, settings = _start(case, n)
    em.iterate(parameters, parameters, natural, operands, settings, _room(2, dtype=torch.int32), _room(2), 0)


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
        code = count(compiled.asm["cubin"])
        if not excuse and code.spilled > SPILLED * sum(code.counts[1:]):
            violations.append(f"stack of {stack} bytes, which {code.spilled} instructions in loops access")
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
    printed = printed_by("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])


def compile_cases(architecture: int, some: list[Case]) -> list[Report]:
    """Reports on the distinct kernels of these cases."""
    driver.set_active(Offline(architecture))
    reports: dict[int, Report] = {}
    kept = []

    def seen(kernel: Any, _: Any, arguments: dict[str, Any], options: dict[str, Any], compiled: Any) -> None:
        if id(compiled) not in reports:
            kept.append(compiled)
            constants = {name: value for name, value in arguments.items() if name.isupper()}
            reports[id(compiled)] = check(kernel.__name__, architecture, options | constants, compiled)

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
