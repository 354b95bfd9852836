"""Hypothesis strategies: mixtures and data."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gaussmix._covariance import COVARIANCES


@dataclass
class Case:
    """A mixture and rows, as NumPy arrays of one dtype."""

    covariance_type: str
    dtype: str
    weights: Any
    means: Any
    covariances: Any
    x: Any
    sample_weight: Any


TYPES = tuple(sorted(COVARIANCES))


def floats(shape, low, high):
    return arrays(np.float64, shape, elements=st.floats(low, high, width=32))


@st.composite
def cases(draw, max_n=24, max_d=5, max_k=4, dtypes=("float32", "float64"), min_extra=0, covariance_types=TYPES):
    """Mixtures of moderate condition; rows around their means. `min_extra` rows more than k (d + 1)."""
    covariance_type = draw(st.sampled_from(covariance_types))
    dtype = draw(st.sampled_from(dtypes))
    d, k = draw(st.integers(1, max_d)), draw(st.integers(1, max_k))
    n = draw(st.integers(max(2, k, min_extra and k * (d + 1) + min_extra), max(max_n, k * (d + 1) + min_extra)))
    shape = COVARIANCES[covariance_type].shape(k, d)
    if COVARIANCES[covariance_type].has_matrices:
        lower = np.tril(draw(floats(shape, -1, 1)), -1) + draw(floats((*shape[:-1], 1), 0.5, 2)) * np.eye(d)
        covariances = lower @ np.swapaxes(lower, -1, -2)
    else:
        covariances = draw(floats(shape, 0.25, 4))
    raw = draw(floats(k, 0.0625, 1))
    means = draw(floats((k, d), -5, 5))
    centre = means[draw(arrays(np.int64, n, elements=st.integers(0, k - 1)))]
    # Hypothesis likes repeated values; the noise of a seed keeps rows in general position.
    noise = np.random.RandomState(draw(st.integers(0, 2**31))).normal(size=(n, d))
    x = centre + draw(st.floats(0.1, 3)) * noise
    sample_weight = draw(st.none() | floats(n, 0.0625, 4))
    arrays_ = [np.asarray(a, dtype=dtype) for a in (raw / raw.sum(), means, covariances, x)]
    return Case(covariance_type, dtype, *arrays_, sample_weight)
