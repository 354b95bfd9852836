"""One variance for each component: phi = (x', |x - shift|^2)."""

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
    sum_of_counts,
)
from gaussmix_kernels._prepass import Data
from gaussmix_kernels._sizes import padded

# What its log-density is linear in, beside x and 1.
QUADRATIC = "norm"


def shape(k: int, d: int) -> tuple[int, ...]:
    """Shape of the stored covariances."""
    return (k,)


def fill(natural: Natural, density: Density, data: Data) -> None:
    """Natural parameters in the features of `data`, where EM starts and for inference."""
    d = density.means.shape[1]
    precisions = density.precision_cholesky**2
    linear = precisions[:, None] * density.means
    natural.products[:, :d] = linear / data.scale
    natural.slopes.copy_(-0.5 * precisions)
    natural.constants.copy_(density.log_offsets - 0.5 * (linear * density.means).sum(dim=1))


def shared_log_density(density: Density, data: Data) -> float:
    """What all components share of the log-density of each row: (n,), or a number."""
    return 0.0


def moments(statistics: torch.Tensor, data: Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts, first and second moments, in the units of the data and of its weights."""
    d, ld = data.shape[1], data.hi.shape[1]
    statistics = statistics * data.unit
    return statistics[:, ld], statistics[:, :d] / data.scale, statistics[:, ld + 1]


@triton.jit(do_not_specialize=["k", "d"], do_not_specialize_on_alignment=["stop"])
def _maximize_kernel(
    stop,
    statistics,
    settings,
    scale,
    old_means,
    new,
    natural,
    k,
    d,
    ld,
    D: tl.constexpr,
):
    """The M-step of a component, and its natural parameters."""
    if tl.load(stop) != 0:
        return
    weights, means, covariances, factors = new
    products, constants, slopes, kappa, ratio, singular = natural
    component = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    real = columns < d
    s = tl.load(scale + columns, mask=real, other=1)
    total = sum_of_counts(statistics + ld, ld + 2, k, 128)
    own = statistics + component * (ld + 2)
    count = tl.load(own + ld)
    divisor = tl.where(count > 0, count, 1.0)
    mean = tl.load(own + columns, mask=real, other=0) / (divisor * s)
    variance = (tl.load(own + ld + 1) / divisor - tl.sum(mean * mean)) / d
    if count <= 0:
        # Without rows it says nothing about its own spread: it gets the pooled one, and keeps its place.
        pooled = tl.load(own + ld + 1) * 0
        row = statistics
        for _ in range(0, k):
            n_other = tl.load(row + ld)
            first = tl.load(row + columns, mask=real, other=0) / s
            pooled += tl.load(row + ld + 1) - tl.sum(first * first) / tl.where(n_other > 0, n_other, 1.0)
            row += ld + 2
        variance = pooled / (total * d)
        mean = tl.load(old_means + component * d + columns, mask=real, other=0)
    variance += tl.load(settings + REGULARIZATION)
    positive = variance > 0
    tl.store(singular + component, tl.where(positive, 0, 1))
    variance = tl.where(positive, variance, 1.0)
    precision = 1 / variance
    factor = tl.sqrt(precision)
    weight = count / total
    square = precision * tl.sum(mean * mean)

    tl.store(weights + component, weight)
    tl.store(means + component * d + columns, mean, mask=real)
    tl.store(covariances + component, variance)
    tl.store(factors + component, factor)
    tl.store(products + component * ld + columns, precision * mean / s, mask=real)
    tl.store(slopes + component, -0.5 * precision)
    tl.store(constants + component, constant(weight, d * tl.log(factor), d) - 0.5 * square)
    offset = tl.where(real, mean * mean + tl.load(settings + FLOOR) / (s * s), 0.0)
    tl.store(kappa + component, d + precision * tl.sum(offset))
    tl.store(ratio + component, 1 + precision * tl.max(offset))


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
    k, d = old.means.shape
    launch(
        _maximize_kernel,
        (k,),
        *(stop, statistics, settings.tensor, data.scale, old.means, tuple(vars(new).values())),
        (natural.products, natural.constants, natural.slopes, natural.kappa, natural.ratio, natural.singular),
        *(k, d, data.hi.shape[1]),
        D=padded(d),
    )
