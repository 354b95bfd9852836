"""What the tests of the kernels share: tensors of any layout, mixtures, and sums in NumPy."""

import numpy as np
import torch

import gaussmix_kernels as kernels
import oracle
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._objective import density_of
from gaussmix._parameters import Parameters
from gaussmix.backends import _array_api
from gaussmix.rows._data import Rows
from gaussmix_kernels._launch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
LAYOUTS = ("C", "F", "rows", "columns")
# Covariance types and the kinds of features that they know.
KINDS = [("tied", "none"), ("spherical", "norm"), ("diag", "squares"), ("full", "products"), ("full", "centred")]
EXPANDED = KINDS[:4]
# What kernels owe: sums and parameters relatively to the largest, log-densities in nats.
SUMS_TOLERANCE = {False: 2e-5, True: 1e-11}
EVIDENCE_TOLERANCE = {False: 2e-4, True: 1e-10}


def toward_zero(x):
    """Float64 numbers as float32, none of them larger."""
    rounded = x.astype(np.float32)
    return np.where(np.abs(rounded) > np.abs(x), np.nextafter(rounded, np.float32(0)), rounded)


def truncate_sums(monkeypatch):
    """Lets the interpreter add as tensor cores do: exact products of 16 at a time, each sum cut off to float32."""
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def truncating(self, a, b, d, *options):
        if d.data.dtype != np.float32:
            return create_dot(self, a, b, d, *options)
        total = d.data
        for start in range(0, a.data.shape[1], 16):
            left, right = a.data[:, start : start + 16], b.data[start : start + 16]
            total = toward_zero(total.astype(np.float64) + left.astype(np.float64) @ right.astype(np.float64))
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", truncating)


def tensor(x, layout="C", dtype=None):
    """A tensor of these values: C or F order, or every second row or column of a larger one."""
    x = torch.as_tensor(np.asarray(x), device=DEVICE)
    x = x if dtype is None else x.to(dtype)
    if layout == "C":
        return x
    if layout == "F":
        return x.T.contiguous().T
    n, d = x.shape
    wide = torch.full((2 * n, d) if layout == "rows" else (n, 2 * d), 77, dtype=x.dtype, device=DEVICE)
    view = wide[::2] if layout == "rows" else wide[:, ::2]
    view.copy_(x)
    return view


def mixture(x, k, covariance_type, seed=0):
    """A mixture of different components on rows of x, in float64."""
    rng, covariance = np.random.RandomState(seed), COVARIANCES[covariance_type]
    n, d = x.shape
    shape = covariance.shape(k, d)
    if covariance_type in ("full", "tied"):
        factor = 2 * np.eye(d) + 0.5 / np.sqrt(d) * rng.normal(size=shape)
        covariances = factor @ np.swapaxes(factor, -1, -2)
    else:
        covariances = rng.uniform(2, 6, size=shape)
    means = np.asarray(x, dtype=np.float64)[rng.randint(n, size=k)] + rng.normal(size=(k, d))
    return Parameters(rng.dirichlet(np.full(k, 5.0)), means, covariances, covariance.precision_cholesky(covariances))


def rows(n, d, *, seed=0, weighted=False, offset=3.0):
    """Rows in general position, in float32's numbers, and their weights."""
    rng = np.random.RandomState(seed)
    x = (offset + 3 * rng.normal(size=(n, d)) * np.exp(rng.uniform(-1, 1, size=d))).astype(np.float32)
    weight = rng.uniform(0, 3, size=n) * (np.arange(n) % 5 != 1) if weighted and n > 1 else None
    return x.astype(np.float64), weight


def prepare(x, weight=None, *, exact, layout="C", shift=None):
    weight = None if weight is None else tensor(weight)
    return kernels.prepare(tensor(x, layout), weight, None if shift is None else tensor(shift), exact=exact)


def local(parameters, data):
    """Parameters as the kernels have them: tensors, means about the shift."""
    there = parameters.mapped(tensor)
    return kernels.Parameters(
        there.weights.clone(), there.means - data.shift, there.covariances.clone(), there.precision_cholesky.clone()
    )


def density(parameters, covariance_type):
    """What an E-step reads of the kernels' parameters: log pi + log det U - d log(2 pi) / 2, in NumPy."""
    weights, means, factors = (
        to_numpy(getattr(parameters, name)) for name in ("weights", "means", "precision_cholesky")
    )
    d, matrices = means.shape[1], oracle.matrices(factors, covariance_type, *means.shape)
    log_det = np.array([np.log(np.diag(matrix)).sum() for matrix in matrices])
    log_weights = np.where(weights > 0, np.log(np.where(weights > 0, weights, 1)), -1e30)
    offsets = log_weights + log_det - 0.5 * d * np.log(2 * np.pi)
    return kernels.Density(tensor(offsets), parameters.means, parameters.precision_cholesky)


def responsibilities(x, parameters, covariance_type):
    return _array_api.Block(Rows(x)).responsibilities(density_of(parameters, COVARIANCES[covariance_type]))


def log_evidence(x, parameters, covariance_type):
    return _array_api.Block(Rows(x)).log_evidence(density_of(parameters, COVARIANCES[covariance_type]))


def sums_about(x, r, weight, origin, covariance_type):
    """Counts, first and second moments about `origin` (k, d), in NumPy."""
    weighted_r = r if weight is None else r * weight[:, None]
    centred = x[None] - origin[:, None]
    weighted = weighted_r.T[:, :, None] * centred
    return weighted_r.sum(axis=0), weighted.sum(axis=1), COVARIANCES[covariance_type].second_moments(weighted, centred)


def origin_of(data, parameters, kind):
    """What moments are about: (k, d)."""
    if kind == "centred":
        return parameters.means
    return np.broadcast_to(to_numpy(data.shift), parameters.means.shape)
