"""Fused Triton kernels for Gaussian mixtures: tensors in, tensors out, nothing known of gaussmix.

`EM` runs iterations and inference for one covariance type on the rows that `prepare` has read; `TYPES` has one module
for each type. README.md beside this package says what each kernel computes and what it costs.
"""

from gaussmix_kernels._em import EM, TYPES, Progress
from gaussmix_kernels._kmeans import nearest, squared_distances, sums
from gaussmix_kernels._parameters import (
    CONVERGED,
    HALVES_EPS,
    HALVES_LEAST,
    INEXACT,
    NOT_FINITE,
    RUNNING,
    SINGULAR,
    Parameters,
    Settings,
)
from gaussmix_kernels._prepass import Data, prepare

__all__ = [
    "CONVERGED",
    "EM",
    "HALVES_EPS",
    "HALVES_LEAST",
    "INEXACT",
    "NOT_FINITE",
    "RUNNING",
    "SINGULAR",
    "TYPES",
    "Data",
    "Parameters",
    "Progress",
    "Settings",
    "nearest",
    "prepare",
    "squared_distances",
    "sums",
]
