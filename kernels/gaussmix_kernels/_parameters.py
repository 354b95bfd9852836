"""Parameters on the device: what the M-step of every covariance type has in common.

Means are offsets from the shift of the data; everything is float64 and in the units of the data. `Natural` is what the
log-density multiplies features with, in the scaled features x' of the data; `operands` splits it for the tensor cores.

    factor      U = L^-T with L L^T = Sigma by elimination on (Sigma | I) in registers, up to d = 64: d^3 flops. Above,
                cuSOLVER and cuBLAS (`torch.linalg.cholesky_ex`, which does not wait for the host)
    decide      the lower bound, and whether to go on
    operands    natural parameters (k, width) as pairs of float16 numbers; 12 bytes a number
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gaussmix_kernels._features import Operands
from gaussmix_kernels._launch import launch
from gaussmix_kernels._prepass import Data
from gaussmix_kernels._sizes import MOST_FEATURES, Features, padded

LOG_2 = math.log(2)
# The logarithm of a weight of zero: finite, so that products with it are, and below every other.
LOG_ZERO = tl.constexpr(-1e30)
ROUNDING = 2.0**-52
EPS = tl.constexpr(ROUNDING)
# Where `Settings` has what kernels read of it.
REGULARIZATION, FLOOR = tl.constexpr(5), tl.constexpr(6)

# Why iterations stopped.
RUNNING, CONVERGED, INEXACT, SINGULAR, NOT_FINITE = range(5)

# A number that is kept as two float16 numbers is off by this much of its size. The smaller half ends at 2^-24: a square
# below `HALVES_LEAST` is off by as much as one of that size.
HALVES_EPS = 2.0**-22
HALVES_LEAST = 0.125


@dataclass(frozen=True)
class Parameters:
    """A mixture on the device, in float64; means are offsets from the shift of the data."""

    weights: torch.Tensor  # (k,)
    means: torch.Tensor  # (k, d)
    covariances: torch.Tensor  # as the type stores them
    precision_cholesky: torch.Tensor  # the same shape

    def empty_like(self) -> "Parameters":
        """Room for other parameters of the same shape."""
        return Parameters(*(torch.empty_like(value) for value in vars(self).values()))


@dataclass(frozen=True)
class Density:
    """What an E-step reads of a mixture, in float64; means are offsets from the shift of the data."""

    log_offsets: torch.Tensor  # (k,): log pi_k + log det U_k - d log(2 pi) / 2, and whatever else; finite
    means: torch.Tensor  # (k, d)
    precision_cholesky: torch.Tensor  # as the type stores them


@dataclass(frozen=True)
class Natural:
    """Natural parameters, and what tells how exact features about the shift of the data are for them."""

    products: torch.Tensor  # (k, width): coefficients of phi, or the factors U' of centred rows
    constants: torch.Tensor  # (k,)
    slopes: torch.Tensor  # (k,): coefficients of |x - shift|^2
    centres: torch.Tensor  # (k, ld): mu'
    shared: torch.Tensor  # (k,): terms of the lower bound that are not in the logits
    log_det: torch.Tensor  # (k,): log det U_k of matrices; of one for all, the first
    kappa: torch.Tensor  # (k,): relative growth of rounding errors in a log-density
    ratio: torch.Tensor  # (k,): the same in a variance
    singular: torch.Tensor  # (k,), int32: 1 where the covariance is not positive definite

    @classmethod
    def of(cls, k: int, data: Data, kind: str) -> "Natural":
        """Room for the natural parameters of k components, in this kind of features."""
        features = Features(kind, data.shape[1])
        return cls.zeros(k, features.width, features.ld, data.hi.device)

    @classmethod
    def zeros(cls, k: int, width: int, ld: int, device: torch.device) -> "Natural":
        """Room for k x `width` natural parameters."""

        def room(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        singular = torch.zeros(k, dtype=torch.int32, device=device)
        return cls(room(k, width), room(k), room(k), room(k, ld), room(k), room(k), room(k), room(k), singular)


@dataclass(frozen=True)
class Settings:
    """Numbers that kernels need in float64, in one small tensor: Triton passes numbers in float32."""

    tensor: torch.Tensor  # (7,)

    @classmethod
    def of(
        cls,
        data: Data,
        *,
        tolerance: float = 0.0,
        most_kappa: float = math.inf,
        most_ratio: float = math.inf,
        least_weight: float = 0.0,
        regularization: float = 0.0,
    ) -> "Settings":
        """In the order in which kernels read them."""
        floor = 0.0 if data.exact else HALVES_LEAST
        values = [data.total, tolerance, most_kappa, most_ratio, least_weight, regularization, floor]
        return cls(torch.tensor(values, dtype=torch.float64, device=data.hi.device))


@triton.jit
def _inverse_cholesky(a, diagonal, d, D: tl.constexpr):
    """L^-1 with L L^T = a (D, D); sum of log diag L; 1 where a pivot is what rounding leaves of the `diagonal`."""
    index = tl.arange(0, D)
    inverse = tl.where(index[:, None] == index[None, :], 1.0, 0.0).to(tl.float64)
    log_det = tl.sum(tl.zeros([D], tl.float64))
    singular = tl.sum(tl.zeros([D], tl.int32))
    for step in range(0, D):
        own = index == step
        row = tl.sum(tl.where(own[:, None], a, 0.0), axis=0)
        inverse_row = tl.sum(tl.where(own[:, None], inverse, 0.0), axis=0)
        column = tl.sum(tl.where(own[None, :], a, 0.0), axis=1)
        pivot = tl.sum(tl.where(own, row, 0.0))
        least = d * EPS * tl.sum(tl.where(own, diagonal, 0.0))
        regular = pivot > least
        singular = tl.where(regular, singular, 1)
        reciprocal = 1 / tl.where(regular, pivot, 1.0)
        factor = tl.where(index > step, column * reciprocal, 0.0)
        a -= factor[:, None] * row[None, :]
        inverse -= factor[:, None] * inverse_row[None, :]
        inverse *= tl.where(own, tl.sqrt(reciprocal), 1.0)[:, None]
        log_det -= 0.5 * tl.log(reciprocal)
    return inverse, log_det, singular


def factor(
    covariances: torch.Tensor, factors: torch.Tensor, log_det: torch.Tensor, singular: torch.Tensor, stop: torch.Tensor
) -> None:
    """Fills in U = L^-T of matrices (k, d, d), log det U and what is not positive definite."""
    k, d, _ = covariances.shape
    if d <= MOST_FEATURES:
        launch(
            _factor_kernel,
            (k,),
            *(stop, covariances, factors, log_det, singular, d),
            D=padded(d),
            BLOCK=16,
        )
        return
    # Does not look at `stop`: where that is set, it makes the same factors of the same covariances once more.
    lower, info = torch.linalg.cholesky_ex(covariances)
    least = d * ROUNDING * covariances.diagonal(dim1=1, dim2=2)
    bad = (info != 0) | ~(lower.diagonal(dim1=1, dim2=2) ** 2 > least).all(dim=1)
    eye = torch.eye(d, dtype=covariances.dtype, device=covariances.device).expand_as(covariances)
    inverse = torch.linalg.solve_triangular(torch.where(bad[:, None, None], eye, lower), eye, upper=False)
    factors.copy_(inverse.mT)
    log_det[:k].copy_(inverse.diagonal(dim1=1, dim2=2).log().sum(dim=1))
    singular[:k].copy_(bad)


@triton.jit(do_not_specialize=["d"], do_not_specialize_on_alignment=["stop"])
def _factor_kernel(stop, covariances, factors, log_det, singular, d, D: tl.constexpr, BLOCK: tl.constexpr):
    """U = L^-T by blocks of columns, in place: what is left of Sigma below the diagonal, U above it.

    The inverse factor M of a block on the diagonal makes L of what is below it and U of what is above, both times M^T;
    columns further right lose their product with L.
    """
    if tl.load(stop) != 0:
        return
    component = tl.program_id(0).to(tl.int64)
    covariances += component * d * d
    factors += component * d * d
    rows, index = tl.arange(0, D), tl.arange(0, BLOCK)
    inside = (rows < d)[:, None] & (rows < d)[None, :]
    at = rows[:, None] * d + rows[None, :]
    below = rows[:, None] // BLOCK >= rows[None, :] // BLOCK
    rest = tl.load(covariances + at, mask=inside & below, other=0)
    log_of_det = tl.sum(tl.zeros([BLOCK], tl.float64))
    any_singular = tl.sum(tl.zeros([BLOCK], tl.int32))
    for first in range(0, D, BLOCK):
        # Blocks are cut out of a tile by way of memory.
        tl.store(factors + at, rest, mask=inside & (rows >= first)[None, :])
        tl.debug_barrier()
        columns = first + index
        mask = (columns < d)[:, None] & (columns < d)[None, :]
        eye = tl.where(index[:, None] == index[None, :], 1.0, 0.0).to(tl.float64)
        own = tl.where(mask, tl.load(factors + columns[:, None] * d + columns[None, :], mask=mask, other=0), eye)
        diagonal = tl.load(covariances + columns * (d + 1), mask=columns < d, other=1)
        inverse, block_log_det, block_singular = _inverse_cholesky(own, diagonal, d, BLOCK)
        log_of_det += block_log_det
        any_singular = tl.maximum(any_singular, block_singular)
        mask = (rows < d)[:, None] & (columns < d)[None, :]
        block = tl.load(factors + rows[:, None] * d + columns[None, :], mask=mask, other=0)
        here = ((rows >= first) & (rows < first + BLOCK))[:, None]
        block = tl.where(here, tl.where(rows[:, None] == columns[None, :], 1.0, 0.0), block)
        made = tl.dot(block, tl.trans(inverse), out_dtype=tl.float64)
        lower = tl.where((rows >= first + BLOCK)[:, None], made, 0.0)
        tl.debug_barrier()
        tl.store(factors + rows[:, None] * d + columns[None, :], made - lower, mask=mask)
        lost = tl.dot(made, tl.trans(lower), out_dtype=tl.float64)
        rest -= tl.where(below | (rows < first + BLOCK)[:, None], lost, 0.0)
    tl.store(log_det + component, -log_of_det)
    tl.store(singular + component, any_singular)


@triton.jit
def whitened_sums(factor, mean, root, d, D: tl.constexpr, BLOCK: tl.constexpr):
    """A bound on sum_ij |A_ij| root_i root_j, and A mean, for A = U U^T: U is read a few columns at a time.

    The bound is sum_c (sum_i |U_ic| root_i)^2. Also the trace of A.
    """
    rows = tl.arange(0, D)
    bound = tl.sum(root) * 0
    trace = bound
    linear = mean * 0
    for start in range(0, d, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows < d)[:, None] & (columns < d)[None, :]
        u = tl.load(factor + rows[:, None] * d + columns[None, :], mask=mask, other=0)
        grown = tl.sum(tl.abs(u) * root[:, None], axis=0)
        bound += tl.sum(grown * grown)
        trace += tl.sum(u * u)
        linear += tl.sum(u * tl.sum(u * mean[:, None], axis=0)[None, :], axis=1)
    return bound, linear, trace


@triton.jit
def log_weight(weight):
    """Log pi, finite."""
    return tl.where(weight > 0, tl.log(tl.where(weight > 0, weight, 1.0)), LOG_ZERO)


@triton.jit
def constant(weight, log_det, d):
    """Log pi + log det U - d log(2 pi) / 2; a plain number times d would be float32."""
    return log_weight(weight) + log_det - d * tl.full([], 0.9189385332046727, tl.float64)


@triton.jit
def sum_of_counts(counts, stride, k, BLOCK: tl.constexpr):
    """Sum of k counts that lie `stride` apart."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(counts + at.to(tl.int64) * stride, mask=at < k, other=0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["iteration", "n_parts", "k"], do_not_specialize_on_alignment=["stop"])
def _decide_kernel(
    stop,
    bounds,
    settings,
    evidence,
    shared,
    old_weights,
    weights,
    kappa,
    ratio,
    singular,
    iteration,
    n_parts,
    k,
    BLOCK: tl.constexpr,
):
    before = tl.load(stop + iteration)
    if before != 0:
        tl.store(stop + iteration + 1, before)
        return
    index = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n_parts, BLOCK):
        total += tl.load(evidence + start + index, mask=start + index < n_parts, other=0)
    beside = tl.zeros([BLOCK], tl.float64)
    any_singular = tl.zeros([BLOCK], tl.int32)
    inexact = tl.zeros([BLOCK], tl.int32)
    for start in range(0, k, BLOCK):
        real = start + index < k
        any_singular = tl.maximum(any_singular, tl.load(singular + start + index, mask=real, other=0))
        beside += tl.load(shared + start + index, mask=real, other=0)
        old = tl.load(old_weights + start + index, mask=real, other=0)
        new = tl.load(weights + start + index, mask=real, other=0)
        lost = (old > 0) & (new < tl.load(settings + 4))
        # What is not a number exceeds every limit.
        exact = tl.load(kappa + start + index, mask=real, other=0) <= tl.load(settings + 2)
        exact = exact & (tl.load(ratio + start + index, mask=real, other=0) <= tl.load(settings + 3))
        inexact = tl.where(lost | ((new > 0) & (exact == 0)), 1, inexact)
    bound = tl.sum(total) * 0.6931471805599453 / tl.load(settings) + tl.sum(beside)
    finite = (bound - bound) == 0
    change = tl.abs(bound - tl.load(bounds + iteration))
    # The reasons as `RUNNING` and those after it name them; the gravest counts.
    reason = tl.where(change < tl.load(settings + 1), 1, 0)
    reason = tl.where(tl.max(inexact) > 0, 2, reason)
    reason = tl.where(tl.max(any_singular) > 0, 3, reason)
    reason = tl.where(finite, reason, 4)
    tl.store(bounds + iteration + 1, bound)
    tl.store(stop + iteration + 1, reason)


def decide(
    stop: torch.Tensor,
    bounds: torch.Tensor,
    settings: Settings,
    evidence: torch.Tensor,
    shared: torch.Tensor,
    old: Parameters,
    new: Parameters,
    natural: Natural,
    iteration: int,
) -> None:
    """Fills in bounds[iteration + 1], the lower bound of `old`, and stop[iteration + 1], what `new` asks for."""
    launch(
        _decide_kernel,
        (1,),
        *(stop, bounds, settings.tensor, evidence, shared, old.weights, new.weights),
        *(natural.kappa, natural.ratio, natural.singular, iteration, evidence.shape[0], new.weights.shape[0]),
        BLOCK=256,
    )


@triton.jit(do_not_specialize=["width", "ld"], do_not_specialize_on_alignment=["stop"])
def _operands_kernel(
    stop,
    products,
    constants,
    slopes,
    centres,
    hi,
    lo,
    unit,
    out_constants,
    out_slopes,
    out_centres,
    gain,
    width,
    ld,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Splits the products of a component, scaled by a power of two to at most 256."""
    if tl.load(stop) != 0:
        return
    LOG2_E: tl.constexpr = 1.4426950408889634
    component = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        value = tl.load(products + component * width + start + index, mask=start + index < width, other=0)
        largest = tl.maximum(largest, tl.abs(value))
    peak = tl.max(largest)
    power = tl.floor(8.0 - tl.log2(tl.where(peak > 0, peak, 1.0).to(tl.float32)))
    power = tl.minimum(tl.maximum(power, -100.0), 100.0)
    scale = tl.exp2(tl.where(peak > 0, power, 0.0).to(tl.float64))
    if EXACT:
        scale = scale * 0 + 1
    for start in range(0, width, BLOCK):
        inside = start + index < width
        at = component * width + start + index
        value = tl.load(products + at, mask=inside, other=0) * scale
        if EXACT:
            tl.store(hi + at, value, mask=inside)
        else:
            high = value.to(tl.float32).to(tl.float16)
            tl.store(hi + at, high, mask=inside)
            tl.store(lo + at, (value - high.to(tl.float64)).to(tl.float32).to(tl.float16), mask=inside)
    dtype = unit.dtype.element_ty
    tl.store(unit + component, (tl.load(gain) / scale).to(dtype))
    tl.store(out_constants + component, (tl.load(constants + component) * LOG2_E).to(dtype))
    tl.store(out_slopes + component, (tl.load(slopes + component) * LOG2_E).to(dtype))
    for start in range(0, ld, BLOCK):
        inside = start + index < ld
        centre = tl.load(centres + component * ld + start + index, mask=inside, other=0)
        tl.store(out_centres + component * ld + start + index, centre.to(dtype), mask=inside)


def room_for_operands(natural: Natural, data: Data) -> Operands:
    """Room for the operands of natural parameters of this shape."""
    (k, width), device = natural.products.shape, data.hi.device
    hi = torch.empty((k, width), dtype=data.hi.dtype, device=device)
    lo = hi if data.exact else torch.empty_like(hi)
    unit, constants, slopes = (torch.empty(k, dtype=data.dtype, device=device) for _ in range(3))
    return Operands(hi, lo, unit, constants, slopes, torch.empty_like(natural.centres, dtype=data.dtype))


def fill_operands(operands: Operands, natural: Natural, gain: torch.Tensor, exact: bool, stop: torch.Tensor) -> None:
    """`operands` of these natural parameters; logits multiply the products by `gain`."""
    k, width = natural.products.shape
    launch(
        _operands_kernel,
        (k,),
        *(stop, natural.products, natural.constants, natural.slopes, natural.centres),
        *(operands.hi, operands.lo, operands.unit, operands.constants, operands.slopes, operands.centres),
        *(gain, width, natural.centres.shape[1]),
        BLOCK=256,
        EXACT=exact,
    )
