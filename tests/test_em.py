"""The EM loop: against scikit-learn, and the symmetries a fit has."""

import contextlib
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Reference

from cases import PARAMETER_TOLERANCE, assert_close, blobs, start_for
from conftest import INSTALLED, Library
from gaussmix import GaussianMixture as PyCaveMixture
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._em import EMResult, best_of, run_em
from gaussmix._guard import Form
from gaussmix._initialization import initialize
from gaussmix._objective import MaximumLikelihood
from gaussmix._parameters import Parameters
from gaussmix.backends._dispatch import engine
from gaussmix.backends._engine import Progress
from gaussmix.rows._data import Rows
from gaussmix.sklearn import GaussianMixture

pytestmark = pytest.mark.usefixtures("unconverged")

# How much the lower bound may fall by rounding, in nats.
BOUND_ROUNDING = {"expanded-float32": 1e-5, "expanded-float64": 1e-10, "centred-float64": 1e-10}
PARAMETERS = ("weights_", "means_", "covariances_", "precisions_cholesky_", "precisions_")


def fitted(x, k, covariance_type, sample_weight=None, iterations=15, start=None, reg_covar=1e-6):
    start = start_for(to_numpy(x), k, covariance_type) if start is None else start
    mixture = GaussianMixture(
        k, covariance_type=covariance_type, tol=0, max_iter=iterations, reg_covar=reg_covar, **start
    )
    return mixture.fit(x, sample_weight=sample_weight)


def test_twenty_iterations_give_the_parameters_of_scikit_learn(library, covariance):
    if covariance.sklearn_name != covariance.name:
        pytest.skip("scikit-learn has no such covariance type")
    x = blobs(n=701, d=3, k=4, seed=1)
    settings = dict(covariance_type=covariance.name, tol=0, max_iter=20, **start_for(x, 4, covariance.name))
    expected = Reference(4, **settings).fit(x)
    found = GaussianMixture(4, **settings).fit(library.asarray(x))
    for name in PARAMETERS:
        assert_close(to_numpy(getattr(found, name)), getattr(expected, name), 1e-9, name)
    assert found.n_iter_ == expected.n_iter_ == 20
    assert_close(found.lower_bounds_, expected.lower_bounds_, 1e-9, "lower bounds")
    assert_close(to_numpy(found.score_samples(library.asarray(x))), expected.score_samples(x), 1e-9, "score_samples")
    assert np.array_equal(to_numpy(found.predict(library.asarray(x))), expected.predict(x))
    for criterion in ("aic", "bic", "score"):
        assert_close(getattr(found, criterion)(library.asarray(x)), getattr(expected, criterion)(x), 1e-9, criterion)


def test_float32_data_gives_the_parameters_of_float64_arithmetic(library, covariance):
    x = blobs(n=500, d=4, k=3, seed=2).astype(np.float32)
    found = fitted(library.asarray(x), 3, covariance.name, iterations=20)
    expected = fitted(x.astype(np.float64), 3, covariance.name, start=start_for(x, 3, covariance.name), iterations=20)
    assert str(found.means_.dtype).endswith("float32")
    for name in PARAMETERS:
        assert_close(to_numpy(getattr(found, name)), getattr(expected, name), PARAMETER_TOLERANCE["float32"], name)


@pytest.mark.parametrize("weighted", [False, True])
@settings(max_examples=20)  # 48 parametrisations
@given(seed=st.integers(0, 2**31), d=st.integers(1, 4), k=st.integers(1, 4))
def test_lower_bound_never_falls_without_regularization(library, covariance, dtype, weighted, seed, d, k):
    x = blobs(n=60 * k, d=d, k=k, seed=seed, spread=2.0).astype(dtype)
    weight = library.asarray(np.random.RandomState(seed).uniform(0.1, 2, size=len(x))) if weighted else None
    rows = Rows(library.asarray(x), weight)
    on_rows, objective = engine(rows, covariance), MaximumLikelihood(covariance, 0.0)
    bounds = []
    with contextlib.suppress(np.linalg.LinAlgError):  # without regularisation EM may collapse on a few rows
        start = initialize(on_rows, objective, k, "kmeans++", np.random.RandomState(0))
        begun = EMResult(start, [], converged=False)
        watch = [lambda i, bound, parameters: bounds.append(bound)]
        run_em(on_rows, objective, begun, tolerance=0, max_iter=12, callbacks=watch)
    assert np.all(np.diff(bounds) >= -BOUND_ROUNDING[on_rows.forms[0].precision])


@given(st.integers(0, 2**31), st.sampled_from(sorted(COVARIANCES)), st.sampled_from(["float32", "float64"]))
def test_permuted_components_and_rows_give_a_permuted_fit(seed, covariance_type, dtype):
    rng = np.random.RandomState(seed)
    x = blobs(n=150, d=2, k=3, seed=seed).astype(dtype)
    start = start_for(x, 3, covariance_type)
    components, rows = rng.permutation(3), rng.permutation(len(x))
    shared = COVARIANCES[covariance_type].shares_moments
    permuted = {
        name: value if name == "precisions_init" and shared else value[components] for name, value in start.items()
    }
    expected = fitted(x, 3, covariance_type, start=start, iterations=8)
    found = fitted(x[rows], 3, covariance_type, start=permuted, iterations=8)
    tolerance = PARAMETER_TOLERANCE[dtype]
    assert_close(found.means_, expected.means_[components], tolerance, "means")
    assert_close(found.weights_, expected.weights_[components], tolerance, "weights")
    same = expected.covariances_ if shared else expected.covariances_[components]
    assert_close(found.covariances_, same, tolerance, "covariances")


@given(st.integers(0, 2**31), st.sampled_from(sorted(COVARIANCES)), st.sampled_from(INSTALLED))
def test_integer_weights_equal_repeated_rows(seed, covariance_type, name):
    rng = np.random.RandomState(seed)
    x = blobs(n=80, d=2, k=2, seed=seed)
    weight = rng.randint(0, 4, size=len(x))
    asarray = Library(name).asarray
    start = start_for(x, 2, covariance_type)
    found = fitted(asarray(x), 2, covariance_type, sample_weight=asarray(weight), start=start)
    expected = fitted(asarray(np.repeat(x, weight, axis=0)), 2, covariance_type, start=start)
    for attribute in ("weights_", "means_", "covariances_"):
        assert_close(to_numpy(getattr(found, attribute)), to_numpy(getattr(expected, attribute)), 1e-9, attribute)
    assert_close(found.lower_bounds_, expected.lower_bounds_, 1e-9, "lower bounds")


@given(st.integers(0, 2**31), st.sampled_from(sorted(COVARIANCES)))
def test_maps_of_the_data_that_keep_the_covariance_type_map_the_fit(seed, covariance_type):
    rng = np.random.RandomState(seed)
    d, k = 3, 2
    x = blobs(n=120, d=d, k=k, seed=seed)
    shift = 10 * rng.normal(size=d)
    rotation, _ = np.linalg.qr(rng.normal(size=(d, d)))
    scales = np.exp(rng.uniform(-1, 1, size=d))
    matrix = {
        "full": rotation * scales,
        "tied": rotation * scales,
        "diag": np.diag(scales),
        "tied_diag": np.diag(scales),
        "spherical": scales[0] * rotation,
    }[covariance_type]
    start = start_for(x, k, covariance_type)
    mapped_start = dict(start, means_init=start["means_init"] @ matrix + shift)
    inverse = np.linalg.inv(matrix)
    precisions = start["precisions_init"]
    mapped_start["precisions_init"] = {
        "full": lambda: inverse @ precisions @ inverse.T,
        "tied": lambda: inverse @ precisions @ inverse.T,
        "diag": lambda: precisions / scales**2,
        "tied_diag": lambda: precisions / scales**2,
        "spherical": lambda: precisions / scales[0] ** 2,
    }[covariance_type]()
    if COVARIANCES[covariance_type].has_matrices:
        asymmetric = mapped_start["precisions_init"]
        mapped_start["precisions_init"] = (asymmetric + np.swapaxes(asymmetric, -1, -2)) / 2
    plain = fitted(x, k, covariance_type, start=start, reg_covar=0)
    mapped = fitted(x @ matrix + shift, k, covariance_type, start=mapped_start, reg_covar=0)
    assert_close(mapped.weights_, plain.weights_, 1e-8, "weights")
    assert_close(mapped.means_, plain.means_ @ matrix + shift, 1e-8, "means")
    expected = {
        "full": lambda: matrix.T @ plain.covariances_ @ matrix,
        "tied": lambda: matrix.T @ plain.covariances_ @ matrix,
        "diag": lambda: plain.covariances_ * scales**2,
        "tied_diag": lambda: plain.covariances_ * scales**2,
        "spherical": lambda: plain.covariances_ * scales[0] ** 2,
    }[covariance_type]()
    assert_close(mapped.covariances_, expected, 1e-8, "covariances")
    log_volume = np.linalg.slogdet(matrix)[1]
    assert_close(mapped.lower_bounds_, np.asarray(plain.lower_bounds_) - log_volume, 1e-8, "lower bounds")


def test_stops_where_the_bound_changes_by_less_than_the_tolerance(covariance):
    if covariance.sklearn_name != covariance.name:
        pytest.skip("scikit-learn has no such covariance type")
    x = blobs(seed=3)
    start = start_for(x, 4, covariance.name)
    mixture = GaussianMixture(4, covariance_type=covariance.name, tol=1e-4, max_iter=500, **start).fit(x)
    reference = Reference(4, covariance_type=covariance.name, tol=1e-4, max_iter=500, **start).fit(x)
    changes = np.abs(np.diff(mixture.lower_bounds_))
    assert mixture.converged_
    assert changes[-1] < 1e-4
    assert np.all(changes[:-1] >= 1e-4)
    assert mixture.n_iter_ == reference.n_iter_ == len(mixture.lower_bounds_)


def test_tolerance_zero_runs_every_iteration_and_warns():
    x = blobs(seed=4)
    mixture = PyCaveMixture(2, convergence_tolerance=0, trainer_params={"max_epochs": 7}, random_state=0)
    with pytest.warns(ConvergenceWarning, match="7 iterations"):
        mixture.fit(x)
    assert mixture.num_iter_ == 7
    assert not mixture.converged_
    assert mixture.nll_ == -mixture.lower_bounds_[-1]


def test_no_warning_where_em_converged():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PyCaveMixture(2, random_state=0).fit(blobs(seed=4, k=2)).converged_


class ScriptedEngine:
    """An engine with iterations of its own, which reports given lower bounds."""

    backend = "scripted"
    forms = (Form("scripted", has_kernels=True),)

    def __init__(self, bounds):
        self.bounds = list(bounds)
        self.asked = []

    def during_steps(self):
        return contextlib.nullcontext()

    def choose(self, forms, density, weights=None):
        return forms

    def advance(self, parameters, density, form, add, at_most, previous, tolerance):
        self.asked.append(at_most)
        taken, self.bounds = self.bounds[:at_most], self.bounds[at_most:]
        return Progress(parameters, tuple(taken), "")


def scripted(engine_, **settings_):
    covariance = COVARIANCES["diag"]
    one = np.ones((1, 1))
    begun = EMResult(Parameters(one[0], one, one, one), [], converged=False)
    return run_em(engine_, MaximumLikelihood(covariance, 0.0), begun, **settings_)


def test_the_loop_lets_an_engine_run_ahead_unless_someone_watches():
    engine_ = ScriptedEngine([1.0, 2.0, 3.0, 4.0])
    result = scripted(engine_, tolerance=0, max_iter=4)
    assert engine_.asked == [4]
    assert result.lower_bounds == [1, 2, 3, 4]
    seen = []
    engine_ = ScriptedEngine([1.0, 2.0, 3.0])
    scripted(engine_, tolerance=0, max_iter=3, callbacks=[lambda i, bound, parameters: seen.append((i, bound))])
    assert engine_.asked == [1, 1, 1]
    assert seen == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("bound", [math.nan, math.inf, -math.inf])
def test_a_likelihood_that_is_not_finite_is_an_error_and_never_convergence(bound):
    with pytest.raises(ValueError, match=r"log-likelihood became .* in iteration 2"):
        scripted(ScriptedEngine([1.0, bound]), tolerance=1, max_iter=5)


def test_best_of_keeps_the_highest_bound():
    results = [EMResult(None, [0.0, bound], True) for bound in (1.0, 3.0, 3.0, 2.0)]
    assert best_of(results) is results[1]
    without = [EMResult(None, [], False), EMResult(None, [], False)]
    assert best_of(without) is without[0]


def test_the_same_seed_gives_the_same_bits(library, covariance, dtype):
    x = library.asarray(blobs(n=400, d=3, k=3, seed=5), dtype)
    first, second = (
        GaussianMixture(3, covariance_type=covariance.name, random_state=11, max_iter=10).fit(x) for _ in range(2)
    )
    for name in PARAMETERS:
        assert np.array_equal(to_numpy(getattr(first, name)), to_numpy(getattr(second, name))), name
    assert first.lower_bounds_ == second.lower_bounds_
