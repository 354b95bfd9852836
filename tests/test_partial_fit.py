"""Stepwise EM: against the textbook step by step, and against EM on all rows."""

import numpy as np
import pytest

import oracle
from cases import PARAMETER_TOLERANCE, assert_close, blobs
from gaussmix import GaussianMixture
from gaussmix._arrays import to_numpy
from gaussmix.sklearn import GaussianMixture as SklearnMixture

X = blobs(n=401, d=3, k=3, seed=5)
REG = 1e-3


def textbook_steps(blocks, weights, means, covariances, covariance_type, *, decay, delay, sample_weights):
    """Weights, means and covariances after a step for each block; statistics are sums about the origin."""
    k, d = means.shape
    sigmas = oracle.matrices(covariances, covariance_type, k, d)
    # What was added to the variances is no part of the statistics.
    spread = np.array(
        [sigma - REG * np.eye(d) + np.outer(mean, mean) for sigma, mean in zip(sigmas, means, strict=True)]
    )
    state = weights, weights[:, None] * means, weights[:, None, None] * spread
    for step, (x, sample_weight) in enumerate(zip(blocks, sample_weights, strict=True)):
        sigmas = oracle.matrices(covariances, covariance_type, k, d)
        r = oracle.responsibilities(x, weights, means, sigmas)
        counts, centres, scatters = oracle.statistics(x, r, sample_weight)
        total = counts.sum()
        second = scatters + counts[:, None, None] * np.einsum("ki,kj->kij", centres, centres)
        new = counts / total, counts[:, None] * centres / total, second / total
        size = (step + delay) ** -decay
        state = tuple((1 - size) * old + size * value for old, value in zip(state, new, strict=True))
        counts, first, second = state
        means = first / counts[:, None]
        scatters = second - counts[:, None, None] * np.einsum("ki,kj->kij", means, means)
        weights, means, covariances = oracle.maximize(counts, means, scatters, covariance_type, REG)
    return weights, means, covariances


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("decay", "delay"), [(0.7, 2.0), (1.0, 1.0), (0.51, 7.5)])
def test_steps_are_those_of_the_textbook(library, covariance, dtype, weighted, decay, delay):
    blocks = [X[:100].astype(dtype), X[100:117].astype(dtype), X[117:].astype(dtype)]
    rng = np.random.RandomState(0)
    sample_weights = [rng.uniform(0, 2, len(x)) if weighted else None for x in blocks]
    mixture = GaussianMixture(
        3,
        covariance_type=covariance.name,
        covariance_regularization=REG,
        random_state=0,
        trainer_params={"max_epochs": 0},
    ).fit(X)
    start = mixture.weights_, mixture.means_, mixture.covariances_
    settings = dict(decay=decay, delay=delay, sample_weights=sample_weights)
    expected = textbook_steps(blocks, *start, covariance.name, **settings)
    for x, weight in zip(blocks, sample_weights, strict=True):
        mixture.partial_fit(library.asarray(x), sample_weight=weight, step_decay=decay, step_delay=delay)
    for name, value in zip(("weights_", "means_", "covariances_"), expected, strict=True):
        assert_close(to_numpy(getattr(mixture, name)), value, PARAMETER_TOLERANCE[dtype], name)
    assert library.owns(mixture.means_)
    assert mixture.n_steps_ == 3
    assert not mixture.converged_
    assert mixture.lower_bounds_ == [-mixture.nll_]


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
def test_many_blocks_come_near_the_fit_of_all(covariance, cls):
    rng = np.random.RandomState(1)
    x = blobs(n=30_000, d=2, k=3, seed=5)
    fitted = cls(3, covariance_type=covariance.name, random_state=0).fit(x)
    online = cls(3, covariance_type=covariance.name, random_state=0)
    for _ in range(3):
        for block in np.array_split(x[rng.permutation(len(x))], 100):
            online.partial_fit(block)
    assert abs(online.score(x) - fitted.score(x)) < 0.01
    assert online.n_steps_ == 300
    order, reference = (np.argsort(each.means_[:, 0]) for each in (online, fitted))
    assert np.abs(online.means_[order] - fitted.means_[reference]).max() < 0.1


def test_blocks_of_a_loader_are_one_step(covariance):
    class Halves:
        def __iter__(self):
            return iter(np.array_split(X, 2))

    settings = dict(covariance_type=covariance.name, random_state=0)
    whole, halves = (GaussianMixture(3, **settings).partial_fit(data) for data in (X, Halves()))
    assert halves.n_steps_ == 1
    for name in ("weights_", "means_", "covariances_"):
        assert_close(getattr(halves, name), getattr(whole, name), 1e-10, name)


def test_a_small_block_after_the_first_and_a_new_fit(covariance):
    mixture = GaussianMixture(3, covariance_type=covariance.name, random_state=0).partial_fit(X)
    mixture.partial_fit(X[:1])
    assert mixture.n_steps_ == 2
    assert np.isfinite(mixture.covariances_).all()
    mixture.fit(X)
    assert mixture.n_steps_ == 0
    assert mixture.converged_


def test_saving_between_steps_changes_nothing(tmp_path, covariance):
    blocks = np.array_split(X, 4)
    at_once = GaussianMixture(3, covariance_type=covariance.name, random_state=0)
    saved = GaussianMixture(3, covariance_type=covariance.name, random_state=0)
    for block in blocks:
        at_once.partial_fit(block)
        saved.partial_fit(block).save(tmp_path)
        saved = GaussianMixture.load(tmp_path)
    assert np.array_equal(saved.means_, at_once.means_)
    assert saved.n_steps_ == 4


def test_the_form_changes_where_a_step_needs_it(covariance):
    """Clusters 1e4 widths apart: features in float64 would lose the digits that are owed."""
    far = np.concatenate([X, X + 1e7])
    mixture = GaussianMixture(2, covariance_type=covariance.name, random_state=0).partial_fit(far)
    assert mixture.precision_ == "centred-float64"


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(step_decay=0.5), "step_decay must be above 0.5 and at most 1"),
        (dict(step_decay=1.1), "step_decay must be above 0.5 and at most 1"),
        (dict(step_delay=0.9), "step_delay must be at least 1"),
        (dict(step_delay=np.inf), "step_delay must be finite"),
        (dict(sample_weight=np.zeros(401)), "sample_weight is zero for every row"),
    ],
)
def test_bad_steps(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(2).partial_fit(X, **settings)


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
def test_bad_rows(cls):
    with pytest.raises(ValueError, match="n_samples = 2; use fewer"):
        cls(3).partial_fit(X[:2])
    mixture = cls(3, random_state=0).partial_fit(X)
    before = mixture.means_
    with pytest.raises(ValueError, match="X has 2 features"):
        mixture.partial_fit(X[:, :2])
    bad = X.copy()
    bad[7, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        mixture.partial_fit(bad)
    assert mixture.means_ is before
    assert mixture.n_steps_ == 1
