"""Where kernels run: the launch itself, the architecture it is for, and the sizes of tiles."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Rows whose statistics are added on the chip in float32: tensor cores truncate, which biases longer sums.
MOST_SLAB_ROWS = 4096
# Programs that fill a large GPU once: four for each of 132 processors.
PROGRAMS = 528
# Bytes of logits that stay in the L2 cache between the kernels of full covariances.
CHUNK_BYTES = 24 * 2**20
# Sums that a program of the fused step keeps in registers.
FUSED_SUMS = 8192


@dataclass
class _Gate:
    """While the compile gate is at work: the architecture that launches compile for, and what sees the results."""

    architecture: int | None = None
    seen: Callable[[Any, dict[str, Any], Any], None] = lambda kernel, meta, compiled: None


_gate = _Gate()


@contextmanager
def compiling_for(architecture: int, seen: Callable[[Any, dict[str, Any], Any], None]) -> Iterator[None]:
    """Within it, launches compile for this architecture (80 is sm_80) and run nothing; `seen` gets the results."""
    _gate.architecture, _gate.seen = architecture, seen
    try:
        yield
    finally:
        _gate.architecture = None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **meta: Any
) -> None:
    """Run a kernel on the device of its first tensor."""
    options = {} if INTERPRETED else dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
    if _gate.architecture is not None:
        _gate.seen(kernel, options | meta, kernel.warmup(*args, grid=grid, **options, **meta))
        return
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    if tensor.device.type != "cuda":
        kernel[grid](*args, **options, **meta)
        return
    with torch.cuda.device(tensor.device):
        kernel[grid](*args, **options, **meta)


def architecture(tensor: torch.Tensor) -> int:
    """Compute capability of the tensor's device as a number; that of an H100 for the interpreter."""
    if _gate.architecture is not None:
        return _gate.architecture
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def padded(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size` and `least`."""
    return max(least, 1 << (size - 1).bit_length())


def multiple(size: int, of: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // of) * of


def slab_rows(n: int, block: int, programs: int = PROGRAMS) -> int:
    """Rows of a slab: fixed by the shape of the data alone, so that the same data gives the same bits."""
    return multiple(min(max(n // programs, 256), MOST_SLAB_ROWS), block)
