"""Partial sums of slabs added up in float64, in a fixed order. Bytes: those of the partial sums."""

import torch
import triton
import triton.language as tl

from gaussmix_kernels._launch import launch

BLOCK = 256


@triton.jit(do_not_specialize=["n_parts", "size"], do_not_specialize_on_alignment=["stop"])
def _add_up_kernel(stop, parts, total, n_parts, size, ADD: tl.constexpr, BLOCK: tl.constexpr):
    if tl.load(stop) != 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < size
    if ADD:
        result = tl.load(total + at, mask=real, other=0)
    else:
        result = tl.zeros([BLOCK], tl.float64)
    part = parts + at
    for _ in range(0, n_parts):
        result += tl.load(part, mask=real, other=0).to(tl.float64)
        part += size
    tl.store(total + at, result, mask=real)


def add_up(parts: torch.Tensor, stop: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of `parts` over their first axis, in float64; added to `total`, in place, where there is one."""
    add = total is not None
    if total is None:
        total = torch.empty(parts.shape[1:], dtype=torch.float64, device=parts.device)
    size = total.numel()
    launch(_add_up_kernel, (-(-size // BLOCK),), stop, parts, total, parts.shape[0], size, ADD=add, BLOCK=BLOCK)
    return total
