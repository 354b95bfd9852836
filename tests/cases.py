"""Data sets and starts that several tests use, as NumPy arrays."""

import numpy as np

from gaussmix._covariance import COVARIANCES

# What numerics owes: log-probabilities absolutely, in nats; parameters relatively to their largest entry.
LOG_PROB_TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
PARAMETER_TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def blobs(n=600, d=3, k=4, seed=0, spread=6.0, sort=False):
    """Rows of k Gaussian clusters of different widths: (n, d)."""
    rng = np.random.RandomState(seed)
    centres, widths = spread * rng.normal(size=(k, d)), rng.uniform(0.5, 2, size=(k, d))
    labels = np.sort(rng.randint(k, size=n)) if sort else rng.randint(k, size=n)
    return centres[labels] + widths[labels] * rng.normal(size=(n, d))


def start_for(x, k, covariance_type, seed=0):
    """Weights, means and precisions to start from: rows of x and the precision of the whole."""
    rng = np.random.RandomState(seed)
    d = x.shape[1]
    variance = float(np.var(np.asarray(x, dtype=np.float64)))
    shape = COVARIANCES[covariance_type].shape(k, d)
    identity = np.eye(d) if covariance_type in ("full", "tied") else 1.0
    precisions = np.broadcast_to(identity / variance, shape).copy()
    return {
        "weights_init": np.full(k, 1 / k),
        "means_init": np.asarray(x)[rng.choice(len(x), k, replace=False)],
        "precisions_init": precisions,
    }


def assert_close(found, expected, tolerance, what=""):
    """Largest difference, relative to the largest entry of `expected` (or 1 if that is smaller)."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape, f"{what}: shape {found.shape} instead of {expected.shape}"
    difference = np.abs(found - expected)
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    assert np.all(difference <= tolerance * scale), (
        f"{what}: off by {np.nanmax(difference) / scale:.3g} > {tolerance:g}"
    )
