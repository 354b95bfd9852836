"""One covariance matrix for all components: phi = x'.

The term -(x - shift)^T A (x - shift) / 2 is the same for all components. It cancels in the responsibilities; its sum
over the rows is a trace of A and the total scatter of the data, which is computed once.
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
from gaussmix_kernels._sizes import SCATTER_ROWS, padded

# Rows of the covariance that a program computes.
ROWS = 16

# What its log-density is linear in, beside x and 1.
QUADRATIC = "none"


def shape(k: int, d: int) -> tuple[int, ...]:
    """Shape of the stored covariances."""
    return (d, d)


def fill(natural: Natural, density: Density, data: Data) -> None:
    """Natural parameters in the features of `data`, where EM starts and for inference."""
    d, cholesky = density.means.shape[1], density.precision_cholesky
    precision = cholesky @ cholesky.T
    linear = density.means @ precision
    natural.products[:, :d] = linear / data.scale
    natural.constants.copy_(density.log_offsets - 0.5 * (linear * density.means).sum(dim=1))
    natural.shared[0] = -0.5 * (precision * data.scatter).sum() / data.total


def shared_log_density(density: Density, data: Data) -> torch.Tensor:
    """What all components share of the log-density of each row: (n,), or a number."""
    factor = density.precision_cholesky / data.scale[:, None]
    out = torch.empty(data.shape[0], dtype=torch.float64, device=data.hi.device)
    for start in range(0, data.shape[0], SCATTER_ROWS):
        rows = slice(start, start + SCATTER_ROWS)
        out[rows] = -0.5 * (data.rows(rows) @ factor).square().sum(dim=1)
    return out


def moments(statistics: torch.Tensor, data: Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts, first and second moments, in the units of the data and of its weights."""
    d, ld = data.shape[1], data.hi.shape[1]
    statistics = statistics * data.unit
    return statistics[:, ld], statistics[:, :d] / data.scale, data.scatter * data.gain


@triton.jit(do_not_specialize=["k", "d"], do_not_specialize_on_alignment=["stop"])
def _covariance_kernel(
    stop, statistics, settings, scale, scatter, covariance, k, d, ld, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Some rows of the covariance that all components share: the total scatter less that of the means."""
    if tl.load(stop) != 0:
        return
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    at = rows[:, None] * d + columns[None, :]
    inside = (rows < d)[:, None] & (columns < d)[None, :]
    of_rows = tl.load(scale + rows, mask=rows < d, other=1)
    of_columns = tl.load(scale + columns, mask=columns < d, other=1)
    total = sum_of_counts(statistics + ld, ld + 2, k, 128)
    sigma = tl.load(scatter + at, mask=inside, other=0) / tl.load(settings)
    row = statistics
    for _ in range(0, k):
        count = tl.load(row + ld)
        divisor = tl.where(count > 0, count, 1.0)
        left = tl.load(row + rows, mask=rows < d, other=0) / (divisor * of_rows)
        right = tl.load(row + columns, mask=columns < d, other=0) / (divisor * of_columns)
        sigma -= (count / total * left)[:, None] * right[None, :]
        row += ld + 2
    sigma += tl.where(rows[:, None] == columns[None, :], tl.load(settings + REGULARIZATION), 0.0)
    tl.store(covariance + at, sigma, mask=inside)


@triton.jit(do_not_specialize=["k", "d"], do_not_specialize_on_alignment=["stop"])
def _means_kernel(
    stop,
    statistics,
    settings,
    scale,
    old_means,
    new,
    log_det,
    natural,
    k,
    d,
    ld,
    D: tl.constexpr,
):
    """Weight, mean and natural parameters of a component."""
    if tl.load(stop) != 0:
        return
    weights, means, covariance, factor = new
    products, constants, shared, kappa, ratio = natural
    component = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    real = columns < d
    s = tl.load(scale + columns, mask=real, other=1)
    own = statistics + component * (ld + 2)
    count = tl.load(own + ld)
    mean = tl.load(own + columns, mask=real, other=0) / (tl.where(count > 0, count, 1.0) * s)
    mean = tl.where(count > 0, mean, tl.load(old_means + component * d + columns, mask=real, other=0))
    weight = count / sum_of_counts(statistics + ld, ld + 2, k, 128)
    variance = tl.load(covariance + columns * (d + 1), mask=real, other=1)
    # What is not positive is flagged as singular already.
    variance = tl.where(variance > 0, variance, 1.0)
    offset = tl.where(real, mean * mean + tl.load(settings + FLOOR) / (s * s), 0.0)
    bound, linear, trace = whitened_sums(factor, mean, tl.where(real, tl.sqrt(variance + offset), 0.0), d, D, 16)
    square = tl.sum(linear * mean)

    tl.store(weights + component, weight)
    tl.store(means + component * d + columns, mean, mask=real)
    tl.store(products + component * ld + columns, linear / s, mask=real)
    tl.store(constants + component, constant(weight, tl.load(log_det), d) - 0.5 * square)
    tl.store(kappa + component, bound)
    tl.store(ratio + component, tl.max(1 + offset / variance))
    # tr(A T) / n = tr(A Sigma) - reg_covar tr(A) + sum_k pi_k mu_k^T A mu_k, and A Sigma is the identity.
    once = tl.where(component == 0, d - tl.load(settings + REGULARIZATION) * trace, 0.0)
    tl.store(shared + component, -0.5 * (once + weight * square))


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
    launch(
        _covariance_kernel,
        (-(-d // ROWS),),
        *(stop, statistics, settings.tensor, data.scale, data.scatter, new.covariances, k, d, ld),
        D=padded(d),
        BLOCK=ROWS,
    )
    factor(new.covariances[None], new.precision_cholesky[None], natural.log_det, natural.singular, stop)
    launch(
        _means_kernel,
        (k,),
        *(stop, statistics, settings.tensor, data.scale, old.means, tuple(vars(new).values()), natural.log_det),
        (natural.products, natural.constants, natural.shared, natural.kappa, natural.ratio),
        *(k, d, ld),
        D=padded(d),
    )
