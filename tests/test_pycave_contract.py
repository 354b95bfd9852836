"""What PyCave promises, name by name: `CONTRACT` has a test for each parameter, method and attribute it documents.

Expected values come from `oracle.py`, from NumPy or from scikit-learn; PyCave and torchgmm need not be installed.
"""

import contextlib
import dataclasses
import inspect
import logging
import os
import pickle
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sklearn
import sklearn.base
import sklearn.mixture
from sklearn.cluster import KMeans as ReferenceKMeans
from sklearn.cluster import kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import pairwise_distances
from sklearn.pipeline import Pipeline

import gaussmix
import oracle
from cases import PARAMETER_TOLERANCE, assert_close, blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix._arrays import to_numpy

X = blobs(n=120, d=3, k=3, seed=1)
FEW = {"trainer_params": {"max_epochs": 4}, "convergence_tolerance": 0}
both = pytest.mark.parametrize("cls", [GaussianMixture, KMeans])
unconverged = pytest.mark.usefixtures("unconverged")


def textbook(x, means, covariance_type, iterations, regularization=1e-6):
    """EM from the rows nearest to `means`: weights, means, covariances, and the mean log-likelihood of each E-step."""
    k, d = means.shape
    nearest = np.eye(k)[pairwise_distances(x, means).argmin(axis=1)]
    parameters = oracle.maximize(*oracle.statistics(x, nearest), covariance_type, regularization)
    bounds = []
    for _ in range(iterations):
        weights, means, covariances = parameters
        sigmas = oracle.matrices(covariances, covariance_type, k, d)
        bounds.append(oracle.evidence(x, weights, means, sigmas)[1].mean())
        parameters = oracle.em_step(x, *parameters, covariance_type, regularization)
    return *parameters, bounds


def few_iterations(library, covariance, dtype="float64", **params):
    """A mixture after four iterations, and the textbook's."""
    x = X.astype(dtype)
    mixture = GaussianMixture(3, covariance_type=covariance.name, init_means=library.asarray(x[:3]), **FEW, **params)
    return mixture.fit(library.asarray(x)), textbook(x.astype(np.float64), x[:3], covariance.name, 4)


def fitted(cls=GaussianMixture, k=3, **params):
    return cls(k, random_state=0, **params).fit(X)


def densities(mixture, x=X):
    """Posterior probabilities and negative log-likelihoods of rows under a fitted mixture."""
    sigmas = oracle.matrices(to_numpy(mixture.covariances_), mixture.covariance_type, *mixture.means_.shape)
    joint, evidence = oracle.evidence(x, to_numpy(mixture.weights_), to_numpy(mixture.means_), sigmas)
    return np.exp(joint - evidence[:, None]), -evidence


def assert_refused(cls, name, values, error):
    for value in values:
        with pytest.raises(error, match=name):
            cls(**{name: value}).fit(X)


# GaussianMixture: parameters


def test_mixture_num_components():
    assert GaussianMixture().num_components == 1
    for k in (1, 2, np.int64(4)):
        mixture = GaussianMixture(k, random_state=0).fit(X)  # the only parameter by position
        assert mixture.means_.shape == (k, 3)
        assert len(np.unique(mixture.predict(X))) == k
    with pytest.raises(TypeError, match="positional argument"):
        GaussianMixture(2, "full")
    assert_refused(GaussianMixture, "num_components", [0, -1, 121], ValueError)
    assert_refused(GaussianMixture, "num_components", [2.0, "2", None], TypeError)


@unconverged
def test_mixture_covariance_type(library, covariance, dtype):
    assert GaussianMixture().covariance_type == "diag"
    mixture, (_, _, covariances, _) = few_iterations(library, covariance, dtype)
    shape = {"full": (3, 3, 3), "tied": (3, 3), "diag": (3, 3), "tied_diag": (3,), "spherical": (3,)}[covariance.name]
    assert tuple(mixture.covariances_.shape) == shape
    assert_close(to_numpy(mixture.covariances_), covariances, PARAMETER_TOLERANCE[dtype])
    assert_refused(GaussianMixture, "covariance_type", ["round", "Full", None], ValueError)


def test_mixture_init_strategy(covariance):
    assert GaussianMixture().init_strategy == "kmeans"
    start = dict(covariance_type=covariance.name, trainer_params={"max_epochs": 0})
    # Centroids, and seeds of k-means++, give each row to the nearest.
    seeds, _ = kmeans_plusplus(X - X.mean(axis=0), 3, random_state=np.random.RandomState(0))
    centroids = ReferenceKMeans(3, n_init=1, init=seeds, algorithm="lloyd").fit(X - X.mean(axis=0)).cluster_centers_
    for strategy, means in (("kmeans++", seeds), ("kmeans", centroids)):
        found = fitted(init_strategy=strategy, **start)
        expected = textbook(X, means + X.mean(axis=0), covariance.name, 0)
        for name, value in zip(("weights_", "means_", "covariances_"), expected, strict=False):
            assert_close(getattr(found, name), value, 1e-9, strategy)
    # "random" draws responsibilities: means and covariances are about those of all rows.
    found = fitted(init_strategy="random", **start)
    drawn = np.random.RandomState(0).uniform(size=(len(X), 3))
    expected = oracle.maximize(*oracle.statistics(X, drawn / drawn.sum(axis=1, keepdims=True)), covariance.name, 1e-6)
    for name, value in zip(("weights_", "means_", "covariances_"), expected, strict=True):
        assert_close(getattr(found, name), value, 1e-9, "random")
    assert_refused(GaussianMixture, "init_strategy", ["k-means", "zeros", None], ValueError)


@unconverged
def test_mixture_init_means(library, covariance, dtype):
    assert GaussianMixture().init_means is None
    # Handled as if k-means had found them, whatever the strategy.
    mixture, expected = few_iterations(library, covariance, dtype, init_strategy="random")
    for name, value in zip(("weights_", "means_", "covariances_", "lower_bounds_"), expected, strict=True):
        assert_close(to_numpy(getattr(mixture, name)), value, PARAMETER_TOLERANCE[dtype], name)
    # A mean without rows keeps its place, with a valid covariance.
    lonely = np.array([X[0], X[1], X[2], np.full(3, 1e6)])
    mixture = GaussianMixture(4, covariance_type=covariance.name, init_means=library.asarray(lonely), **FEW)
    mixture.fit(library.asarray(X))
    assert to_numpy(mixture.means_)[3].tolist() == [1e6] * 3
    assert to_numpy(mixture.weights_)[3] == 0
    assert np.all(np.isfinite(to_numpy(mixture.precisions_cholesky_)))
    assert_refused(GaussianMixture, "init_means", [X[:2], X[0], X[:1, :2]], ValueError)


@unconverged
def test_mixture_convergence_tolerance(covariance):
    assert GaussianMixture().convergence_tolerance == 1e-3
    params = dict(covariance_type=covariance.name, init_means=X[:3])
    bounds = textbook(X, X[:3], covariance.name, 12)[3]
    for tolerance in (1e-1, 1e-2):
        # The change of the mean likelihood of a row, absolutely.
        expected = next(i for i in range(1, 12) if abs(bounds[i] - bounds[i - 1]) < tolerance) + 1
        assert GaussianMixture(3, convergence_tolerance=tolerance, **params).fit(X).num_iter_ == expected
    everything = GaussianMixture(3, convergence_tolerance=0, trainer_params={"max_epochs": 40}, **params).fit(X)
    assert everything.num_iter_ == 40
    assert not everything.converged_
    assert_refused(GaussianMixture, "convergence_tolerance", [-1e-3, np.nan, np.inf], ValueError)
    assert_refused(GaussianMixture, "convergence_tolerance", ["small", None], TypeError)


def test_mixture_covariance_regularization(covariance):
    assert GaussianMixture().covariance_regularization == 1e-6
    plain, regularized = (
        fitted(k=1, covariance_type=covariance.name, covariance_regularization=value).covariances_ for value in (0, 0.5)
    )
    is_matrix = covariance.shape(1, 3)[-2:] == (3, 3)
    assert_close(regularized - plain, np.broadcast_to(0.5 * (np.eye(3) if is_matrix else 1), plain.shape), 1e-12)
    assert_refused(GaussianMixture, "covariance_regularization", [-1e-6, np.nan], ValueError)
    assert_refused(GaussianMixture, "covariance_regularization", ["small", None], TypeError)


@unconverged
def test_mixture_batch_size(library, covariance):
    assert GaussianMixture().batch_size is None
    x = library.asarray(X)
    whole, _ = few_iterations(library, covariance)
    for batch_size in (7, 120, 10_000):
        batched, _ = few_iterations(library, covariance, batch_size=batch_size)
        for name in ("weights_", "means_", "covariances_"):
            assert_close(to_numpy(getattr(batched, name)), to_numpy(getattr(whole, name)), 1e-10, name)
        assert batched.num_iter_ == whole.num_iter_
        for method in ("predict", "predict_proba", "score_samples"):
            assert_close(to_numpy(getattr(batched, method)(x)), to_numpy(getattr(whole, method)(x)), 1e-9, method)
    assert_refused(GaussianMixture, "batch_size", [0, -1], ValueError)
    assert_refused(GaussianMixture, "batch_size", [2.5, "all"], TypeError)


@unconverged
def test_mixture_trainer_params():
    assert GaussianMixture().trainer_params is None
    # What scripts pass; each setting has its tests in test_trainer.py.
    params = dict(accelerator="cpu", devices=1, max_epochs=5, enable_progress_bar=False, logger=False)
    mixture = GaussianMixture(3, convergence_tolerance=0, trainer_params=params, batch_size=50).fit(X)
    assert mixture.num_iter_ == 5  # not twice as many in batches


def test_mixture_num_workers():
    assert GaussianMixture().num_workers == 0
    torch = pytest.importorskip("torch")

    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return torch.as_tensor(X[index]), index

        def __len__(self):
            return len(X)

    # Of a torch Dataset; more workers have their tests in test_streaming.py.
    found = GaussianMixture(3, num_workers=0, random_state=0).fit(Rows())
    assert_close(found.means_, fitted().means_, 1e-9)
    assert len(found.predict(Rows())) == len(X)
    assert_refused(GaussianMixture, "num_workers", [-1], ValueError)
    assert_refused(GaussianMixture, "num_workers", [1.5, None], TypeError)


@both
def test_random_state(cls):
    assert cls().random_state is None
    name = "means_" if cls is GaussianMixture else "centroids_"
    params = {"init_strategy": "random"}
    same = [cls(4, random_state=seed, **params).fit(X) for seed in (3, 3, np.random.RandomState(3))]
    for again in same[1:]:
        assert np.array_equal(getattr(again, name), getattr(same[0], name))
    assert not np.array_equal(getattr(cls(4, random_state=4, **params).fit(X), name), getattr(same[0], name))
    before = pickle.dumps(np.random.get_state())
    cls(4, **params).fit(X)
    assert pickle.dumps(np.random.get_state()) == before
    with pytest.raises(ValueError, match="seed"):
        cls(random_state="seed").fit(X)


# Methods that both have


@both
def test_fit(library, dtype, cls):
    x = library.asarray(X, dtype)
    estimator = cls(3, random_state=0)
    assert estimator.fit(x) is estimator
    means = "means_" if cls is GaussianMixture else "centroids_"
    # PyCave's name for X; scikit-learn's y; weights.
    for arguments in (
        dict(data=x),
        dict(X=x, y=np.zeros(120)),
        dict(data=x, sample_weight=library.asarray(np.ones(120))),
    ):
        again = cls(3, random_state=0).fit(**arguments)
        assert_close(to_numpy(getattr(again, means)), to_numpy(getattr(estimator, means)), PARAMETER_TOLERANCE[dtype])
    for method in ("fit", "predict", "score", "score_samples", "fit_predict"):
        with pytest.raises(TypeError, match=rf"{method}\(\) got both X and data"):
            getattr(estimator, method)(x, data=x)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'X'"):
            getattr(estimator, method)()
    assert np.array_equal(to_numpy(estimator.predict(data=x)), to_numpy(estimator.predict(x)))


@both
def test_fit_predict(library, cls):
    labels = cls(3, random_state=0).fit_predict(library.asarray(X))
    assert library.owns(labels)
    assert to_numpy(labels).dtype == np.int64
    assert np.array_equal(to_numpy(labels), fitted(cls).predict(X))


@both
def test_clone(cls):
    estimator = cls(3, trainer_params={"max_epochs": 50}, random_state=0).fit(X)
    for copy in (estimator.clone(), sklearn.base.clone(estimator)):
        assert type(copy) is cls
        assert copy.get_params() == estimator.get_params()
        assert copy.persistent_attributes == []


@both
def test_get_params(cls):
    expected = {name: value.default for name, value in inspect.signature(cls).parameters.items()}
    assert cls().get_params() == cls().get_params(deep=True) == expected
    params = {"max_epochs": 5}
    # What was passed, and not what became of it.
    assert cls(7, trainer_params=params).get_params()["trainer_params"] is params


@both
def test_set_params(cls):
    estimator = cls()
    assert estimator.set_params({"batch_size": 10, "init_strategy": "random"}) is estimator  # PyCave's way
    assert estimator.set_params(batch_size=20, convergence_tolerance=0.1) is estimator  # scikit-learn's
    expected = cls(batch_size=20, init_strategy="random", convergence_tolerance=0.1)
    assert estimator.set_params({}).get_params() == expected.get_params()
    for call in (lambda: estimator.set_params({"moons": 3}), lambda: estimator.set_params(moons=3)):
        with pytest.raises(ValueError, match="Invalid parameter 'moons'"):
            call()


@both
def test_save(tmp_path, cls):
    cls(3).save(tmp_path / "a" / "model")
    assert os.listdir(tmp_path / "a" / "model") == ["params.json"]
    fitted(cls).save(str(tmp_path / "a" / "model"))
    assert sorted(os.listdir(tmp_path / "a" / "model")) == ["model.safetensors", "params.json"]


@both
def test_load(library, tmp_path, cls):
    x = library.asarray(X)
    estimator = cls(3, random_state=0, trainer_params={"max_epochs": 50}).fit(x)
    estimator.save(tmp_path)
    loaded = cls.load(tmp_path)
    assert loaded.get_params() == estimator.get_params()
    assert set(loaded.persistent_attributes) == set(estimator.persistent_attributes)
    assert np.array_equal(to_numpy(loaded.predict(x)), to_numpy(estimator.predict(x)))
    assert (loaded.converged_, loaded.num_iter_) == (estimator.converged_, estimator.num_iter_)
    with pytest.raises(FileNotFoundError, match="holds no saved estimator"):
        cls.load(tmp_path / "elsewhere")


@both
def test_save_parameters(tmp_path, cls):
    fitted(cls).save_parameters(tmp_path)
    assert os.listdir(tmp_path) == ["params.json"]
    assert cls.load(tmp_path).get_params() == cls(3, random_state=0).get_params()


@both
def test_load_parameters(tmp_path, cls):
    fitted(cls).save(tmp_path)
    loaded = cls.load_parameters(tmp_path)
    assert type(loaded) is cls
    assert loaded.get_params() == cls(3, random_state=0).get_params()
    assert loaded.persistent_attributes == []
    with pytest.raises(FileNotFoundError, match="holds no saved estimator"):
        cls.load_parameters(tmp_path / "elsewhere")


@both
def test_save_attributes(tmp_path, cls):
    fitted(cls).save_attributes(tmp_path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    with pytest.raises(NotFittedError):
        cls().save_attributes(tmp_path)


@both
def test_load_attributes(tmp_path, cls):
    estimator = fitted(cls)
    estimator.save_attributes(tmp_path)
    loaded = cls(3)
    assert loaded.load_attributes(tmp_path) is None
    assert loaded.random_state is None
    assert np.array_equal(loaded.predict(X), estimator.predict(X))
    with pytest.raises(FileNotFoundError, match="holds no fitted attributes"):
        cls(3).load_attributes(tmp_path / "elsewhere")


@both
def test_persistent_attributes(cls):
    assert cls().persistent_attributes == []
    assert set(fitted(cls).persistent_attributes) == section(cls, "Attributes") - {"model_"}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # Lightning's own
@both
def test_trainer(cls):
    lightning = pytest.importorskip("pytorch_lightning")
    trainer = cls(trainer_params={"accelerator": "cpu", "max_epochs": 7}).trainer(enable_progress_bar=False)
    assert isinstance(trainer, lightning.Trainer)
    assert trainer.max_epochs == 7


@both
def test_trainer_params_user(cls):
    params = {"max_epochs": 5}
    assert cls(trainer_params=params).trainer_params_user is params
    assert cls().trainer_params_user is None


# GaussianMixture: methods


def test_mixture_predict(library, covariance, dtype):
    mixture = fitted(covariance_type=covariance.name)
    labels = mixture.predict(library.asarray(X, dtype))
    assert library.owns(labels)
    assert to_numpy(labels).dtype == np.int64
    assert np.array_equal(to_numpy(labels), densities(mixture)[0].argmax(axis=1))
    with pytest.raises(NotFittedError, match="not fitted yet"):
        GaussianMixture().predict(X)


def test_mixture_predict_proba(library, covariance, dtype):
    mixture = fitted(covariance_type=covariance.name)
    proba = mixture.predict_proba(library.asarray(X, dtype))
    assert library.owns(proba)
    assert to_numpy(proba).dtype == dtype
    assert_close(to_numpy(proba), densities(mixture)[0], 1e-9 if dtype == "float64" else 1e-4)
    assert_close(to_numpy(proba).sum(axis=1), np.ones(len(X)), 1e-6)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        GaussianMixture().predict_proba(X)


@pytest.mark.parametrize("batch_size", [None, 50])
def test_mixture_score_samples(library, covariance, dtype, batch_size):
    mixture = fitted(covariance_type=covariance.name, batch_size=batch_size)
    found = mixture.score_samples(library.asarray(X, dtype))
    assert library.owns(found)
    assert to_numpy(found).dtype == dtype
    # One for each row, as documented, and negative log-likelihoods.
    assert_close(to_numpy(found), densities(mixture)[1], 1e-9 if dtype == "float64" else 1e-4)


def test_mixture_score(library, covariance, dtype):
    mixture = fitted(covariance_type=covariance.name)
    found = mixture.score(library.asarray(X, dtype))
    assert isinstance(found, float)
    assert found == pytest.approx(densities(mixture)[1].mean(), abs=1e-9 if dtype == "float64" else 1e-4)
    assert mixture.score(X + 100) > mixture.score(X)  # worse is larger


def test_mixture_sample(library, covariance):
    weights, means = np.array([0.5, 0.2, 0.3]), 100.0 * np.arange(6).reshape(3, 2)
    scale = np.array([[2.0, 0.5], [0.5, 1.0]]) if covariance.shape(1, 2)[-2:] == (2, 2) else 1.5
    covariances = np.broadcast_to(scale, covariance.shape(3, 2)).copy()
    parameters = [library.asarray(value) for value in (weights, means, covariances)]
    mixture = GaussianMixture.from_parameters(*parameters, covariance_type=covariance.name)
    rows = mixture.set_params(random_state=0).sample(20_000)  # rows alone, no labels
    assert library.owns(rows)
    assert rows.shape == (20_000, 2)
    labels = pairwise_distances(to_numpy(rows), means).argmin(axis=1)
    assert np.all(np.diff(labels) >= 0)  # grouped by component
    assert_close(np.bincount(labels) / 20_000, weights, 0.02)
    for i, sigma in enumerate(oracle.matrices(covariances, covariance.name, 3, 2)):
        drawn = to_numpy(rows)[labels == i]
        assert_close(drawn.mean(axis=0) - means[i], np.zeros(2), 0.1)
        assert_close(np.cov(drawn.T), sigma, 0.1)
    with pytest.raises(NotFittedError):
        GaussianMixture().sample(1)
    for n, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="number of rows to sample"):
            mixture.sample(n)


def test_mixture_from_parameters(library, covariance):
    expected = fitted(covariance_type=covariance.name)
    mixture = GaussianMixture.from_parameters(
        *(library.asarray(getattr(expected, name)) for name in ("weights_", "means_", "covariances_")),
        covariance_type=covariance.name,
    )
    assert library.owns(mixture.precisions_cholesky_)
    assert_close(mixture.score(library.asarray(X)), expected.score(X), 1e-9)


def test_mixture_to_sklearn():
    mixture = fitted(covariance_regularization=1e-3)
    converted = mixture.to_sklearn()
    assert type(converted) is sklearn.mixture.GaussianMixture
    assert (converted.n_components, converted.reg_covar) == (3, 1e-3)
    assert_close(-converted.score_samples(X), mixture.score_samples(X), 1e-9)


def test_mixture_from_sklearn():
    theirs = sklearn.mixture.GaussianMixture(3, reg_covar=1e-3, random_state=0).fit(X)
    mixture = GaussianMixture.from_sklearn(theirs)
    assert (mixture.num_components, mixture.covariance_regularization) == (3, 1e-3)
    assert_close(mixture.score_samples(X), -theirs.score_samples(X), 1e-9)


@both
def test_get_metadata_routing(cls):
    assert cls().get_metadata_routing().fit.requests == {"sample_weight": None}
    assert cls().get_metadata_routing().predict.requests == {}


@both
def test_set_fit_request(cls):
    weight = np.arange(len(X)) % 3
    with sklearn.config_context(enable_metadata_routing=True):
        estimator = cls(3, random_state=0).set_fit_request(sample_weight=True)
        routed = Pipeline([("estimator", estimator)]).fit(X, sample_weight=weight)["estimator"]
    name = "means_" if cls is GaussianMixture else "centroids_"
    assert np.array_equal(getattr(routed, name), getattr(cls(3, random_state=0).fit(X, sample_weight=weight), name))


def test_mixture_set_partial_fit_request():
    mixture = GaussianMixture()
    assert mixture.get_metadata_routing().partial_fit.requests == {"sample_weight": None}
    with sklearn.config_context(enable_metadata_routing=True):
        mixture.set_partial_fit_request(sample_weight="mass")
    assert mixture.get_metadata_routing().partial_fit.requests == {"sample_weight": "mass"}


# GaussianMixture: attributes


def test_mixture_model_(library, covariance, dtype):
    torch = pytest.importorskip("torch")
    x = library.asarray(X, dtype)
    mixture = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(x)
    model = mixture.model_
    assert isinstance(model, gaussmix.GaussianMixtureModel)
    assert isinstance(model, torch.nn.Module)
    tensor = torch.as_tensor(X.astype(dtype))
    log_responsibilities, log_prob = model(tensor)
    tolerance = 1e-9 if dtype == "float64" else 1e-3
    assert_close(log_responsibilities.exp(), to_numpy(mixture.predict_proba(x)), tolerance)
    assert_close(-log_prob, to_numpy(mixture.score_samples(x)), tolerance)


def test_mixture_model_without_torch(library, covariance, monkeypatch):
    monkeypatch.setattr("gaussmix._mixture.find_spec", lambda name: None)
    mixture = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(library.asarray(X))
    expected = {
        "component_probs": mixture.weights_,
        "means": mixture.means_,
        "precisions_cholesky": mixture.precisions_cholesky_,
        "covariances": mixture.covariances_,
    }
    assert vars(mixture.model_) == expected


@both
def test_converged_(cls):
    assert fitted(cls).converged_ is True
    with pytest.warns(ConvergenceWarning) if cls is GaussianMixture else contextlib.nullcontext():
        assert fitted(cls, trainer_params={"max_epochs": 1}, convergence_tolerance=0).converged_ is False
    # NaN is an error, and no convergence.
    with pytest.raises(ValueError, match="NaN"):
        cls(3).fit(np.where(np.arange(120)[:, None] == 5, np.nan, X))


@unconverged
def test_mixture_num_iter_(covariance):
    for max_epochs in (0, 1, 7):
        params = dict(trainer_params={"max_epochs": max_epochs}, convergence_tolerance=0, batch_size=50)
        assert fitted(covariance_type=covariance.name, **params).num_iter_ == max_epochs
    done = fitted(covariance_type=covariance.name)
    assert 0 < done.num_iter_ < 100
    assert type(done.num_iter_) is int


@unconverged
def test_mixture_nll_(library, covariance):
    mixture, (*_, bounds) = few_iterations(library, covariance)
    assert type(mixture.nll_) is float
    assert mixture.nll_ == pytest.approx(-bounds[-1], abs=1e-9)


@unconverged
def test_mixture_lower_bounds_(library, covariance):
    mixture, (*_, bounds) = few_iterations(library, covariance)
    assert_close(mixture.lower_bounds_, bounds, 1e-9)
    assert type(mixture.lower_bounds_) is list


@unconverged
def test_mixture_weights_(library, covariance, dtype):
    mixture, (weights, *_) = few_iterations(library, covariance, dtype)
    assert_array(mixture.weights_, weights, library, dtype)


@unconverged
def test_mixture_means_(library, covariance, dtype):
    mixture, (_, means, *_) = few_iterations(library, covariance, dtype)
    assert_array(mixture.means_, means, library, dtype)


@unconverged
def test_mixture_covariances_(library, covariance, dtype):
    mixture, (_, _, covariances, _) = few_iterations(library, covariance, dtype)
    assert_array(mixture.covariances_, covariances, library, dtype)


@unconverged
def test_mixture_precisions_cholesky_(library, covariance, dtype):
    mixture, (_, _, covariances, _) = few_iterations(library, covariance, dtype)
    factors = to_numpy(mixture.precisions_cholesky_)
    if covariance.shape(1, 2)[-2:] == (2, 2):
        assert not np.tril(factors, -1).any()
        precisions = np.linalg.inv(covariances)
        assert_array(mixture.precisions_cholesky_, factors, library, dtype)
        assert_close(factors @ np.swapaxes(factors, -1, -2), precisions, PARAMETER_TOLERANCE[dtype])
    else:
        assert_array(mixture.precisions_cholesky_, covariances**-0.5, library, dtype)


def assert_array(found, expected, library, dtype):
    """In the library and the dtype of the data."""
    assert library.owns(found)
    assert to_numpy(found).dtype == dtype
    assert_close(to_numpy(found), expected, PARAMETER_TOLERANCE[dtype])


def test_mixture_backend_(library):
    mixture = GaussianMixture(3, random_state=0).fit(library.asarray(X))
    assert mixture.backend_.startswith(("numpy", "array_api"))


def test_mixture_precision_(library, dtype):
    mixture = GaussianMixture(3, random_state=0).fit(library.asarray(X, dtype))
    assert mixture.precision_ in ("expanded-float32", "expanded-float64", "centred-float64")


@both
def test_n_features_in_(library, cls):
    for d in (1, 3):
        assert cls(2, random_state=0).fit(library.asarray(X[:, :d])).n_features_in_ == d


@both
def test_attributes_before_fit(cls):
    for name in section(cls, "Attributes"):
        with pytest.raises(NotFittedError, match=f"{cls.__name__} has no {name} before it is fitted; call fit first"):
            getattr(cls(), name)
        assert not hasattr(cls(), name)
    with pytest.raises(AttributeError, match="no attribute 'moons_'"):
        cls().moons_  # noqa: B018 (it raises)


# KMeans


def lloyd(x, centroids, iterations=300, tolerance=0.0):
    """Lloyd's iterations: the centroids, the movements, and whether the last one was within the tolerance."""
    movements = []
    for _ in range(iterations):
        labels = pairwise_distances(x, centroids).argmin(axis=1)
        moved = np.stack([x[labels == k].mean(axis=0) for k in range(len(centroids))])
        movements.append(np.linalg.norm(moved - centroids))
        centroids = moved
        if movements[-1] ** 2 <= tolerance * x.var(axis=0).mean():
            return centroids, movements, True
    return centroids, movements, False


def seeds(**params):
    return fitted(KMeans, trainer_params={"max_epochs": 0}, **params).centroids_


def test_kmeans_num_clusters():
    assert KMeans().num_clusters == 1
    for k in (1, 2, np.int64(5)):
        assert fitted(KMeans, k).centroids_.shape == (k, 3)
    with pytest.raises(TypeError, match="positional argument"):
        KMeans(2, "random")
    assert_refused(KMeans, "num_clusters", [0, -1, 121], ValueError)
    assert_refused(KMeans, "num_clusters", [2.0, "2", None], TypeError)


def test_kmeans_init_strategy():
    assert KMeans().init_strategy == "kmeans++"
    expected, _ = kmeans_plusplus(X - X.mean(axis=0), 3, random_state=np.random.RandomState(0))
    assert_close(seeds(), expected + X.mean(axis=0), 1e-12)
    drawn = seeds(init_strategy="random")
    assert len(np.unique(drawn, axis=0)) == 3
    assert all((row == X).all(axis=1).any() for row in drawn)
    assert_refused(KMeans, "init_strategy", ["kmeans", "k-means++", None], ValueError)


def test_kmeans_convergence_tolerance():
    assert KMeans().convergence_tolerance == 1e-4
    for tolerance in (0.0, 1e-2, 0.2):
        found = fitted(KMeans, convergence_tolerance=tolerance, init_strategy="random")
        centroids, movements, converged = lloyd(X, seeds(init_strategy="random"), tolerance=tolerance)
        assert_close(found.centroids_, centroids, 1e-12)
        assert (found.num_iter_, found.converged_) == (len(movements), converged)
    assert_refused(KMeans, "convergence_tolerance", [-1e-3, np.nan], ValueError)
    assert_refused(KMeans, "convergence_tolerance", ["small", None], TypeError)


def test_kmeans_batch_size(library):
    assert KMeans().batch_size is None
    x = library.asarray(X)
    for batch_size in (1, 7, 1000):
        found = KMeans(3, random_state=0, batch_size=batch_size).fit(x)
        assert_close(to_numpy(found.centroids_), fitted(KMeans).centroids_, 1e-12)
        assert_close(to_numpy(found.transform(x)), fitted(KMeans).transform(X), 1e-12)
    assert_refused(KMeans, "batch_size", [0, -1], ValueError)
    assert_refused(KMeans, "batch_size", [2.5, "all"], TypeError)


def test_kmeans_trainer_params():
    assert KMeans().trainer_params is None
    params = dict(accelerator="cpu", devices=1, max_epochs=1, enable_progress_bar=False, logger=False)
    assert fitted(KMeans, trainer_params=params, convergence_tolerance=0, batch_size=50).num_iter_ == 1


def test_kmeans_predict(library, dtype):
    clustering = fitted(KMeans)
    labels = clustering.predict(library.asarray(X, dtype))
    assert library.owns(labels)
    assert to_numpy(labels).dtype == np.int64
    assert np.array_equal(to_numpy(labels), pairwise_distances(X, clustering.centroids_).argmin(axis=1))
    with pytest.raises(NotFittedError):
        KMeans().predict(X)


def test_kmeans_transform(library, dtype):
    clustering = fitted(KMeans)
    found = clustering.transform(library.asarray(X, dtype))
    assert_array(found, pairwise_distances(X, clustering.centroids_), library, dtype)


def test_kmeans_fit_transform(library):
    found = KMeans(3, random_state=0).fit_transform(library.asarray(X))
    assert_array(found, fitted(KMeans).transform(X), library, "float64")


def test_kmeans_score_samples(library, dtype):
    clustering = fitted(KMeans)
    found = clustering.score_samples(library.asarray(X, dtype))
    assert_array(found, pairwise_distances(X, clustering.centroids_).min(axis=1) ** 2, library, dtype)


def test_kmeans_score(library):
    clustering = fitted(KMeans)
    found = clustering.score(library.asarray(X))
    assert isinstance(found, float)
    assert found == pytest.approx((pairwise_distances(X, clustering.centroids_).min(axis=1) ** 2).mean(), rel=1e-12)


def test_kmeans_get_feature_names_out():
    assert fitted(KMeans).get_feature_names_out().tolist() == ["kmeans0", "kmeans1", "kmeans2"]


def test_kmeans_set_output():
    pandas = pytest.importorskip("pandas")
    frame = fitted(KMeans).set_output(transform="pandas").transform(X)
    assert isinstance(frame, pandas.DataFrame)
    assert frame.columns.tolist() == ["kmeans0", "kmeans1", "kmeans2"]


def test_kmeans_centroids_(library, dtype):
    found = KMeans(3, random_state=0).fit(library.asarray(X, dtype))
    assert_array(found.centroids_, lloyd(X, seeds())[0], library, dtype)


def test_kmeans_model_(library, monkeypatch):
    clustering = KMeans(3, random_state=0).fit(library.asarray(X))
    if find_spec("torch"):
        distances, labels, squares = clustering.model_(import_module("torch").as_tensor(X))
        assert_close(distances, to_numpy(clustering.transform(library.asarray(X))), 1e-12)
        assert_close(squares, to_numpy(clustering.score_samples(library.asarray(X))), 1e-12)
        assert np.array_equal(labels, to_numpy(clustering.predict(library.asarray(X))))
        assert_close(clustering.model_.centroids, to_numpy(clustering.centroids_), 0)
    monkeypatch.setattr("gaussmix._kmeans.find_spec", lambda name: None)
    assert vars(clustering.model_) == {"centroids": clustering.centroids_}


def test_kmeans_num_iter_():
    for max_epochs in (0, 1, 2):
        found = fitted(
            KMeans, trainer_params={"max_epochs": max_epochs}, convergence_tolerance=0, init_strategy="random"
        )
        assert found.num_iter_ == max_epochs
    assert fitted(KMeans).num_iter_ == len(lloyd(X, seeds(), tolerance=1e-4)[1])


def test_kmeans_inertia_():
    clustering = fitted(KMeans)
    # The mean, and no sum.
    squares = ((X[:, None] - clustering.centroids_) ** 2).sum(axis=2).min(axis=1)
    assert type(clustering.inertia_) is float
    assert clustering.inertia_ == pytest.approx(squares.mean(), rel=1e-12)


# The modules: more of them in test_torch.py


@pytest.fixture(params=["full", "tied", "diag", "spherical"])
def module(request):
    """A mixture, and its module."""
    pytest.importorskip("torch")
    mixture = fitted(covariance_type=request.param)
    return mixture, mixture.model_


def as_tensor(x):
    return import_module("torch").as_tensor(x)


def test_module_component_probs(module):
    mixture, model = module
    assert dict(model.named_buffers())["component_probs"] is model.component_probs
    assert_close(model.component_probs, mixture.weights_, 0)


def test_module_means(module):
    mixture, model = module
    assert dict(model.named_buffers())["means"] is model.means
    assert_close(model.means, mixture.means_, 0)


def test_module_precisions_cholesky(module):
    mixture, model = module
    assert dict(model.named_buffers())["precisions_cholesky"] is model.precisions_cholesky
    assert_close(model.precisions_cholesky, mixture.precisions_cholesky_, 0)
    assert len(dict(model.named_buffers())) == 3
    assert list(model.parameters()) == []


def test_module_covariances(module):
    mixture, model = module
    assert_close(model.covariances, mixture.covariances_, 1e-9)


def test_module_config(module):
    mixture, model = module
    assert model.config == gaussmix.GaussianMixtureModelConfig(3, 3, mixture.covariance_type)
    again = type(model)(model.config)
    assert again.means.shape == model.means.shape


def test_module_forward(module):
    mixture, model = module
    proba, nll = densities(mixture)
    log_responsibilities, log_prob = model.forward(as_tensor(X))
    assert log_responsibilities.shape == (120, 3)
    assert_close(log_responsibilities.exp(), proba, 1e-9)
    assert_close(log_prob, -nll, 1e-9)  # larger is better


def test_module_sample(module):
    _, model = module
    rows = model.sample(500)
    assert rows.shape == (500, 3)
    assert rows.dtype == model.means.dtype


def test_module_reset_parameters(module):
    _, model = module
    before = model.means.clone()
    model.reset_parameters()
    assert not (model.means == before).any()
    assert float(model.component_probs.sum()) == pytest.approx(1)
    assert model(as_tensor(X))[1].isfinite().all()


def test_module_save(module, tmp_path):
    _, model = module
    model.save(tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "parameters.safetensors"]
    model.save(tmp_path / "model", compile_model=True)
    assert "model.pt2" in os.listdir(tmp_path / "model")


def test_module_load(module, tmp_path):
    _, model = module
    model.save(tmp_path)
    loaded = gaussmix.GaussianMixtureModel.load(tmp_path)
    assert loaded.config == model.config
    for found, expected in zip(loaded(as_tensor(X)), model(as_tensor(X)), strict=True):
        assert_close(found, expected, 0)


def test_module_clone(module):
    _, model = module
    copy = model.clone()
    copy.means += 1
    assert_close(copy.means, model.means + 1, 0)
    assert not (model.clone(copy_parameters=False).means == model.means).any()


def test_config(covariance):
    pytest.importorskip("torch")
    config = gaussmix.GaussianMixtureModelConfig(num_components=2, num_features=5, covariance_type=covariance.name)
    assert dataclasses.asdict(config) == {"num_components": 2, "num_features": 5, "covariance_type": covariance.name}
    model = gaussmix.GaussianMixtureModel(config)
    assert tuple(model.precisions_cholesky.shape) == covariance.shape(2, 5)


# Habits of scripts


@pytest.mark.parametrize("caught", ["torch.linalg", "numpy.linalg"])
@pytest.mark.parametrize("covariance_type", ["full", "tied"])
def test_raising_the_regularisation_until_a_fit_succeeds(library, covariance_type, caught):
    error = pytest.importorskip(caught).LinAlgError
    # Two equal features with a variance of 2^20, next to which 1e-10 is nothing.
    x = library.asarray(np.repeat([[-1024.0, -1024.0], [1024.0, 1024.0]], 16, axis=0))
    regularization, failures = 1e-12, 0
    while True:
        mixture = GaussianMixture(covariance_type=covariance_type, covariance_regularization=regularization)
        try:
            mixture.fit(x)
            break
        except error:
            failures += 1
            regularization *= 10
    assert failures == 3
    assert np.all(np.isfinite(to_numpy(mixture.precisions_cholesky_)))


def test_set_logging_level(caplog):
    logger = logging.getLogger("gaussmix")
    before = logger.level
    try:
        for level, expected in (("WARNING", logging.WARNING), (logging.INFO, logging.INFO)):
            gaussmix.set_logging_level(level)
            assert logger.level == expected
        fitted(trainer_params={"enable_progress_bar": False})
        assert "EM iterations on" in caplog.text
    finally:
        logger.setLevel(before)


# The table


SHARED = {
    "fit": test_fit,
    "fit_predict": test_fit_predict,
    "clone": test_clone,
    "get_params": test_get_params,
    "set_params": test_set_params,
    "save": test_save,
    "load": test_load,
    "save_parameters": test_save_parameters,
    "load_parameters": test_load_parameters,
    "save_attributes": test_save_attributes,
    "load_attributes": test_load_attributes,
    "persistent_attributes": test_persistent_attributes,
    "trainer": test_trainer,
    "trainer_params_user": test_trainer_params_user,
    "NotFittedError": test_attributes_before_fit,
    "converged_": test_converged_,
}
# What PyCave documents.
CONTRACT = {
    "GaussianMixture": SHARED
    | {
        "num_components": test_mixture_num_components,
        "covariance_type": test_mixture_covariance_type,
        "init_strategy": test_mixture_init_strategy,
        "init_means": test_mixture_init_means,
        "convergence_tolerance": test_mixture_convergence_tolerance,
        "covariance_regularization": test_mixture_covariance_regularization,
        "batch_size": test_mixture_batch_size,
        "trainer_params": test_mixture_trainer_params,
        "num_workers": test_mixture_num_workers,
        "predict": test_mixture_predict,
        "predict_proba": test_mixture_predict_proba,
        "sample": test_mixture_sample,
        "score": test_mixture_score,
        "score_samples": test_mixture_score_samples,
        "model_": test_mixture_model_,
        "num_iter_": test_mixture_num_iter_,
        "nll_": test_mixture_nll_,
    },
    "KMeans": SHARED
    | {
        "num_clusters": test_kmeans_num_clusters,
        "init_strategy": test_kmeans_init_strategy,
        "convergence_tolerance": test_kmeans_convergence_tolerance,
        "batch_size": test_kmeans_batch_size,
        "trainer_params": test_kmeans_trainer_params,
        "predict": test_kmeans_predict,
        "transform": test_kmeans_transform,
        "fit_transform": test_kmeans_fit_transform,
        "score": test_kmeans_score,
        "score_samples": test_kmeans_score_samples,
        "model_": test_kmeans_model_,
        "num_iter_": test_kmeans_num_iter_,
        "inertia_": test_kmeans_inertia_,
    },
    "GaussianMixtureModel": {
        "component_probs": test_module_component_probs,
        "means": test_module_means,
        "precisions_cholesky": test_module_precisions_cholesky,
        "covariances": test_module_covariances,
        "config": test_module_config,
        "forward": test_module_forward,
        "sample": test_module_sample,
        "reset_parameters": test_module_reset_parameters,
        "save": test_module_save,
        "load": test_module_load,
        "clone": test_module_clone,
    },
    "GaussianMixtureModelConfig": dict.fromkeys(("num_components", "num_features", "covariance_type"), test_config),
    "gaussmix": {"set_logging_level": test_set_logging_level},
}
# What gaussmix adds to the classes: tests, or files that are all about it.
SHARED_ADDED = {
    "random_state": test_random_state,
    "n_features_in_": test_n_features_in_,
    "get_metadata_routing": test_get_metadata_routing,
    "set_fit_request": test_set_fit_request,
}
ADDED = {
    "GaussianMixture": SHARED_ADDED
    | {
        "from_parameters": test_mixture_from_parameters,
        "from_sklearn": test_mixture_from_sklearn,
        "to_sklearn": test_mixture_to_sklearn,
        "partial_fit": "test_partial_fit.py",
        "set_partial_fit_request": test_mixture_set_partial_fit_request,
        "weights_": test_mixture_weights_,
        "means_": test_mixture_means_,
        "covariances_": test_mixture_covariances_,
        "precisions_cholesky_": test_mixture_precisions_cholesky_,
        "lower_bounds_": test_mixture_lower_bounds_,
        "n_steps_": "test_partial_fit.py",
        "covariance_type_": "test_sklearn.py",
        "backend_": test_mixture_backend_,
        "precision_": test_mixture_precision_,
    },
    "KMeans": SHARED_ADDED
    | {
        "centroids_": test_kmeans_centroids_,
        "get_feature_names_out": test_kmeans_get_feature_names_out,
        "set_output": test_kmeans_set_output,
    },
}
# Public names of the package whose promises other files test.
ELSEWHERE = {
    "Estimate": "test_estimate.py",
    "estimate": "test_estimate.py",
    "__version__": "test_architecture.py",
}


def section(cls, title):
    """The names in a section of a numpydoc docstring."""
    body = re.search(rf"^{title}\n-+\n(.*?)(?=^\S[^\n]*\n---|\Z)", inspect.getdoc(cls), re.MULTILINE | re.DOTALL).group(
        1
    )
    return {name for line in re.findall(r"^(\w[\w, ]*?) *(?::|$)", body, re.MULTILINE) for name in line.split(", ")}


def public_names(cls):
    """Parameters, public methods and properties, documented attributes."""
    parameters = set(inspect.signature(cls).parameters)
    assert section(cls, "Parameters") == parameters
    members = {name for name, value in inspect.getmembers(cls) if callable(value) or isinstance(value, property)}
    return parameters | {name for name in members if not name.startswith("_")} | section(cls, "Attributes")


@both
def test_every_public_name_has_a_row(cls):
    rows = CONTRACT[cls.__name__] | ADDED[cls.__name__]
    assert public_names(cls) == rows.keys() - {"NotFittedError"}


@both
def test_every_fitted_attribute_is_documented(cls):
    assert {name for name in vars(fitted(cls)) if name.endswith("_")} | {"model_"} == section(cls, "Attributes")


def test_every_public_name_of_the_package_is_covered():
    covered = CONTRACT.keys() | CONTRACT["gaussmix"].keys() | ELSEWHERE.keys()
    assert set(gaussmix.__all__) == covered - {"gaussmix"}


def test_every_row_has_a_test():
    for rows in (*CONTRACT.values(), *ADDED.values(), ELSEWHERE):
        for name, test in rows.items():
            if isinstance(test, str):
                assert re.search(rf"\b{name}\b", (Path(__file__).parent / test).read_text()), name
                continue
            assert globals()[test.__name__] is test, name  # not shadowed: pytest runs it
            assert name in test.__name__ or test in (test_config, test_attributes_before_fit), name
