"""The textbook in float64: loops, inverses and determinants, nothing shared with the library (Bishop 2006, ch. 9.2)."""

import numpy as np


def matrices(covariances, covariance_type, k, d):
    """The covariance of each component as a matrix: (k, d, d)."""
    covariances = np.asarray(covariances, dtype=np.float64)
    if covariance_type == "full":
        return covariances
    if covariance_type == "tied":
        return np.stack([covariances] * k)
    if covariance_type == "tied_diag":
        return np.stack([np.diag(covariances)] * k)
    if covariance_type == "diag":
        return np.stack([np.diag(row) for row in covariances])
    return np.stack([value * np.eye(d) for value in covariances])


def log_prob(x, means, sigmas):
    """Log-density of each row under each component: (n, k)."""
    x, means = np.asarray(x, dtype=np.float64), np.asarray(means, dtype=np.float64)
    out = np.empty((len(x), len(means)))
    for k, (mean, sigma) in enumerate(zip(means, sigmas, strict=True)):
        inverse = np.linalg.inv(sigma)
        _, log_determinant = np.linalg.slogdet(sigma)
        for i, row in enumerate(x):
            distance = (row - mean) @ inverse @ (row - mean)
            out[i, k] = -0.5 * (len(mean) * np.log(2 * np.pi) + log_determinant + distance)
    return out


def evidence(x, weights, means, sigmas):
    """Joint log-probabilities (n, k) and their log-sum-exp (n,)."""
    with np.errstate(divide="ignore"):
        joint = np.log(np.asarray(weights, dtype=np.float64)) + log_prob(x, means, sigmas)
    largest = joint.max(axis=1)
    return joint, largest + np.log(np.exp(joint - largest[:, None]).sum(axis=1))


def responsibilities(x, weights, means, sigmas):
    """Posterior probabilities: (n, k)."""
    joint, log_evidence = evidence(x, weights, means, sigmas)
    return np.exp(joint - log_evidence[:, None])


def statistics(x, r, sample_weight=None):
    """Counts (k,), means (k, d) and scatter matrices about those means (k, d, d), for responsibilities r (n, k)."""
    x = np.asarray(x, dtype=np.float64)
    if sample_weight is not None:
        r = r * np.asarray(sample_weight, dtype=np.float64)[:, None]
    counts = r.sum(axis=0)
    means = np.stack([sum(r[i, k] * x[i] for i in range(len(x))) / counts[k] for k in range(r.shape[1])])
    scatters = np.zeros((r.shape[1], x.shape[1], x.shape[1]))
    for k in range(r.shape[1]):
        for i in range(len(x)):
            scatters[k] += r[i, k] * np.outer(x[i] - means[k], x[i] - means[k])
    return counts, means, scatters


def maximize(counts, means, scatters, covariance_type, regularization):
    """Weights, means and covariances, the latter in the form of the covariance type."""
    d = means.shape[1]
    if covariance_type == "tied":
        covariances = scatters.sum(axis=0) / counts.sum() + regularization * np.eye(d)
    else:
        full = scatters / counts[:, None, None]
        variances = np.stack([np.diag(sigma) for sigma in full])
        covariances = {
            "full": full + regularization * np.eye(d),
            "diag": variances + regularization,
            "tied_diag": counts @ variances / counts.sum() + regularization,
            "spherical": variances.mean(axis=1) + regularization,
        }[covariance_type]
    return counts / counts.sum(), means, covariances


def em_step(x, weights, means, covariances, covariance_type, regularization=0.0, sample_weight=None):
    """One EM iteration: the new weights, means and covariances."""
    k, d = np.shape(means)
    r = responsibilities(x, weights, means, matrices(covariances, covariance_type, k, d))
    return maximize(*statistics(x, r, sample_weight), covariance_type, regularization)
