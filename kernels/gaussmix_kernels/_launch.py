"""Where kernels run: the launch itself, and the sizes that follow from a shape."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


# What the compile gate shows compiled kernels to; None while kernels run.
Seen = Callable[[Any, dict[str, Any], Any], None]
_seen: Seen | None = None


@contextmanager
def compiling(seen: Seen) -> Iterator[None]:
    """Within it, launches compile and run nothing; `seen` gets each kernel, its settings, and what it compiled to."""
    global _seen
    _seen = seen
    try:
        yield
    finally:
        _seen = None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **meta: Any
) -> None:
    """Run a kernel on the device of its first tensor."""
    options = {} if INTERPRETED else dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
    if _seen is not None:
        _seen(kernel, options | meta, kernel.warmup(*args, grid=grid, **options, **meta))
        return
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    if tensor.device.type != "cuda":
        kernel[grid](*args, **options, **meta)
        return
    with torch.cuda.device(tensor.device):
        kernel[grid](*args, **options, **meta)


def padded(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size` and `least`."""
    return max(least, 1 << (size - 1).bit_length())


def multiple(size: int, of: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // of) * of


def slab_rows(n: int, block: int, programs: int = PROGRAMS) -> int:
    """Rows of a slab: fixed by the shape of the data alone, so that the same data gives the same bits."""
    return multiple(min(max(n // programs, 256), MOST_SLAB_ROWS), block)
