"""Gaussian mixture models by EM on NumPy, CuPy and torch arrays."""

import logging

from gaussmix._estimate import Estimate, estimate
from gaussmix._kmeans import KMeans
from gaussmix._mixture import GaussianMixture

__version__ = "0.1.0"
__all__ = ["Estimate", "GaussianMixture", "KMeans", "__version__", "estimate", "set_logging_level"]


def set_logging_level(level: int | str) -> None:
    """Set the level of the library's logger.

    Parameters
    ----------
    level : int or str
        As `logging.Logger.setLevel` takes it: `logging.INFO` says which implementation ran, and why.
    """
    logging.getLogger("gaussmix").setLevel(level)
