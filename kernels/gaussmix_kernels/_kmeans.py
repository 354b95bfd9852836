"""k-means: the nearest centroid of each row, and sums over the rows of each cluster.

The nearest centroid is the component of largest logit c_k . x - |c_k|^2 / 2: |x|^2 is the same for all. The sums are
those of EM's kernel with responsibilities of 0 and 1.
"""

import torch

from gaussmix_kernels._features import Step
from gaussmix_kernels._parameters import LOG_2, Natural, fill_operands, room_for_operands
from gaussmix_kernels._prepass import Data

# Rows at a time whose offsets from a centroid are formed.
ROWS = 2**18


def nearest(data: Data, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest of `centroids` (k, d), offsets from the shift in float64, to each row: (n,), int32."""
    (k, d), step = centroids.shape, Step.of(data, "none")
    natural = Natural.of(k, data, "none")
    natural.products[:, :d] = centroids / data.scale
    natural.constants.copy_(-0.5 * centroids.square().sum(dim=1))
    operands = room_for_operands(natural, data)
    fill_operands(
        operands,
        natural,
        torch.full((1,), 1 / LOG_2, dtype=torch.float64, device=centroids.device),
        data.exact,
        step.never,
    )
    return step.labels(operands)


def sums(data: Data, labels: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted number of rows of each label (k,) and sum of their offsets from the shift (k, d), in float64."""
    step = Step.of(data, "none")
    statistics = step.assign(labels, k) * data.unit
    return statistics[:, step.features.width], statistics[:, : data.shape[1]] / data.scale


def squared_distances(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared distance of each row of x (n, d) to the centroid of its label, of (k, d), in float64: (n,)."""
    out = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        out[rows] = (x[rows].to(torch.float64) - centroids[labels[rows]]).square().sum(dim=1)
    return out
