"""EM of a model that is linear in features of x: tied, spherical, diag, and full covariances of few features.

    log pi_k + log N(x; mu_k, Sigma_k) = w_k . phi(x) + c_k        statistics = sum_i r_i phi(x_i)^T

phi is x', and one of: nothing (tied, up to a term that all components share), |x - shift|^2 (spherical), the squares of
x' (diag), its products x'_i x'_j, i <= j (full).

    accumulate          statistics of a slab of rows, in one read of the data: logits, softmax and the second product
                        without leaving the chip. 2 products of 2 n k F flops each (3 tensor-core products for one)
    normalize           log-normaliser of each row, where components x features are too many for the chip; `accumulate`
                        and `responsibilities` then compute the logits once more
    labels              likeliest component of each row: the same kernel without exponentials
    responsibilities    (n, k), for those who ask for it

Logits are in units of log 2, rows by components: a thread then has two to four rows of many components, and softmax
stays within a warp. Statistics are float32 sums over a slab of at most 4096 rows, stored apart and added in float64 in
a fixed order by `_sums`: no atomics, the same bits on every run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gaussmix_kernels._launch import launch
from gaussmix_kernels._prepass import R_SCALE, Data
from gaussmix_kernels._sizes import Features, slab_rows
from gaussmix_kernels._sums import add_up


@dataclass(frozen=True)
class Operands:
    """What the kernels multiply features with: `fill_operands` makes it from parameters."""

    hi: torch.Tensor  # (k, width), float16 or float64
    lo: torch.Tensor  # (k, width)
    unit: torch.Tensor  # (k,): the product is to be multiplied with
    constants: torch.Tensor  # (k,), log 2 units
    slopes: torch.Tensor  # (k,): coefficients of |x - shift|^2, log 2 units
    centres: torch.Tensor  # (k, ld): mu' where x' - mu' is formed


@triton.jit
def _product(a_hi, a_lo, b_hi, b_lo, EXACT: tl.constexpr):
    """A @ b; in the default tier without the product of the small halves."""
    if EXACT:
        return tl.dot(a_hi, b_hi, out_dtype=tl.float64)
    else:
        product = tl.dot(a_lo, b_hi)
        product = tl.dot(a_hi, b_lo, product)
        return tl.dot(a_hi, b_hi, product)


@triton.jit
def _add_product(total, a_hi, a_lo, b_hi, b_lo, EXACT: tl.constexpr):
    """Total + a @ b."""
    if EXACT:
        return tl.dot(a_hi, b_hi, total, out_dtype=tl.float64)
    else:
        # Tensor cores truncate what they add to: the product begins at zero, and is added where sums are rounded.
        return total + _product(a_hi, a_lo, b_hi, b_lo, EXACT)


@triton.jit
def _folded(value):
    """Sums of pairs of rows that a thread holds: rows / 16 x 8 x components."""
    return tl.sum(tl.reshape(value, (value.shape[0] // 16, 2, 8, value.shape[1])), axis=1)


@triton.jit
def _split(value, EXACT: tl.constexpr):
    """Two float16 numbers with the sum of `value`; in the exact tier, the value."""
    if EXACT:
        return value, value
    else:
        hi = value.to(tl.float16)
        return hi, (value - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def _joined(hi, lo, EXACT: tl.constexpr):
    if EXACT:
        return hi
    else:
        return hi.to(tl.float32) + lo.to(tl.float32)


@triton.jit
def _from_row(x, first, ld):
    """X' and its squares from a row on: what is counted from there needs 32 bits, and fewer registers."""
    return x[0] + first * ld, x[1] + first * ld, x[2] + first


@triton.jit
def _columns(x, rows, columns, mask, ld, EXACT: tl.constexpr):
    """x'_rows,columns as rows x columns."""
    at = rows[:, None] * ld + columns[None, :]
    x_hi = tl.load(x[0] + at, mask=mask, other=0)
    if EXACT:
        return x_hi, x_hi
    else:
        return x_hi, tl.load(x[1] + at, mask=mask, other=0)


@triton.jit
def _second_features(x, pairs, rows, valid, columns, ld, n_products, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Squares or products as rows x features."""
    if KIND == "squares":
        mask = valid[:, None] & (columns < ld)[None, :]
        x_hi, x_lo = _columns(x, rows, columns, mask, ld, EXACT)
        joined = _joined(x_hi, x_lo, EXACT)
        return _split(joined * joined, EXACT)
    else:
        real = columns < n_products
        mask = valid[:, None] & real[None, :]
        left = tl.load(pairs + columns, mask=real, other=0)
        right = tl.load(pairs + n_products + columns, mask=real, other=0)
        x_hi, x_lo = _columns(x, rows, left, mask, ld, EXACT)
        y_hi, y_lo = _columns(x, rows, right, mask, ld, EXACT)
        return _split(_joined(x_hi, x_lo, EXACT) * _joined(y_hi, y_lo, EXACT), EXACT)


@triton.jit
def _logits(
    x,
    pairs,
    factors,
    components,
    k,
    rows,
    valid,
    n_products,
    widths,
    KIND: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Log pi_k + log N of rows x components, in units of log 2; -1e30 where there is no component."""
    dtype: tl.constexpr = tl.float64 if EXACT else tl.float32
    w_hi, w_lo, unit, constants, slopes = factors
    ld, width = widths
    real = components < k
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < ld
        x_hi, x_lo = _columns(x, rows, columns, valid[:, None] & inside[None, :], ld, EXACT)
        at = components[None, :] * width + columns[:, None]
        a_hi = tl.load(w_hi + at, mask=inside[:, None] & real[None, :], other=0)
        a_lo = tl.load(w_lo + at, mask=inside[:, None] & real[None, :], other=0)
        if D == BLOCK_D:
            total = _product(x_hi, x_lo, a_hi, a_lo, EXACT)
        else:
            total = _add_product(total, x_hi, x_lo, a_hi, a_lo, EXACT)
    if KIND == "squares" or KIND == "products":
        for start in range(0, Q, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            inside = columns < width - ld
            q_hi, q_lo = _second_features(x, pairs, rows, valid, columns, ld, n_products, KIND, EXACT)
            at = components[None, :] * width + ld + columns[:, None]
            a_hi = tl.load(w_hi + at, mask=inside[:, None] & real[None, :], other=0)
            a_lo = tl.load(w_lo + at, mask=inside[:, None] & real[None, :], other=0)
            total = _add_product(total, q_hi, q_lo, a_hi, a_lo, EXACT)
    total *= tl.load(unit + components, mask=real, other=0)[None, :]
    total += tl.load(constants + components, mask=real, other=-1e30)[None, :]
    if KIND == "norm":
        square = tl.load(x[2] + rows, mask=valid, other=0)
        total += square[:, None] * tl.load(slopes + components, mask=real, other=0)[None, :]
    return total


@triton.jit(do_not_specialize=["n", "k", "slab", "n_products"], do_not_specialize_on_alignment=["stop"])
def _accumulate_kernel(
    stop,
    x,
    factors,
    normalizer,
    labels,
    sums,
    evidence,
    n,
    k,
    slab,
    n_products,
    widths,
    KIND: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    R_SCALE: tl.constexpr,
):
    """Sums of a slab for a tile of components, by labels, by known log-normalisers, or by those of the tile itself."""
    if tl.load(stop) != 0:
        return
    dtype: tl.constexpr = tl.float64 if EXACT else tl.float32
    ld, width = widths
    pairs, weight = x[3], x[4]
    # One axis, the only one that is long enough; the tiles of a slab run side by side, and share its rows in the cache.
    n_tiles = tl.cdiv(k, BLOCK_K)
    part = tl.program_id(0) // n_tiles
    components = tl.program_id(0) % n_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    real = components < k
    columns = tl.arange(0, D)
    # Added up over rows at the end, once, and not in every block.
    counts = tl.zeros([BLOCK_N // 16, 8, BLOCK_K], dtype)
    norms = tl.zeros([BLOCK_N // 16, 8, BLOCK_K], dtype)
    first_moments = tl.zeros([BLOCK_K, D], dtype)
    if KIND == "squares" or KIND == "products":
        second_columns = tl.arange(0, Q)
        second_moments = tl.zeros([BLOCK_K, Q], dtype)
    log_likelihood = tl.zeros([BLOCK_N], tl.float64)
    first = part.to(tl.int64) * slab
    last = tl.minimum(first + slab, n)
    rows = tl.arange(0, BLOCK_N)
    for block in range(0, tl.cdiv(last - first, BLOCK_N)):
        row = first + block * BLOCK_N
        here = _from_row(x, row, ld)
        valid = rows < last - row
        if weight is not None:
            w = tl.load(weight + row + rows, mask=valid, other=0)
        else:
            w = tl.where(valid, 1.0, 0.0).to(dtype)
        if labels is not None:
            label = tl.load(labels + row + rows, mask=valid, other=-1)
            r = tl.where(label[:, None] == components[None, :], w[:, None] * R_SCALE, 0.0)
        else:
            logits = _logits(
                here,
                pairs,
                factors,
                components,
                k,
                rows,
                valid,
                n_products,
                widths,
                KIND,
                D,
                Q,
                BLOCK_K,
                BLOCK_D,
                BLOCK_N,
                EXACT,
            )
            if normalizer is not None:
                r = (
                    tl.exp2(logits - tl.load(normalizer + row + rows, mask=valid, other=0)[:, None])
                    * (w * R_SCALE)[:, None]
                )
            else:
                largest = tl.max(logits, axis=1)
                r = tl.exp2(logits - largest[:, None])
                total = tl.sum(r, axis=1)
                r *= (w * R_SCALE / total)[:, None]
                log_likelihood += w * (largest + tl.log2(total))
        counts += _folded(r)
        r_hi, r_lo = _split(r, EXACT)
        r_hi, r_lo = tl.trans(r_hi), tl.trans(r_lo)
        mask = valid[:, None] & (columns < ld)[None, :]
        x_hi, x_lo = _columns(here, rows, columns, mask, ld, EXACT)
        first_moments = _add_product(first_moments, r_hi, r_lo, x_hi, x_lo, EXACT)
        if KIND == "norm":
            square = tl.load(here[2] + rows, mask=valid, other=0)
            norms += _folded(r * square[:, None])
        if KIND == "squares" or KIND == "products":
            q_hi, q_lo = _second_features(here, pairs, rows, valid, second_columns, ld, n_products, KIND, EXACT)
            second_moments = _add_product(second_moments, r_hi, r_lo, q_hi, q_lo, EXACT)
    out = sums + (part.to(tl.int64) * k + components) * (width + 2)
    tl.store(out + width, tl.sum(tl.sum(counts, axis=0), axis=0), mask=real)
    tl.store(out + width + 1, tl.sum(tl.sum(norms, axis=0), axis=0), mask=real)
    tl.store(out[:, None] + columns[None, :], first_moments, mask=real[:, None] & (columns < ld)[None, :])
    if KIND == "squares" or KIND == "products":
        mask = real[:, None] & (second_columns < width - ld)[None, :]
        tl.store(out[:, None] + ld + second_columns[None, :], second_moments, mask=mask)
    if evidence is not None:
        tl.store(evidence + part, tl.sum(log_likelihood))


@triton.jit(do_not_specialize=["n", "k", "n_products"], do_not_specialize_on_alignment=["stop"])
def _normalize_kernel(
    stop,
    x,
    factors,
    normalizer,
    labels,
    evidence,
    n,
    k,
    n_products,
    widths,
    KIND: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Log-normaliser of a block of rows, in units of log 2, and their log-likelihood; or their likeliest components."""
    if tl.load(stop) != 0:
        return
    dtype: tl.constexpr = tl.float64 if EXACT else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_N
    here, pairs, weight = _from_row(x, row, widths[0]), x[3], x[4]
    rows = tl.arange(0, BLOCK_N)
    valid = rows < n - row
    largest = tl.full([BLOCK_N], -float("inf"), dtype)
    total = tl.zeros([BLOCK_N], dtype)
    likeliest = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, k, BLOCK_K):
        components = start + tl.arange(0, BLOCK_K)
        logits = _logits(
            here,
            pairs,
            factors,
            components,
            k,
            rows,
            valid,
            n_products,
            widths,
            KIND,
            D,
            Q,
            BLOCK_K,
            BLOCK_D,
            BLOCK_N,
            EXACT,
        )
        top = tl.max(logits, axis=1)
        new = tl.maximum(largest, top)
        if labels is not None:
            # The first of equals: the least component among those that reach the largest logit.
            of_tile = tl.min(tl.where(logits == top[:, None], components[None, :], 2147483647), axis=1)
            likeliest = tl.where(top > largest, of_tile, likeliest)
        else:
            total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(logits - new[:, None]), axis=1)
        largest = new
    if labels is not None:
        tl.store(labels + row + rows, likeliest, mask=valid)
    else:
        log_total = largest + tl.log2(total)
        tl.store(normalizer + row + rows, log_total, mask=valid)
        weighted = tl.where(valid, log_total, 0).to(tl.float64)
        if weight is not None:
            weighted *= tl.load(weight + row + rows, mask=valid, other=0)
        tl.store(evidence + tl.program_id(0), tl.sum(weighted))


@triton.jit(do_not_specialize=["n", "k", "n_products"])
def _responsibilities_kernel(
    normalizer,
    x,
    factors,
    out,
    n,
    k,
    n_products,
    widths,
    KIND: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
):
    """exp(logit - log-normaliser) of a tile: rows x components."""
    n_tiles = tl.cdiv(k, BLOCK_K)
    row = (tl.program_id(0) // n_tiles).to(tl.int64) * BLOCK_N
    here, pairs = _from_row(x, row, widths[0]), x[3]
    rows = tl.arange(0, BLOCK_N)
    valid = rows < n - row
    components = tl.program_id(0) % n_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    logits = _logits(
        here,
        pairs,
        factors,
        components,
        k,
        rows,
        valid,
        n_products,
        widths,
        KIND,
        D,
        Q,
        BLOCK_K,
        BLOCK_D,
        BLOCK_N,
        EXACT,
    )
    r = tl.exp2(logits - tl.load(normalizer + row + rows, mask=valid, other=0)[:, None])
    at = rows[:, None] * k + components[None, :]
    tl.store(out + row * k + at, r, mask=valid[:, None] & (components < k)[None, :])


@dataclass(frozen=True)
class Step:
    """The kernels of one data set and one kind of features."""

    data: Data
    features: Features
    pairs: torch.Tensor | None  # (2, n_products), int32: which features each product is made of
    never: torch.Tensor  # (1,): a stop flag that is not set

    @classmethod
    def of(cls, data: Data, kind: str) -> "Step":
        """For these data."""
        (_, d), device = data.shape, data.hi.device
        features = Features(kind, d)
        pairs = torch.triu_indices(d, d, dtype=torch.int32, device=device) if features.n_products else None
        return cls(data, features, pairs, torch.zeros(1, dtype=torch.int32, device=device))

    def fused(self, k: int) -> bool:
        """Whether one program holds all components: a single read of the data, and a single exponential."""
        return self._tiles("accumulate", k)["BLOCK_K"] >= k

    def expect(self, operands: Operands, stop: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Statistics (k, width + 2), float64, and parts of the log-likelihood, in units of log 2.

        Columns of the statistics: x', second features, the count, |x - shift|^2. Nothing runs where `stop` is set.
        """
        k = operands.hi.shape[0]
        if self.fused(k):
            evidence = torch.empty(self._slabs(k)[1], dtype=torch.float64, device=self.data.hi.device)
            return self._accumulate(operands, k, None, None, evidence, stop), evidence
        normalizer, evidence = self.normalize(operands, stop)
        return self._accumulate(operands, k, normalizer, None, None, stop), evidence

    def assign(self, labels: torch.Tensor, k: int) -> torch.Tensor:
        """Statistics (k, width + 2), float64, with each row in the component of its label (n,), int32."""
        return self._accumulate(None, k, None, labels, None, None)

    def normalize(self, operands: Operands, stop: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-evidence of each row (n,) in units of log 2, and parts of the log-likelihood."""
        data, k = self.data, operands.hi.shape[0]
        n_blocks = -(-data.shape[0] // self._tiles("normalize", k)["BLOCK_N"])
        normalizer = torch.empty(data.shape[0], dtype=data.dtype, device=data.hi.device)
        evidence = torch.empty(n_blocks, dtype=torch.float64, device=data.hi.device)
        self._normalize(operands, normalizer, None, evidence, stop)
        return normalizer, evidence

    def labels(self, operands: Operands) -> torch.Tensor:
        """The likeliest component of each row, the first of equals: (n,), int32."""
        labels = torch.empty(self.data.shape[0], dtype=torch.int32, device=self.data.hi.device)
        self._normalize(operands, None, labels, None, None)
        return labels

    def responsibilities(self, operands: Operands) -> torch.Tensor:
        """Posterior probability of each component given the row: (n, k)."""
        data, (n, _) = self.data, self.data.shape
        k = operands.hi.shape[0]
        tile = self._tiles("normalize", k)
        normalizer, _ = self.normalize(operands)
        out = torch.empty((n, k), dtype=data.dtype, device=data.hi.device)
        launch(
            _responsibilities_kernel,
            (-(-k // tile["BLOCK_K"]) * -(-n // tile["BLOCK_N"]),),
            *(normalizer, self._inputs(), self._factors(operands), out, n, k, *self._sizes()),
            KIND=self.features.kind,
            EXACT=data.exact,
            **tile,
        )
        return out

    def _normalize(
        self,
        operands: Operands,
        normalizer: torch.Tensor | None,
        labels: torch.Tensor | None,
        evidence: torch.Tensor | None,
        stop: torch.Tensor | None,
    ) -> None:
        data, (n, _) = self.data, self.data.shape
        k = operands.hi.shape[0]
        tile = self._tiles("normalize", k)
        launch(
            _normalize_kernel,
            (-(-n // tile["BLOCK_N"]),),
            *(self._stop(stop), self._inputs(), self._factors(operands)),
            *(normalizer, labels, evidence, n, k, *self._sizes()),
            KIND=self.features.kind,
            EXACT=data.exact,
            **tile,
        )

    def _accumulate(
        self,
        operands: Operands | None,
        k: int,
        normalizer: torch.Tensor | None,
        labels: torch.Tensor | None,
        evidence: torch.Tensor | None,
        stop: torch.Tensor | None,
    ) -> torch.Tensor:
        data, (n, _) = self.data, self.data.shape
        tile = self._tiles("accumulate", k)
        n_tiles = -(-k // tile["BLOCK_K"])
        slab, n_slabs = self._slabs(k)
        sums = torch.empty((n_slabs, k, self.features.width + 2), dtype=data.dtype, device=data.hi.device)
        launch(
            _accumulate_kernel,
            (n_tiles * n_slabs,),
            *(self._stop(stop), self._inputs(), self._factors(operands)),
            *(normalizer, labels, sums, evidence, n, k, slab, *self._sizes()),
            KIND=self.features.kind,
            EXACT=data.exact,
            R_SCALE=1.0 if data.exact else R_SCALE,
            **tile,
        )
        return add_up(sums, self._stop(stop))

    def _slabs(self, k: int) -> tuple[int, int]:
        """Rows of a slab, and number of slabs."""
        n = self.data.shape[0]
        slab = slab_rows(n, self._tiles("accumulate", k)["BLOCK_N"])
        return slab, -(-n // slab)

    def _stop(self, stop: torch.Tensor | None) -> torch.Tensor:
        return self.never if stop is None else stop

    def _tiles(self, kernel: str, k: int) -> dict[str, int]:
        return self.features.tiles(kernel, self.data.exact, k)

    # Tensors travel in tuples, and so do widths, which are multiples of 16. Triton specialises on the members of tuples
    # whatever `do_not_specialize` says: sizes that vary stay outside.

    def _inputs(self) -> tuple[torch.Tensor | None, ...]:
        return self.data.hi, self.data.lo, self.data.squares, self.pairs, self.data.weight

    @staticmethod
    def _factors(operands: Operands | None) -> tuple[torch.Tensor, ...] | None:
        if operands is None:
            return None
        return operands.hi, operands.lo, operands.unit, operands.constants, operands.slopes

    def _sizes(self) -> tuple[int, tuple[int, int]]:
        return self.features.n_products, (self.features.ld, self.features.width)
