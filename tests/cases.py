"""Data sets and starts that several tests use, as NumPy arrays."""

import numpy as np

from gaussmix._covariance import COVARIANCES
from gaussmix._em import EMResult, run_em
from gaussmix._objective import MaximumLikelihood
from gaussmix.backends._engine import Engine
from gaussmix.rows._passes import InMemory

# What numerics owes: log-probabilities absolutely, in nats; parameters relatively to their largest entry.
LOG_PROB_TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
PARAMETER_TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def blobs(n=600, d=3, k=4, seed=0, spread=6.0, sort=False):
    """Rows of k Gaussian clusters of different widths: (n, d)."""
    rng = np.random.RandomState(seed)
    centres, widths = spread * rng.normal(size=(k, d)), rng.uniform(0.5, 2, size=(k, d))
    labels = np.sort(rng.randint(k, size=n)) if sort else rng.randint(k, size=n)
    return centres[labels] + widths[labels] * rng.normal(size=(n, d))


class OnRows:
    """Maximum likelihood on rows in memory, by the implementation of a module: what tests ask with parameters."""

    def __init__(self, module, rows, covariance, reg_covar=1e-6, form=None):
        self.block, self.objective = module.Block(rows), MaximumLikelihood(covariance, reg_covar)
        self.engine = Engine(self.block.rows, InMemory(self.block), self.block, covariance)
        self.form = self.engine.forms[0] if form is None else form

    def expect(self, parameters):
        return self.block.expect(self.objective.density(parameters), self.form)

    def step(self, parameters):
        return self.objective.maximize(self.expect(parameters), parameters.means)

    def start(self, means):
        statistics = self.block.assign(means, means, self.objective.covariance, self.form)
        return self.objective.maximize(statistics, means)

    def log_evidence(self, parameters):
        return self.block.log_evidence(self.objective.density(parameters))

    def responsibilities(self, parameters):
        return self.block.responsibilities(self.objective.density(parameters))

    def labels(self, parameters):
        return self.block.labels(self.objective.density(parameters))

    def em(self, start, max_iter, tolerance=0, **more):
        begun = EMResult(start, [], converged=False, form=self.form.precision)
        return run_em(self.engine, self.objective, begun, tolerance=tolerance, max_iter=max_iter, **more)

    def advance(self, start, at_most, previous=-np.inf, tolerance=0.0):
        """Iterations on a device, in the form."""
        density, add = self.objective.density(start), self.objective.reg_covar
        return self.block.advance(start, density, self.form, add, at_most, previous, tolerance)


def start_for(x, k, covariance_type, seed=0):
    """Weights, means and precisions to start from: rows of x and the precision of the whole."""
    rng = np.random.RandomState(seed)
    d = x.shape[1]
    variance = float(np.var(np.asarray(x, dtype=np.float64)))
    shape = COVARIANCES[covariance_type].shape(k, d)
    identity = np.eye(d) if COVARIANCES[covariance_type].has_matrices else 1.0
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
