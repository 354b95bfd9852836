"""Which implementation runs for given data, and why."""

import logging
import os

from gaussmix import _array_api
from gaussmix._covariance import Covariance
from gaussmix._data import Rows
from gaussmix._engine import Engine

logger = logging.getLogger("gaussmix")

BACKENDS = ("auto", "array_api")


def engine(rows: Rows, covariance: Covariance, reg_covar: float = 0.0) -> Engine:
    """The implementation for these rows, as the environment variable GAUSSMIX_BACKEND has it."""
    backend = os.environ.get("GAUSSMIX_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"GAUSSMIX_BACKEND={backend!r} is not a backend of this version; set one of {BACKENDS}")
    chosen = _array_api.Engine(rows, covariance, reg_covar)
    logger.debug("%s covariance on %s, %s", covariance.name, chosen.backend, chosen.precision)
    return chosen
