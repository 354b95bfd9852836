"""What the package offers: loads torch and triton."""

from gaussmix_kernels._em import EM, Progress, type_of
from gaussmix_kernels._kmeans import nearest, squared_distances, sums
from gaussmix_kernels._parameters import (
    CONVERGED,
    HALVES_EPS,
    HALVES_LEAST,
    INEXACT,
    NOT_FINITE,
    RUNNING,
    SINGULAR,
    Density,
    Parameters,
    Settings,
)
from gaussmix_kernels._prepass import Data, prepare
from gaussmix_kernels._sizes import kinds

__all__ = [
    "CONVERGED",
    "EM",
    "HALVES_EPS",
    "HALVES_LEAST",
    "INEXACT",
    "NOT_FINITE",
    "RUNNING",
    "SINGULAR",
    "Data",
    "Density",
    "Parameters",
    "Progress",
    "Settings",
    "kinds",
    "nearest",
    "prepare",
    "squared_distances",
    "sums",
    "type_of",
]
