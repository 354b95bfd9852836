"""Fused Triton kernels for Gaussian mixtures: tensors in, tensors out, nothing known of gaussmix.

`EM` runs iterations and inference for one covariance type on the rows that `prepare` has read; `type_of` finds the
module of each type. README.md beside this package says what each kernel computes and what it costs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gaussmix_kernels._public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """What `_public` has; loaded with the first use, because `gaussmix` reads `_sizes` where there is no torch."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("gaussmix_kernels._public"), name)
