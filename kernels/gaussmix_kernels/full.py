"""One covariance matrix for each component.

Few features: phi = (x', x'_i x'_j), all in one product. More: x' - mu' is formed first (`_centred`).
"""

import torch
import triton
import triton.language as tl

from gaussmix_kernels._launch import launch
from gaussmix_kernels._parameters import (
    FLOOR,
    REGULARIZATION,
    Density,
    Natural,
    Parameters,
    Settings,
    constant,
    factor,
    sum_of_counts,
    whitened_sums,
)
from gaussmix_kernels._prepass import Data
from gaussmix_kernels._sizes import padded

# Rows of a covariance that a program computes, and columns of a factor that it reads at a time.
ROWS = 16

# What its log-density is linear in, beside x and 1.
QUADRATIC = "products"


def is_centred(width: int, ld: int) -> bool:
    """Whether natural parameters of this width are factors: a product of few features has fewer columns."""
    return width == ld * ld


def shape(k: int, d: int) -> tuple[int, ...]:
    """Shape of the stored covariances."""
    return (k, d, d)


def fill(natural: Natural, density: Density, data: Data) -> None:
    """Natural parameters in the features of `data`, where EM starts and for inference."""
    (k, d), ld = density.means.shape, data.hi.shape[1]
    cholesky, scale = density.precision_cholesky, data.scale
    if is_centred(natural.products.shape[1], ld):
        natural.products.view(k, ld, ld)[:, :d, :d] = cholesky / scale[:, None]
        natural.centres[:, :d] = density.means * scale
        natural.constants.copy_(density.log_offsets)
        return
    precision = cholesky @ cholesky.mT
    linear = (precision @ density.means[:, :, None])[:, :, 0]
    natural.products[:, :d] = linear / scale
    i, j = torch.triu_indices(d, d, device=scale.device)
    halves = torch.where(i == j, -0.5, -1.0) / (scale[i] * scale[j])
    natural.products[:, ld : ld + i.shape[0]] = precision[:, i, j] * halves
    natural.constants.copy_(density.log_offsets - 0.5 * (linear * density.means).sum(dim=1))


def shared_log_density(density: Density, data: Data) -> float:
    """What all components share of the log-density of each row: (n,), or a number."""
    return 0.0


def moments(statistics: torch.Tensor, data: Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts, first and second moments, in the units of the data and of its weights."""
    d, ld, k = data.shape[1], data.hi.shape[1], statistics.shape[0]
    products = data.scale[:, None] * data.scale
    if is_centred(statistics.shape[1] - ld - 1, ld):
        statistics = statistics * data.gain
        second_moments = statistics[:, : ld * ld].view(k, ld, ld)[:, :d, :d] / products
        return statistics[:, -1], statistics[:, ld * ld : ld * ld + d] / data.scale, second_moments
    statistics = statistics * data.unit
    i, j = torch.triu_indices(d, d, device=statistics.device)
    second_moments = torch.empty((k, d, d), dtype=statistics.dtype, device=statistics.device)
    second_moments[:, i, j] = second_moments[:, j, i] = statistics[:, ld : ld + i.shape[0]] / products[i, j]
    return statistics[:, -2], statistics[:, :d] / data.scale, second_moments


@triton.jit
def _moments_of(row, left, right, of_left, of_right, d, ld, PRODUCTS: tl.constexpr):
    """Count, first moments of left and right features and second moments of pairs, in the units of the data."""
    in_left, in_right = left < d, right < d
    inside = in_left[:, None] & in_right[None, :]
    if PRODUCTS:
        low = tl.minimum(left[:, None], right[None, :])
        high = tl.maximum(left[:, None], right[None, :])
        # d (d + 1) / 2 products, stored as a multiple of 16.
        count = tl.load(row + ld + (d * (d + 1) // 2 + 15) // 16 * 16)
        first = row
        second = tl.load(row + ld + low * d - low * (low - 1) // 2 + high - low, mask=inside, other=0)
    else:
        count = tl.load(row + ld * ld + ld)
        first = row + ld * ld
        second = tl.load(row + left[:, None] * ld + right[None, :], mask=inside, other=0)
    of_rows = tl.load(first + left, mask=in_left, other=0) / of_left
    of_columns = tl.load(first + right, mask=in_right, other=0) / of_right
    return count, of_rows, of_columns, second / (of_left[:, None] * of_right[None, :])


@triton.jit(do_not_specialize=["k", "d"], do_not_specialize_on_alignment=["stop"])
def _moments_kernel(
    stop,
    statistics,
    settings,
    scale,
    old_means,
    weights,
    means,
    covariances,
    k,
    d,
    ld,
    D: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weight and mean of a component, and some rows of its covariance."""
    if tl.load(stop) != 0:
        return
    component = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    of_rows = tl.load(scale + rows, mask=rows < d, other=1)
    of_columns = tl.load(scale + columns, mask=columns < d, other=1)
    if PRODUCTS:
        count_at = ld + (d * (d + 1) // 2 + 15) // 16 * 16
        width = count_at + 2
    else:
        count_at = ld * ld + ld
        width = count_at + 1
    total = sum_of_counts(statistics + count_at, width, k, 128)
    count, left, right, second = _moments_of(
        statistics + component * width, rows, columns, of_rows, of_columns, d, ld, PRODUCTS
    )
    divisor = tl.where(count > 0, count, 1.0)
    sigma = second / divisor - (left / divisor)[:, None] * (right / divisor)[None, :]
    if count <= 0:
        # Without rows it says nothing about its own spread: it gets the pooled one, and keeps its place.
        sigma = sigma * 0
        row = statistics
        for _ in range(0, k):
            other, left, right, second = _moments_of(row, rows, columns, of_rows, of_columns, d, ld, PRODUCTS)
            sigma += (second - left[:, None] * (right / tl.where(other > 0, other, 1.0))[None, :]) / total
            row += width
    sigma += tl.where(rows[:, None] == columns[None, :], tl.load(settings + REGULARIZATION), 0.0)
    inside = (rows < d)[:, None] & (columns < d)[None, :]
    tl.store(covariances + component * d * d + rows[:, None] * d + columns[None, :], sigma, mask=inside)
    if tl.program_id(1) == 0:
        count, left, right, second = _moments_of(
            statistics + component * width, rows, columns, of_rows, of_columns, d, ld, PRODUCTS
        )
        old_mean = tl.load(old_means + component * d + columns, mask=columns < d, other=0)
        # First moments are about the old mean where rows are centred, about the shift otherwise.
        origin = old_mean * 0 if PRODUCTS else old_mean
        mean = tl.where(count > 0, origin + right / divisor, old_mean)
        tl.store(means + component * d + columns, mean, mask=columns < d)
        tl.store(weights + component, count / total)


@triton.jit(do_not_specialize=["d"], do_not_specialize_on_alignment=["stop"])
def _natural_kernel(
    stop,
    settings,
    scale,
    new,
    log_det,
    natural,
    d,
    ld,
    D: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Natural parameters of a component."""
    if tl.load(stop) != 0:
        return
    weights, means, covariances, factors = new
    products, constants, centres, kappa, ratio = natural
    component = tl.program_id(0).to(tl.int64)
    factor = factors + component * d * d
    columns = tl.arange(0, D)
    real = columns < d
    s = tl.load(scale + columns, mask=real, other=1)
    mean = tl.load(means + component * d + columns, mask=real, other=0)
    variance = tl.load(covariances + component * d * d + columns * (d + 1), mask=real, other=1)
    # What is not positive is flagged as singular already.
    variance = tl.where(variance > 0, variance, 1.0)
    offset = tl.where(real, mean * mean + tl.load(settings + FLOOR) / (s * s), 0.0)
    root = tl.where(real, tl.sqrt(variance + offset), 0.0)
    bound, linear, _ = whitened_sums(factor, mean, root, d, D, BLOCK)
    tl.store(kappa + component, bound)
    tl.store(ratio + component, tl.max(1 + offset / variance))
    term = constant(tl.load(weights + component), tl.load(log_det + component), d)
    if PRODUCTS:
        inside = real[:, None] & real[None, :]
        precision = tl.zeros([D, D], tl.float64)
        for column in range(0, d):
            u = tl.load(factor + columns * d + column, mask=real, other=0)
            precision += u[:, None] * u[None, :]
        out = products + component * (ld + (d * (d + 1) // 2 + 15) // 16 * 16)
        tl.store(out + columns, linear / s, mask=real)
        low, high = columns[:, None], columns[None, :]
        coefficient = tl.where(low == high, -0.5, -1.0) * precision / (s[:, None] * s[None, :])
        pair = ld + low * d - low * (low - 1) // 2 + high - low
        tl.store(out + pair, coefficient, mask=inside & (low <= high))
        term -= 0.5 * tl.sum(linear * mean)
    else:
        out = products + component * ld * ld
        for start in range(0, d, BLOCK):
            some = start + tl.arange(0, BLOCK)
            mask = real[:, None] & (some < d)[None, :]
            u = tl.load(factor + columns[:, None] * d + some[None, :], mask=mask, other=0)
            tl.store(out + columns[:, None] * ld + some[None, :], u / s[:, None], mask=mask)
        tl.store(centres + component * ld + columns, mean * s, mask=real)
    tl.store(constants + component, term)


def maximize(
    statistics: torch.Tensor,
    old: Parameters,
    new: Parameters,
    natural: Natural,
    data: Data,
    settings: Settings,
    stop: torch.Tensor,
) -> None:
    """Fills in `new` and `natural` with the M-step's for these statistics."""
    (k, d), ld = old.means.shape, data.hi.shape[1]
    tile = dict(D=padded(d), BLOCK=ROWS, PRODUCTS=not is_centred(natural.products.shape[1], ld))
    launch(
        _moments_kernel,
        (k, -(-d // ROWS)),
        *(stop, statistics, settings.tensor, data.scale, old.means, new.weights, new.means, new.covariances, k, d, ld),
        **tile,
    )
    factor(new.covariances, new.precision_cholesky, natural.log_det, natural.singular, stop)
    launch(
        _natural_kernel,
        (k,),
        *(stop, settings.tensor, data.scale, tuple(vars(new).values()), natural.log_det),
        (natural.products, natural.constants, natural.centres, natural.kappa, natural.ratio),
        *(d, ld),
        **tile,
    )
