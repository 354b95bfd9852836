"""Which implementation runs for given data, and why."""

import logging
import os

from gaussmix import _array_api, _numpy
from gaussmix._covariance import Covariance
from gaussmix._data import Rows
from gaussmix._engine import Clusters, Engine
from gaussmix._typing import Array

logger = logging.getLogger("gaussmix")

BACKENDS = ("auto", "numpy", "array_api")


def engine(rows: Rows, covariance: Covariance, reg_covar: float = 0.0) -> Engine:
    """The implementation for these rows, as the environment variable GAUSSMIX_BACKEND has it."""
    name, reason = choose(rows.array)
    logger.debug("%s covariance runs on %s: %s", covariance.name, name, reason)
    implementation = _numpy.Engine if name == "numpy" else _array_api.Engine
    return implementation(rows, covariance, reg_covar)


def clusters(rows: Rows) -> Clusters:
    """The implementation of k-means for these rows, chosen as `engine` does."""
    name, reason = choose(rows.array)
    logger.debug("k-means runs on %s: %s", name, reason)
    return _numpy.Clusters(rows) if name == "numpy" else _array_api.Clusters(rows)


def choose(x: Array) -> tuple[str, str]:
    """The name of the implementation for rows of `x`, and the reason."""
    forced = os.environ.get("GAUSSMIX_BACKEND", "auto")
    if forced not in BACKENDS:
        raise ValueError(f"GAUSSMIX_BACKEND={forced!r} is not a backend of this version; set one of {BACKENDS}")
    obstacle = _numpy.why_not(x)
    if forced == "array_api":
        return forced, "GAUSSMIX_BACKEND asks for it"
    if obstacle is None:
        return "numpy", "the data is in host memory"
    if forced == "numpy":
        raise ValueError(f"GAUSSMIX_BACKEND=numpy can not run: {obstacle}; unset it or convert the data")
    return "array_api", obstacle
