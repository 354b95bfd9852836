"""Gaussian mixture models by EM on NumPy, torch, JAX and CuPy arrays."""

import logging
from typing import TYPE_CHECKING, Any

from gaussmix._estimate import Estimate, estimate
from gaussmix._kmeans import KMeans
from gaussmix._mixture import GaussianMixture

if TYPE_CHECKING:
    from gaussmix.torch import GaussianMixtureModel, GaussianMixtureModelConfig

__version__ = "0.1.0"
__all__ = [
    "Estimate",
    "GaussianMixture",
    "GaussianMixtureModel",
    "GaussianMixtureModelConfig",
    "KMeans",
    "__version__",
    "estimate",
    "set_logging_level",
]


def __getattr__(name: str) -> Any:
    # What needs torch is imported when it is asked for.
    if name in ("GaussianMixtureModel", "GaussianMixtureModelConfig"):
        try:
            from gaussmix import torch
        except ImportError as error:
            raise ImportError(f"gaussmix.{name} needs torch; install gaussmix[torch]") from error
        return getattr(torch, name)
    raise AttributeError(f"module 'gaussmix' has no attribute {name!r}")


def set_logging_level(level: int | str) -> None:
    """Set the level of the library's logger.

    Parameters
    ----------
    level : int or str
        As `logging.Logger.setLevel` takes it: `logging.INFO` says which implementation ran, and why, and shows progress
        bars unless `trainer_params` has `enable_progress_bar=False`.
    """
    logging.getLogger("gaussmix").setLevel(level)
