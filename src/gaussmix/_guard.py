"""The guard: which arithmetic an E-step may have, so that what it loses stays below what numerics owe.

Features about a point lose digits where components lie far from it compared with their width, or are ill-conditioned.
`Covariance.kappa` bounds the loss of a log-density, the ratio of variance + offset^2 to variance that of a variance. A
form is left for the next, more exact one where either exceeds what it allows. The rule is the same on a CPU and on a
GPU, where a kernel applies it between two iterations.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gaussmix._arrays import array_namespace, asarray_like, to_numpy
from gaussmix._density import Density
from gaussmix._parameters import CENTRED_PRECISION
from gaussmix._typing import Array

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
# Largest tolerable error of a log-density, in nats, for float32 and float64 data.
TOLERANCE = {FLOAT32: 1e-3, FLOAT64: 1e-10}
# Largest tolerable eps (variance + offset^2) / variance: the relative error of a variance comes out as up to twice
# that, as BLAS sums (AVX-512 kernels lose half as much as those of AVX2), and 1e-4 and 1e-9 are owed. kappa alone lets
# a single feature lose more.
VARIANCE_TOLERANCE = {FLOAT32: 5e-5, FLOAT64: 1e-9}
# Of the numbers of a dtype, natural parameters may reach this part: their products with features need the rest.
ROOM = 1e-6


@dataclass(frozen=True)
class Form:
    """The arithmetic of an E-step, and what it is exact enough for."""

    precision: str  # its name, which estimators publish
    features: str = "centred"  # what is multiplied: x - mu_k, or features of x about one point
    exact: bool = True  # whether products and sums are in float64
    most_kappa: float = math.inf
    most_ratio: float = math.inf  # of variance + offset^2 to variance
    largest: float = math.inf  # natural parameter that there is room for
    has_kernels: bool = False  # whether GPU kernels compute it
    least_weight: float = 0.0  # of a component that had more: below, it might live on responsibilities that are lost

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of products and sums on a CPU."""
        return FLOAT64 if self.exact else FLOAT32

    @classmethod
    def expanded(cls, precision: str, features: str, eps: float, dtype: np.dtype[Any], **more: Any) -> "Form":
        """Features about one point in an arithmetic of this rounding unit, for data of this dtype."""
        exact = eps < 1e-12
        return cls(precision, features, exact, TOLERANCE[dtype] / eps, VARIANCE_TOLERANCE[dtype] / eps, **more)


# Exact for all parameters: x - mu_k is formed in float64 before anything is multiplied.
CENTRED = Form(CENTRED_PRECISION)

# The forms that are left, the one in use first, the most exact last.
Forms = tuple[Form, ...]


def choose(
    forms: Forms,
    density: Density,
    shift: Array,
    floor: Array | None = None,
    weights: tuple[Array, Array] | None = None,
) -> tuple[Forms, str]:
    """The forms from the first on that is exact enough for the density, and what it was left for.

    `shift` (d,) is the point that features are about; squares of x - shift below `floor` (d,), if any, are as inexact
    as that where a form is not exact. `weights` are those before and after an M-step. What is computed is computed
    where the density is; four numbers of each form come to the host.
    """
    if len(forms) == 1:
        return forms, ""
    xp, covariance = array_namespace(density.means), density.covariance
    density = density.mapped(lambda value: xp.astype(value, xp.float64, copy=False))
    alive, variances = density.is_alive, covariance.variances(density.covariances)
    centred = density.means - asarray_like(shift, density.means)
    floor = None if floor is None else asarray_like(floor, density.means)
    reason = ""
    for i, form in enumerate(forms[:-1]):
        is_rounded = not form.exact and floor is not None
        offsets = xp.sqrt(centred * centred + floor) if is_rounded else centred
        kappas = covariance.kappa(density.covariances, density.precision_cholesky, offsets)
        ratios = xp.where(alive[:, None], offsets * offsets / variances, 0.0)
        found = (xp.max(xp.where(alive, kappas, 0.0)), xp.max(ratios), xp.max(kappas), xp.min(variances))
        kappa, ratio, most, least = map(float, to_numpy(xp.stack(found)))
        ratio += 1
        # |A_ij| sqrt(m_i m_j) is at most kappa, with m no smaller than the variances.
        largest = most / min(1.0, least)
        lost = form.least_weight > 0 and weights is not None and _lost(*weights, form.least_weight)
        if kappa <= form.most_kappa and ratio <= form.most_ratio and largest <= form.largest and not lost:
            return forms[i:], reason
        reason = (
            f"kappa is {kappa:.3g}, (variance + offset^2) / variance {ratio:.3g}, precisions reach up to {largest:.3g}"
        )
    return forms[-1:], reason


def _lost(before: Array, after: Array, least: float) -> bool:
    """Whether a component's weight fell below the least."""
    return bool(array_namespace(after).any((asarray_like(before, after) > 0) & (after < least)))
