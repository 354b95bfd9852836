"""What the compiled kernels take at least, on GPUs that are not here: the issue floor.

Every warp instruction takes a scheduler one clock. Instructions of a program are counted in what the disassembler
prints, those of a loop as often as it runs; times the programs of a launch, over the schedulers of the GPU, they are a
time that no memory and no tensor core can make shorter. Beside it stand the times of the bytes and of the products at
the data sheet's rates. Nothing here was measured.

    python benchmarks/floor.py                       every cell, as tables
    python benchmarks/floor.py --only "[1M, 64, 64] full"
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

MISSING = [name for name in ("torch", "triton") if not find_spec(name)]
if not MISSING:
    import torch
    import triton
    from triton.runtime import driver

    import gaussmix
    from gaussmix_kernels import _em, _launch, _sizes, gate
    from gaussmix_kernels._instructions import Code, count

CELLS = {
    "[10k, 8, 4]": (10_000, 8, 4),
    "[1M, 64, 64]": (1_000_000, 64, 64),
    "[10M, 32, 64]": (10_000_000, 32, 64),
    "[1M, 128, 1024]": (1_000_000, 128, 1024),
}
TYPES = ("spherical", "tied", "diag", "full")
# Kernels without products run for microseconds, or, like the sums, wait for memory: they have no issue floor here. The
# factor of one matrix does: d steps that wait for each other, in one program.
COUNTED = set() if MISSING else {*gate.PRODUCTS, "_factor_kernel"}
SCHEDULERS = 4


@dataclass(frozen=True)
class GPU:
    """Figures of a data sheet."""

    architecture: int
    processors: int
    clock: float  # Hz, the highest
    bandwidth: float  # bytes of device memory a second
    tensor: float  # operations a second, float16 with float32 sums, without sparsity


# NVIDIA's data sheets and architecture papers of the SXM boards: A100 80 GB, H100 80 GB, H200, B200 of an HGX.
GPUS = {
    "A100": GPU(80, 108, 1.41e9, 2.04e12, 312e12),
    "H100": GPU(90, 132, 1.98e9, 3.35e12, 989e12),
    "H200": GPU(90, 132, 1.98e9, 4.8e12, 989e12),
    "B200": GPU(100, 148, 1.965e9, 7.7e12, 2250e12),
}


@dataclass(frozen=True)
class Launch:
    """A launch of an iteration."""

    kernel: str
    programs: int
    warps: int
    code: Code
    trips: tuple[int, int]  # of the outer loop, and of those within
    bytes: int
    flops: int
    registers: int
    shared: int

    @property
    def instructions(self) -> int:
        """Warp instructions of a program."""
        total, often = 0, 1
        for level, instructions in enumerate(self.code.counts):
            if level:
                often *= self.trips[level - 1]
            total += instructions * often
        return total * self.warps

    def issue(self, gpu: GPU) -> float:
        """Seconds to issue the instructions of all programs; a processor runs one program at least."""
        if self.kernel not in COUNTED:
            return 0.0
        programs = max(self.programs / gpu.processors, 1.0)
        return programs * self.instructions / SCHEDULERS / gpu.clock

    @property
    def resident(self) -> int:
        """Programs that an H100 or H200 has room for on a processor: registers, shared memory, warps."""
        registers = 65536 // (32 * self.warps * (self.registers + -self.registers % 8))
        return min(registers, 228 * 1024 // (self.shared + 1024), 64 // self.warps, 32)

    def floor(self, gpu: GPU) -> float:
        """Seconds: the longest of what instructions, bytes and products take."""
        return max(self.issue(gpu), self.bytes / gpu.bandwidth, self.flops / gpu.tensor)


def trips(kernel: str, arguments: dict[str, Any]) -> tuple[int, int]:
    """How often a program runs through its loops: the outer one, and those within it."""
    a = arguments
    if kernel == "_factor_kernel":
        return a["D"] // a["BLOCK"], a["BLOCK"]
    if kernel in ("_accumulate_kernel", "_scatter_kernel"):
        outer = ceil(a["slab"] / a["BLOCK_N"])
    elif kernel == "_normalize_kernel":
        outer = ceil(a["k"] / a["BLOCK_K"])
    elif kernel == "_logits_kernel":
        outer = min(a["BLOCKS"], ceil(a["n"] / a["BLOCK_N"]))
    else:
        outer = 1
    # Features come in blocks, x' and the second ones: as many blocks of either, or x' is one and no loop.
    return outer, max(a["D"], a.get("Q", 0)) // a["BLOCK_D"] if "D" in a and "BLOCK_D" in a else 1


def moved(arguments: dict[str, Any], n: int) -> int:
    """Bytes of the tensors of a launch: of those of all rows its own; logits stay in the cache."""
    found: dict[int, int] = {}
    for name, value in arguments.items():
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, torch.Tensor) and name != "logits":
                rows = arguments.get("n", n) if tensor.shape[:1] == (n,) else None
                found[id(tensor)] = tensor.nbytes if rows is None else tensor.nbytes // n * rows
    return sum(found.values())


def products(kernel: str, arguments: dict[str, Any]) -> int:
    """Operations of the tensor cores, the padding of tiles included: three products of halves for one."""
    a, one = arguments, 2 * 3
    if kernel not in gate.PRODUCTS or "D" not in a:
        return 0
    if kernel in ("_logits_kernel", "_scatter_kernel"):
        blocks = a["D"] // a["BLOCK_D"]
        together = a["BLOCK_K"] if kernel == "_scatter_kernel" else 1
        k = _sizes.multiple(a["k"], together) * together
        return one * a["n"] * k * a["D"] * a["BLOCK_D"] * (blocks + 1) // 2
    features = a["D"] + (a["Q"] if a["KIND"] in ("squares", "products") else 0)
    often = 2 if kernel == "_accumulate_kernel" else 1
    return often * one * a["n"] * _sizes.multiple(a["k"], a["BLOCK_K"]) * features


def iteration(covariance_type: str, n: int, d: int, k: int, architecture: int) -> list[Launch]:
    """The launches of one iteration of the default tier."""
    driver.set_active(gate.Offline(architecture))
    kind = _sizes.kinds(_em.type_of(covariance_type).QUADRATIC, d)[0]
    codes: dict[int, Code] = {}
    launches: list[Launch] = []

    def seen(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any], made: Any) -> None:
        name, cubin = kernel.__name__, made.asm["cubin"]
        registers, _ = gate.resources(cubin)
        launches.append(
            Launch(
                name,
                int(torch.Size(grid).numel()),
                options["num_warps"],
                codes.get(id(made)) or codes.setdefault(id(made), count(cubin)),
                trips(name, arguments),
                moved(arguments, n),
                products(name, arguments),
                registers,
                int(made.metadata.shared),
            )
        )

    with _launch.compiling(seen):
        gate.launch_iteration(gate.Case(covariance_type, kind, False, d, k), n)
    return launches


def sums(cell: str, covariance_type: str, shape: tuple[int, int, int], gpus: Iterable[str] = GPUS) -> str:
    """A row of the table of iterations: the issue floor, and what no launch can be faster than, on these GPUs."""
    found = {GPUS[gpu].architecture for gpu in gpus}
    launches = {number: iteration(covariance_type, *shape, number) for number in sorted(found)}
    times = []
    for gpu in (GPUS[name] for name in gpus):
        ones = launches[gpu.architecture]
        times += [sum(one.issue(gpu) for one in ones), sum(one.floor(gpu) for one in ones)]
    cost = gaussmix.estimate(*shape, covariance_type)
    cells = [cell, covariance_type, *map(milliseconds, times), f"{milliseconds(cost.time)}, {cost.limit}"]
    return f"| {' | '.join(cells)} |"


def kernels(cell: str, covariance_type: str, shape: tuple[int, int, int]) -> Iterator[str]:
    """Rows of the table of kernels, on an H200; what is launched for each chunk is added up."""
    launches, gpu = iteration(covariance_type, *shape, 90), GPUS["H200"]
    for kernel in dict.fromkeys(launch.kernel for launch in launches):
        same = [launch for launch in launches if launch.kernel == kernel]
        one, counted = same[0], kernel in COUNTED
        values = (
            len(same),
            one.programs,
            one.instructions if counted else "",
            sum(one.code.counts[1:]) if counted else "",
            one.code.tensor or "",
            one.code.barriers or "",
            one.code.spilled or "",
            one.registers,
            f"{one.shared / 1024:.0f}",
            one.resident,
            milliseconds(sum(launch.issue(gpu) for launch in same)),
            milliseconds(sum(launch.bytes for launch in same) / gpu.bandwidth),
            milliseconds(sum(launch.flops for launch in same) / gpu.tensor),
        )
        yield f"| {' | '.join(map(str, (cell, covariance_type, kernel[1:].removesuffix('_kernel'), *values)))} |"


def milliseconds(seconds: float) -> str:
    """To three digits; nothing where there is none."""
    return f"{1e3 * seconds:.3g}" if seconds >= 5e-8 else ""


def main() -> None:
    """Print the tables of the cells that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="cells and types whose name has this in it, such as '[1M, 64, 64] full'"
    )
    only = parser.parse_args().only
    if MISSING:
        sys.exit(f"floor.py: {', '.join(MISSING)} can not be imported; install gaussmix[test]")
    asked = [(cell, name, shape) for cell, shape in CELLS.items() for name in TYPES if only in f"{cell} {name}"]
    print(f"Triton {triton.__version__}, float32 data.\n")
    columns = [
        "cell",
        "type",
        *(f"{gpu}: {what}, ms" for gpu in GPUS for what in ("issue", "floor")),
        "`estimate`, H200, ms",
    ]
    print(table(columns, (sums(*each) for each in asked)))
    columns = [
        "cell",
        "type",
        "kernel",
        "launches",
        "programs",
        "instructions of a program",
        "of loops",
        "tensor cores",
    ]
    columns += ["barriers in loops", "stack in loops", "registers", "shared, KiB", "programs a processor"]
    columns += ["issue, ms", "bytes, ms", "products, ms"]
    print(table(columns, (row for each in asked for row in kernels(*each))))


def table(columns: list[str], rows: Iterable[str]) -> str:
    """A Markdown table."""
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows, ""])


if __name__ == "__main__":
    main()
