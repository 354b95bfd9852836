"""What numerics owes on hard data: log-probabilities against 80-bit arithmetic."""

import numpy as np
import pytest

from cases import LOG_PROB_TOLERANCE
from gaussmix import GaussianMixture
from gaussmix._arrays import to_numpy

D, K = 8, 4


def truth(x, weights, means, sigmas):
    """Log-likelihood of each row by a Cholesky factorisation in extended precision: (n,)."""
    x, weights, means, sigmas = (np.asarray(a, dtype=np.longdouble) for a in (x, weights, means, sigmas))
    joint = np.empty((len(x), len(means)), dtype=np.longdouble)
    for k, (mean, sigma) in enumerate(zip(means, sigmas, strict=True)):
        lower = np.zeros_like(sigma)
        for i in range(len(sigma)):
            for j in range(i + 1):
                rest = sigma[i, j] - (lower[i, :j] * lower[j, :j]).sum()
                lower[i, j] = np.sqrt(rest) if i == j else rest / lower[j, j]
        whitened = np.zeros_like(x)
        for i in range(len(sigma)):
            whitened[:, i] = (x[:, i] - mean[i] - whitened[:, :i] @ lower[i, :i]) / lower[i, i]
        log_determinant = 2 * np.log(np.diag(lower)).sum()
        constant = len(mean) * np.log(2 * np.longdouble(np.pi)) + log_determinant
        joint[:, k] = np.log(weights[k]) - 0.5 * (constant + (whitened**2).sum(axis=1))
    largest = joint.max(axis=1)
    return largest + np.log(np.exp(joint - largest[:, None]).sum(axis=1))


def hard_case(name, shared):
    """Means and covariance matrices of the table of hard cases, one or several, and rows drawn from them."""
    rng = np.random.RandomState(0)
    means, scales, condition = 3 * rng.normal(size=(K, D)), np.ones(D), 10.0
    if name == "offset 1e6":
        means += 1e6
    elif name == "1e4 widths apart":
        means *= 1e4
    elif name.startswith("condition"):
        condition = float(name.split()[1])
    elif name == "feature scales 1e-4 .. 1e4":
        scales = np.geomspace(1e-4, 1e4, D)
    factors = [np.linalg.qr(rng.normal(size=(D, D)))[0] * np.geomspace(1, condition**-0.5, D) for _ in range(K)]
    factors = factors[:1] * K if shared else factors
    means = means * scales
    sigmas = np.stack([scales[:, None] * (f @ f.T) * scales for f in factors])
    x = np.concatenate([m + (rng.normal(size=(50, D)) @ f.T) * scales for m, f in zip(means, factors, strict=True)])
    return means, sigmas, x


CASES = ["benign", "offset 1e6", "1e4 widths apart", "condition 1e6", "condition 1e10", "feature scales 1e-4 .. 1e4"]
# Parameters rounded to float32 describe another mixture where its condition is beyond float32.
BEYOND_FLOAT32 = ("condition 1e6", "condition 1e10")


@pytest.mark.parametrize("name", CASES)
def test_log_prob_on_hard_data(library, covariance, dtype, name):
    means, sigmas, x = hard_case(name, shared=covariance.shares_moments)
    stored = {
        "full": sigmas,
        "tied": sigmas[0],
        "diag": np.stack([np.diag(sigma) for sigma in sigmas]),
        "tied_diag": np.diag(sigmas[0]),
        "spherical": np.stack([np.diag(sigma).mean() for sigma in sigmas]),
    }[covariance.name].astype(dtype)
    if dtype == "float32" and name in BEYOND_FLOAT32 and covariance.has_matrices:
        pytest.skip("these matrices are not positive definite, or others, once rounded to float32")
    x, means = x.astype(dtype), means.astype(dtype)
    weights = np.full(K, 1 / K)
    full = {
        "full": lambda: stored,
        "tied": lambda: np.stack([stored] * K),
        "diag": lambda: np.stack([np.diag(v) for v in stored]),
        "tied_diag": lambda: np.stack([np.diag(stored)] * K),
        "spherical": lambda: np.stack([v * np.eye(D) for v in stored]),
    }[covariance.name]()
    expected = truth(x, weights, means, full)
    mixture = GaussianMixture.from_parameters(
        *(library.asarray(a, dtype) for a in (weights, means, stored)), covariance_type=covariance.name
    )
    found = -to_numpy(mixture.score_samples(library.asarray(x))).astype(np.float64)
    tolerance = LOG_PROB_TOLERANCE[dtype]
    if dtype == "float64" and name != "benign":
        tolerance = 1e-5
    # The output has no more digits than its dtype.
    resolution = np.spacing(np.abs(expected).astype(dtype)).astype(np.float64)
    assert np.all(np.abs(found - expected.astype(np.float64)) <= tolerance + resolution)


@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_eigenvalues_over_ten_orders_fit_or_say_why_not(library, dtype, covariance_type):
    d = 64
    rng = np.random.RandomState(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(d, d)))
    x = (rng.normal(size=(1000, d)) * np.geomspace(1, 1e-5, d)) @ rotation.T
    data = library.asarray(x, dtype)
    mixture = GaussianMixture(1, covariance_type=covariance_type, covariance_regularization=0.0, random_state=0)
    mixture.fit(data)
    exact = np.cov(x.T, bias=True)
    _, log_determinant = np.linalg.slogdet(exact)
    expected = 0.5 * (d * np.log(2 * np.pi) + log_determinant + d)
    # float32 rounds the data itself: 1e-7 of the widest direction is wider than the narrowest.
    assert abs(mixture.nll_ - expected) < (1e-5 if dtype == "float64" else 0.5 * d)
