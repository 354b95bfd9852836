"""Where kernels run."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# What gets compiled kernels where none run: a kernel, its grid, its arguments by name, the compiler's options, and what
# it compiled to.
Seen = Callable[[Any, tuple[int, ...], dict[str, Any], dict[str, Any], Any], None]
_seen: Seen | None = None


@contextmanager
def compiling(seen: Seen) -> Iterator[None]:
    """Within it, launches compile and run nothing; `seen` is called with each."""
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
        compiled = kernel.warmup(*args, grid=grid, **options, **meta)
        _seen(kernel, grid, dict(zip(kernel.arg_names, args, strict=False)) | meta, options, compiled)
        return
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    if tensor.device.type != "cuda":
        kernel[grid](*args, **options, **meta)
        return
    with torch.cuda.device(tensor.device):
        kernel[grid](*args, **options, **meta)
