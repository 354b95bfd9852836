"""EM of full covariances without expanding anything: x - mu_k is formed first.

    logit_k = c_k - |(x' - mu'_k) U'_k|^2 / 2,    S_k = Z^T Z with Z = sqrt(r_k) (x' - mu'_k)

    logits       (k, rows of a chunk). 2 n k d^2 flops, less the zero blocks of the triangle; 3 products for one
    normalize    log-sum-exp over the components of a chunk; 8 bytes a logit, from the L2 cache
    scatter      S_k, first moments and counts of a slab. 2 n k d^2 flops

A chunk of rows is as long as its logits stay in the L2 cache. Sums of slabs are added in float64, in a fixed order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gaussmix_kernels._features import Operands, _add_product, _joined, _product, _split
from gaussmix_kernels._launch import launch
from gaussmix_kernels._prepass import Data
from gaussmix_kernels._sizes import PROGRAMS, centred_tiles, chunk_rows, slab_rows
from gaussmix_kernels._sums import add_up

NORMALIZED_ROWS = 128


@triton.jit
def _rows(hi, lo, rows, valid, columns, ld, EXACT: tl.constexpr):
    """X' of these features, zero beyond the rows and features that there are: rows x features."""
    mask = valid[:, None] & (columns < ld)[None, :]
    at = rows[:, None] * ld + columns[None, :]
    x_hi = tl.load(hi + at, mask=mask, other=0)
    return _joined(x_hi, x_hi if EXACT else tl.load(lo + at, mask=mask, other=0), EXACT)


@triton.jit
def _factor_block(u_hi, u_lo, component, left, right, ld, BLOCK_D: tl.constexpr):
    """A block of U'."""
    rows, columns = left * BLOCK_D + tl.arange(0, BLOCK_D), right * BLOCK_D + tl.arange(0, BLOCK_D)
    at = component * ld * ld + rows[:, None] * ld + columns[None, :]
    mask = (rows < ld)[:, None] & (columns < ld)[None, :]
    return tl.load(u_hi + at, mask=mask, other=0), tl.load(u_lo + at, mask=mask, other=0)


@triton.jit(do_not_specialize=["start", "n", "k"], do_not_specialize_on_alignment=["stop"])
def _logits_kernel(
    stop,
    hi,
    lo,
    centres,
    u_hi,
    u_lo,
    unit,
    constants,
    logits,
    start,
    n,
    k,
    ld,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Log pi_k + log N of a few components and blocks of rows of the chunk, in units of log 2."""
    if tl.load(stop) != 0:
        return
    dtype: tl.constexpr = tl.float64 if EXACT else tl.float32
    first = tl.program_id(1).to(tl.int64) * (BLOCKS * BLOCK_N)
    hi += (start + first) * ld
    lo += (start + first) * ld
    last = tl.minimum(n - first, BLOCKS * BLOCK_N).to(tl.int32)
    # What blocks of rows share is read before: stores keep the compiler from moving loads out of the loop.
    factors: tl.tuple = ()
    centre: tl.tuple = ()
    N_BLOCKS: tl.constexpr = D // BLOCK_D
    for i in tl.static_range(BLOCK_K):
        component = tl.minimum(tl.program_id(0) * BLOCK_K + i, k - 1).to(tl.int64)
        for left in tl.static_range(N_BLOCKS):
            columns = left * BLOCK_D + tl.arange(0, BLOCK_D)
            read = tl.load(centres + component * ld + columns, mask=columns < ld, other=0)
            centre = centre + (read,)  # noqa: RUF005 (Triton has no unpacking)
        if BLOCKS > 1:
            for right in tl.static_range(N_BLOCKS):
                # U is upper triangular: blocks below its diagonal are zero.
                for left in tl.static_range(right + 1):
                    factors = factors + _factor_block(u_hi, u_lo, component, left, right, ld, BLOCK_D)
    for block in range(0, tl.cdiv(last, BLOCK_N)):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = rows < last
        x: tl.tuple = ()
        for left in tl.static_range(N_BLOCKS):
            tile = _rows(hi, lo, rows, valid, left * BLOCK_D + tl.arange(0, BLOCK_D), ld, EXACT)
            x = x + (tile,)  # noqa: RUF005
        for i in tl.static_range(BLOCK_K):
            component = tl.minimum(tl.program_id(0) * BLOCK_K + i, k - 1).to(tl.int64)
            square = tl.zeros([BLOCK_N], dtype)
            for right in tl.static_range(N_BLOCKS):
                whitened = tl.zeros([BLOCK_N, BLOCK_D], dtype)
                for left in tl.static_range(right + 1):
                    z_hi, z_lo = _split(x[left] - centre[i * N_BLOCKS + left][None, :], EXACT)
                    if BLOCKS > 1:
                        a_hi = factors[i * N_BLOCKS * (N_BLOCKS + 1) + right * (right + 1) + 2 * left]
                        a_lo = factors[i * N_BLOCKS * (N_BLOCKS + 1) + right * (right + 1) + 2 * left + 1]
                    else:
                        a_hi, a_lo = _factor_block(u_hi, u_lo, component, left, right, ld, BLOCK_D)
                    if left == 0:
                        whitened = _product(z_hi, z_lo, a_hi, a_lo, EXACT)
                    else:
                        whitened = _add_product(whitened, z_hi, z_lo, a_hi, a_lo, EXACT)
                square += tl.sum(whitened * whitened, axis=1)
            scale = tl.load(unit + component)
            logit = tl.load(constants + component) - square * scale * scale
            # The last component may be there several times, with the same logits.
            tl.store(logits + component * n + first + rows, logit, mask=valid)


@triton.jit(do_not_specialize=["start", "n", "k"], do_not_specialize_on_alignment=["stop"])
def _normalize_kernel(
    stop, logits, weight, normalizer, labels, evidence, start, n, k, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Log-normalisers and log-likelihood of a block of rows of the chunk; or their likeliest components."""
    if tl.load(stop) != 0:
        return
    here = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = here < n
    largest = tl.full([BLOCK_N], -float("inf"), logits.dtype.element_ty)
    total = tl.zeros([BLOCK_N], logits.dtype.element_ty)
    likeliest = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, k, BLOCK_K):
        components = first + tl.arange(0, BLOCK_K)
        mask = (components < k)[:, None] & valid[None, :]
        tile = tl.load(logits + components.to(tl.int64)[:, None] * n + here[None, :], mask=mask, other=-1e30)
        top = tl.max(tile, axis=0)
        new = tl.maximum(largest, top)
        if labels is not None:
            of_tile = tl.min(tl.where(tile == top[None, :], components[:, None], 2147483647), axis=0)
            likeliest = tl.where(top > largest, of_tile, likeliest)
        else:
            total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(tile - new[None, :]), axis=0)
        largest = new
    if labels is not None:
        tl.store(labels + start + here, likeliest, mask=valid)
    else:
        log_total = largest + tl.log2(total)
        tl.store(normalizer + start + here, log_total, mask=valid)
        weighted = tl.where(valid, log_total, 0).to(tl.float64)
        if weight is not None:
            weighted *= tl.load(weight + start + here, mask=valid, other=0)
        tl.store(evidence + tl.program_id(0), tl.sum(weighted))


@triton.jit(do_not_specialize=["start", "n", "slab", "k"], do_not_specialize_on_alignment=["stop"])
def _scatter_kernel(
    stop,
    hi,
    lo,
    weight,
    centres,
    logits,
    normalizer,
    labels,
    sums,
    start,
    n,
    slab,
    k,
    ld,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Scatter of components about their centres, for a slab of rows of the chunk and a pair of blocks of features.

    Components of few features stand side by side in a tile that is wide enough for the tensor cores; of their products,
    those of a component with itself are kept.
    """
    if tl.load(stop) != 0:
        return
    N_BLOCKS: tl.constexpr = D // BLOCK_D
    left = tl.program_id(2) // N_BLOCKS
    right = tl.program_id(2) % N_BLOCKS
    if left > right:
        return
    dtype: tl.constexpr = tl.float64 if EXACT else tl.float32
    index = tl.arange(0, BLOCK_K)
    place = tl.arange(0, BLOCK_K * BLOCK_D) // BLOCK_D
    # The last component may be there several times, with the same sums.
    of = tl.minimum(tl.program_id(0) * BLOCK_K + place, k - 1).to(tl.int64)
    left_columns = left * BLOCK_D + tl.arange(0, BLOCK_K * BLOCK_D) % BLOCK_D
    right_columns = right * BLOCK_D + tl.arange(0, BLOCK_K * BLOCK_D) % BLOCK_D
    left_centre = tl.load(centres + of * ld + left_columns, mask=left_columns < ld, other=0)
    counts = tl.zeros([BLOCK_N, BLOCK_K], dtype)
    # A thread holds every sixteenth row: sums of those stay in it, and the rest is added once, at the end.
    first_moments = tl.zeros([16, BLOCK_K * BLOCK_D], dtype)
    scatter = tl.zeros([BLOCK_K * BLOCK_D, BLOCK_K * BLOCK_D], dtype)
    first = tl.program_id(1).to(tl.int64) * slab
    last = tl.minimum(first + slab, n)
    rows = tl.arange(0, BLOCK_N)
    for block in range(0, tl.cdiv(last - first, BLOCK_N)):
        row = first + block * BLOCK_N
        valid = rows < last - row
        x_hi, x_lo = hi + (start + row) * ld, lo + (start + row) * ld
        root = tl.zeros([BLOCK_N, BLOCK_K * BLOCK_D], dtype)
        for i in tl.static_range(BLOCK_K):
            component = tl.minimum(tl.program_id(0) * BLOCK_K + i, k - 1).to(tl.int64)
            if labels is not None:
                label = tl.load(labels + start + row + rows, mask=valid, other=-1)
                r = tl.where(label == component, 1.0, 0.0).to(dtype)
            else:
                logit = tl.load(logits + component * n + row + rows, mask=valid, other=-1e30)
                r = tl.exp2(logit - tl.load(normalizer + start + row + rows, mask=valid, other=0))
                r = tl.where(valid, r, 0)
            if weight is not None:
                r *= tl.load(weight + start + row + rows, mask=valid, other=0)
            counts += tl.where(index[None, :] == i, r[:, None], 0)
            if BLOCK_K == 1:
                root = tl.sqrt(r)[:, None]
            else:
                root = tl.where(place[None, :] == i, tl.sqrt(r)[:, None], root)
        z = (_rows(x_hi, x_lo, rows, valid, left_columns, ld, EXACT) - left_centre[None, :]) * root
        first_moments += tl.sum(tl.reshape(z * root, (BLOCK_N // 16, 16, BLOCK_K * BLOCK_D)), axis=0)
        z_hi, z_lo = _split(z, EXACT)
        y_hi, y_lo = z_hi, z_lo
        if N_BLOCKS > 1:
            right_centre = tl.load(centres + of * ld + right_columns, mask=right_columns < ld, other=0)
            y = (_rows(x_hi, x_lo, rows, valid, right_columns, ld, EXACT) - right_centre[None, :]) * root
            y_hi, y_lo = _split(y, EXACT)
        scatter = _add_product(scatter, tl.trans(z_hi), tl.trans(z_lo), y_hi, y_lo, EXACT)
    out = sums + (tl.program_id(1).to(tl.int64) * k + of) * (ld * ld + ld + 1)
    inside = (left_columns < ld)[:, None] & (right_columns < ld)[None, :] & (place[:, None] == place[None, :])
    tl.store(out[:, None] + left_columns[:, None] * ld + right_columns[None, :], scatter, mask=inside)
    if left == right:
        tl.store(out + ld * ld + left_columns, tl.sum(first_moments, axis=0), mask=left_columns < ld)
        if left == 0:
            component = tl.minimum(tl.program_id(0) * BLOCK_K + index, k - 1)
            out_counts = sums + (tl.program_id(1).to(tl.int64) * k + component) * (ld * ld + ld + 1) + ld * ld + ld
            tl.store(out_counts, tl.sum(counts, axis=0))
    else:
        at = right_columns[:, None] * ld + left_columns[None, :]
        tl.store(out[:, None] + at, tl.trans(scatter), mask=tl.trans(inside))


@dataclass(frozen=True)
class Step:
    """The centred kernels of one data set."""

    data: Data
    never: torch.Tensor  # (1,): a stop flag that is not set

    @classmethod
    def of(cls, data: Data) -> "Step":
        """For these data."""
        return cls(data, torch.zeros(1, dtype=torch.int32, device=data.hi.device))

    def expect(self, operands: Operands, stop: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Statistics (k, ld^2 + ld + 1), float64, and parts of the log-likelihood, in units of log 2.

        Columns of the statistics: scatter about the centres, first moments about them, the count.
        """
        stop = self.never if stop is None else stop
        normalizer = self._room(self.data.dtype)
        total, evidence = None, []
        for start, rows in self._chunks(operands.hi.shape[0]):
            logits = self._logits(operands, start, rows, stop)
            evidence.append(self._normalize(logits, normalizer, start, stop))
            total = self._scatter(operands.centres, logits, normalizer, None, start, rows, stop, total)
        assert total is not None
        return total, torch.cat(evidence)

    def assign(self, labels: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """Statistics about `centres` (k, ld), each row in the component of its label (n,), int32."""
        total = None
        for start, rows in self._chunks(centres.shape[0]):
            total = self._scatter(centres, None, None, labels, start, rows, self.never, total)
        assert total is not None
        return total

    def normalize(self, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-evidence of each row (n,) in units of log 2, and parts of the log-likelihood."""
        normalizer, evidence = self._room(self.data.dtype), []
        for start, rows in self._chunks(operands.hi.shape[0]):
            logits = self._logits(operands, start, rows, self.never)
            evidence.append(self._normalize(logits, normalizer, start, self.never))
        return normalizer, torch.cat(evidence)

    def labels(self, operands: Operands) -> torch.Tensor:
        """The likeliest component of each row, the first of equals: (n,), int32."""
        labels = self._room(torch.int32)
        for start, rows in self._chunks(operands.hi.shape[0]):
            logits = self._logits(operands, start, rows, self.never)
            self._launch_normalize(logits, None, labels, None, start, self.never)
        return labels

    def responsibilities(self, operands: Operands) -> torch.Tensor:
        """Posterior probability of each component given the row: (n, k)."""
        k, normalizer = operands.hi.shape[0], self._room(self.data.dtype)
        out = torch.empty((self.data.shape[0], k), dtype=self.data.dtype, device=self.data.hi.device)
        for start, rows in self._chunks(k):
            logits = self._logits(operands, start, rows, self.never)
            self._normalize(logits, normalizer, start, self.never)
            out[start : start + rows] = torch.exp2(logits - normalizer[start : start + rows]).T
        return out

    def _chunks(self, k: int) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each chunk."""
        n = self.data.shape[0]
        size = chunk_rows(k, self.data.dtype.itemsize)
        for start in range(0, n, size):
            yield start, min(size, n - start)

    def _logits(self, operands: Operands, start: int, rows: int, stop: torch.Tensor) -> torch.Tensor:
        data, k, ld = self.data, operands.hi.shape[0], self.data.hi.shape[1]
        tile = self._tiles("logits")
        logits = torch.empty((k, rows), dtype=data.dtype, device=data.hi.device)
        launch(
            _logits_kernel,
            (-(-k // tile["BLOCK_K"]), -(-rows // (tile["BLOCKS"] * tile["BLOCK_N"]))),
            *(stop, data.hi, data.lo, operands.centres, operands.hi, operands.lo, operands.unit, operands.constants),
            *(logits, start, rows, k, ld),
            EXACT=data.exact,
            **tile,
        )
        return logits

    def _normalize(
        self, logits: torch.Tensor, normalizer: torch.Tensor, start: int, stop: torch.Tensor
    ) -> torch.Tensor:
        n_blocks = -(-logits.shape[1] // NORMALIZED_ROWS)
        evidence = torch.empty(n_blocks, dtype=torch.float64, device=logits.device)
        self._launch_normalize(logits, normalizer, None, evidence, start, stop)
        return evidence

    def _launch_normalize(
        self,
        logits: torch.Tensor,
        normalizer: torch.Tensor | None,
        labels: torch.Tensor | None,
        evidence: torch.Tensor | None,
        start: int,
        stop: torch.Tensor,
    ) -> None:
        k, rows = logits.shape
        launch(
            _normalize_kernel,
            (-(-rows // NORMALIZED_ROWS),),
            *(stop, logits, self.data.weight, normalizer, labels, evidence, start, rows, k),
            BLOCK_K=16,
            BLOCK_N=NORMALIZED_ROWS,
        )

    def _scatter(
        self,
        centres: torch.Tensor,
        logits: torch.Tensor | None,
        normalizer: torch.Tensor | None,
        labels: torch.Tensor | None,
        start: int,
        rows: int,
        stop: torch.Tensor,
        total: torch.Tensor | None,
    ) -> torch.Tensor:
        data, (k, ld) = self.data, centres.shape
        tile = self._tiles("scatter")
        slab = slab_rows(rows, tile["BLOCK_N"], max(1, PROGRAMS // k))
        n_slabs = -(-rows // slab)
        sums = torch.empty((n_slabs, k, ld * ld + ld + 1), dtype=data.dtype, device=data.hi.device)
        launch(
            _scatter_kernel,
            (-(-k // tile["BLOCK_K"]), n_slabs, (tile["D"] // tile["BLOCK_D"]) ** 2),
            *(stop, data.hi, data.lo, data.weight, centres, logits, normalizer, labels, sums, start, rows, slab, k, ld),
            EXACT=data.exact,
            **tile,
        )
        return add_up(sums, stop, total)

    def _room(self, dtype: torch.dtype) -> torch.Tensor:
        """Room for a number of each row."""
        return torch.empty(self.data.shape[0], dtype=dtype, device=self.data.hi.device)

    def _tiles(self, kernel: str) -> dict[str, int]:
        return centred_tiles(kernel, self.data.exact, self.data.shape[1])
