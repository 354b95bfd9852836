"""The data as the other kernels read it: shifted, scaled, split and padded, once for a data set.

    x' = (x - shift) scale,    scale a power of two for each feature, |x'| <= 128

Default tier: x' as the sum of two float16 numbers, 22 bits in all, which tensor cores multiply exactly. Exact tier: x'
in float64. Rows are padded with zeros to a multiple of 16 features.

Passes: two reads of X (the shift has to be known before anything is subtracted). Bytes: 2 x that of X, and 4 (8 in the
exact tier) n d written.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl

from gaussmix_kernels._launch import launch
from gaussmix_kernels._sizes import SCATTER_ROWS, multiple, padded, slab_rows

MOST_SCALED = 128.0
# Responsibilities are kept as two float16 numbers, times this: one of 1e-11 is not yet zero.
R_SCALE = 16384.0
BLOCK_N = 32


@dataclass(frozen=True)
class Data:
    """n rows of d features, ready for the kernels."""

    hi: torch.Tensor  # (n, ld), float16 or float64
    lo: torch.Tensor  # (n, ld): what `hi` leaves of x'; `hi` itself in the exact tier
    squares: torch.Tensor  # (n,): |x - shift|^2, float32 or float64
    shift: torch.Tensor  # (d,), float64
    scale: torch.Tensor  # (d,), float64, powers of two
    weight: torch.Tensor | None  # (n,), float32 or float64, at most 1
    total: float  # sum of the weights
    gain: float  # what `weight` was divided by

    @property
    def exact(self) -> bool:
        """Whether sums are in float64."""
        return self.hi.dtype == torch.float64

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of sums."""
        return torch.float64 if self.exact else torch.float32

    @property
    def unit(self) -> float:
        """What sums of weighted features are to be multiplied with."""
        return self.gain / (1.0 if self.exact else R_SCALE)

    @property
    def shape(self) -> tuple[int, int]:
        return self.hi.shape[0], self.shift.shape[0]

    def rows(self, rows: slice) -> torch.Tensor:
        """X' of some rows, in float64: (b, d)."""
        x = self.hi[rows, : self.shape[1]].to(torch.float64)
        return x if self.exact else x + self.lo[rows, : self.shape[1]]

    @cached_property
    def scatter(self) -> torch.Tensor:
        """Weighted sum of (x - shift)(x - shift)^T: (d, d), float64."""
        n, d = self.shape
        total = torch.zeros((d, d), dtype=torch.float64, device=self.hi.device)
        for start in range(0, n, SCATTER_ROWS):
            rows = slice(start, start + SCATTER_ROWS)
            x = self.rows(rows)
            total += (x if self.weight is None else x * self.weight[rows, None]).T @ x
        return total / (self.scale[:, None] * self.scale)


@triton.jit(do_not_specialize=["n", "d", "slab"])
def _measure_kernel(
    x,
    weight,
    parts,
    n,
    d,
    slab,
    row_stride,
    column_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = columns < d
    at = columns.to(tl.int64) * column_stride
    # Sums about the first row keep their digits where the data lies far from zero.
    origin = tl.load(x + at, mask=real, other=0).to(tl.float64)
    total = tl.zeros([BLOCK_D], tl.float64)
    low = tl.full([BLOCK_D], float("inf"), tl.float64)
    high = tl.full([BLOCK_D], float("-inf"), tl.float64)
    first = tl.program_id(0).to(tl.int64) * slab
    last = tl.minimum(first + slab, n)
    for block in range(0, tl.cdiv(last - first, BLOCK_N)):
        rows = first + block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (rows < last)[:, None] & real[None, :]
        value = tl.load(x + rows[:, None] * row_stride + at[None, :], mask=mask, other=0).to(tl.float64)
        offset = tl.where(mask, value - origin[None, :], 0)
        weighted = offset
        if weight is not None:
            weighted *= tl.load(weight + rows, mask=rows < last, other=0).to(tl.float64)[:, None]
        total += tl.sum(weighted, axis=0)
        low = tl.minimum(low, tl.min(tl.where(mask, offset, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(mask, offset, float("-inf")), axis=0))
    out = parts + tl.program_id(0) * d + columns
    size = tl.num_programs(0) * d
    tl.store(out, total, mask=real)
    tl.store(out + size, low, mask=real)
    tl.store(out + 2 * size, high, mask=real)


@triton.jit(do_not_specialize=["n", "d"])
def _convert_kernel(
    x,
    shift,
    scale,
    hi,
    lo,
    squares,
    n,
    d,
    ld,
    row_stride,
    column_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = rows < n
    square = tl.zeros([BLOCK_N], tl.float64)
    for start in range(0, ld, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        mask = valid[:, None] & (columns < d)[None, :]
        at = rows[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
        value = tl.load(x + at, mask=mask, other=0).to(tl.float64)
        origin = tl.load(shift + columns, mask=columns < d, other=0)
        offset = tl.where(mask, value - origin[None, :], 0)
        square += tl.sum(offset * offset, axis=1)
        scaled = offset * tl.load(scale + columns, mask=columns < d, other=0)[None, :]
        out = rows[:, None] * ld + columns[None, :]
        inside = valid[:, None] & (columns < ld)[None, :]
        if EXACT:
            tl.store(hi + out, scaled, mask=inside)
        else:
            high = scaled.to(tl.float32).to(tl.float16)
            tl.store(hi + out, high, mask=inside)
            tl.store(lo + out, (scaled - high.to(tl.float64)).to(tl.float32).to(tl.float16), mask=inside)
    tl.store(squares + rows, square.to(squares.dtype.element_ty), mask=valid)


def prepare(
    x: torch.Tensor, weight: torch.Tensor | None = None, shift: torch.Tensor | None = None, *, exact: bool
) -> Data:
    """The data of x (n, d), any real dtype and strides, for the default or the exact tier.

    `shift` (d,), float64, is the mean of the rows unless given.

    Raises ValueError where x holds NaN or infinity.
    """
    gain = 1.0 if weight is None else float(weight.max())
    weight = None if weight is None else (weight / gain).to(torch.float64 if exact else torch.float32)
    total = float(x.shape[0] if weight is None else weight.sum(dtype=torch.float64))

    parts = measure(x, weight)
    mean = parts[0].sum(dim=0) / total
    first = x[0].to(torch.float64)
    shift = first + mean if shift is None else shift
    middle = shift - first
    largest = torch.maximum(parts[2].amax(dim=0) - middle, middle - parts[1].amin(dim=0))
    # Least and largest values pass over NaN; sums do not.
    if not bool(torch.isfinite(largest * largest + mean).all()):
        raise ValueError("the data contains NaN, infinity or values whose squares are beyond float64; remove them")
    scale = torch.where(largest > 0, 2 ** torch.floor(torch.log2(MOST_SCALED / largest)), 1.0)
    return Data(*convert(x, shift, scale, exact=exact), shift, scale, weight, total, gain)


def measure(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Weighted sums, minima and maxima of slabs of x, about its first row: (3, slabs, d)."""
    (n, d), block = x.shape, min(64, padded(x.shape[1]))
    slab = slab_rows(n, BLOCK_N)
    n_slabs = -(-n // slab)
    parts = torch.empty((3, n_slabs, d), dtype=torch.float64, device=x.device)
    launch(
        _measure_kernel,
        (n_slabs, -(-d // block)),
        *(x, weight, parts, n, d, slab, *x.stride()),
        BLOCK_N=BLOCK_N,
        BLOCK_D=block,
    )
    return parts


def convert(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *, exact: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The halves of x', and |x - shift|^2."""
    (n, d), device = x.shape, x.device
    ld = multiple(d, 16)
    hi = torch.empty((n, ld), dtype=torch.float64 if exact else torch.float16, device=device)
    lo = hi if exact else torch.empty_like(hi)
    squares = torch.empty(n, dtype=torch.float64 if exact else torch.float32, device=device)
    launch(
        _convert_kernel,
        (-(-n // BLOCK_N),),
        *(x, shift, scale, hi, lo, squares, n, d, ld, *x.stride()),
        BLOCK_N=BLOCK_N,
        BLOCK_D=min(64, padded(d)),
        EXACT=exact,
    )
    return hi, lo, squares
