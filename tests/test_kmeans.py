"""KMeans with PyCave's contract."""

import numpy as np
import pytest
from sklearn.cluster import KMeans as Reference
from sklearn.utils.estimator_checks import parametrize_with_checks
from threadpoolctl import threadpool_limits

from cases import OnRows, assert_close, blobs
from gaussmix import KMeans
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix.backends import _array_api, _numpy
from gaussmix.rows._data import Rows

pytestmark = pytest.mark.usefixtures("implementation")

X = blobs(n=500, d=3, k=4, seed=2)


# PyCave's KMeans has no labels_, which is what these look at.
NO_LABELS = dict.fromkeys(["check_clustering"], "no attribute labels_")


@parametrize_with_checks([KMeans()], expected_failed_checks=lambda estimator: NO_LABELS)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_everything_is_a_function_of_the_centroids(library, dtype):
    x = library.asarray(X, dtype)
    clustering = KMeans(4, random_state=0).fit(x)
    centroids = to_numpy(clustering.model_.centroids).astype(np.float64)
    distances = np.linalg.norm(X.astype(dtype)[:, None].astype(np.float64) - centroids, axis=2)
    tolerance = 1e-6 if dtype == "float32" else 1e-12
    assert np.array_equal(to_numpy(clustering.predict(x)), distances.argmin(axis=1))
    assert_close(to_numpy(clustering.transform(x)), distances, tolerance)
    assert_close(to_numpy(clustering.score_samples(x)), distances.min(axis=1) ** 2, tolerance)
    assert_close(clustering.score(x), (distances.min(axis=1) ** 2).mean(), tolerance)
    assert_close(clustering.inertia_, clustering.score(x), tolerance)
    assert np.array_equal(to_numpy(clustering.fit_predict(x)), to_numpy(clustering.predict(x)))
    assert np.array_equal(to_numpy(clustering.fit_transform(x)), to_numpy(clustering.transform(x)))
    for out in (clustering.centroids_, clustering.predict(x), clustering.transform(x), clustering.score_samples(x)):
        assert library.owns(out)
    assert str(clustering.centroids_.dtype).endswith(dtype)


def test_finds_the_clusters_of_scikit_learn(library):
    expected = Reference(4, n_init=5, random_state=0).fit(X)
    found = min((KMeans(4, random_state=seed).fit(library.asarray(X)) for seed in range(5)), key=lambda c: c.inertia_)
    assert_close(found.inertia_ * len(X), expected.inertia_, 1e-6)


def test_weights_count_as_repeated_rows(library):
    weight = np.random.RandomState(0).randint(1, 4, size=len(X))
    found = KMeans(1, random_state=0).fit(library.asarray(X), sample_weight=library.asarray(weight))
    assert_close(to_numpy(found.centroids_)[0], np.average(X, axis=0, weights=weight), 1e-12)
    expected = ((X - np.average(X, axis=0, weights=weight)) ** 2).sum(axis=1)
    assert_close(found.inertia_, np.average(expected, weights=weight), 1e-12)


@pytest.mark.parametrize("strategy", ["kmeans++", "random"])
def test_strategies_and_seeds(strategy):
    first, second = (KMeans(4, init_strategy=strategy, random_state=3).fit(X) for _ in range(2))
    assert np.array_equal(first.centroids_, second.centroids_)
    assert first.converged_


@pytest.mark.parametrize("bad", [X[:3], np.full((9, 3), np.nan), X[:, 0], 1e200 * X])
def test_a_refused_fit_changes_nothing(bad):
    frame = pytest.importorskip("pandas").DataFrame(X, columns=["a", "b", "c"])
    clustering = KMeans(4, random_state=0).fit(frame)
    before, labels = dict(vars(clustering)), clustering.predict(frame)
    with pytest.raises(ValueError):
        clustering.fit(bad)
    assert vars(clustering).keys() == before.keys()
    assert all(value is before[name] for name, value in vars(clustering).items())
    assert np.array_equal(clustering.predict(frame), labels)


def test_what_was_fitted_knows_its_number_of_clusters():
    clustering = KMeans(4, random_state=0).fit(X)
    clustering.set_params(num_clusters=7)
    assert len(clustering.get_feature_names_out()) == clustering.transform(X).shape[1] == 4


def test_max_epochs_ends_early():
    clustering = KMeans(4, trainer_params={"max_epochs": 1}, convergence_tolerance=0, random_state=0).fit(X)
    assert clustering.num_iter_ == 1
    assert not clustering.converged_


def test_equal_rows(library):
    clustering = KMeans(3, random_state=0).fit(library.asarray(np.zeros((10, 2))))
    assert clustering.inertia_ == 0
    assert np.all(to_numpy(clustering.centroids_) == 0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch_size", [None, 100])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (300, 1, 3), (5000, 3, 17), (20_000, 2, 4)])
def test_slabs_equal_the_array_api(dtype, n, d, k, batch_size, weighted, monkeypatch):
    monkeypatch.setattr(_numpy, "SLAB_FLOPS", 1)
    x = (1000 + np.random.RandomState(n).normal(size=(n, d))).astype(dtype)
    weight = np.random.RandomState(0).uniform(0, 2, size=n) * (np.arange(n) % 3 > 0) if weighted else None
    centroids = x[np.random.RandomState(1).randint(n, size=k)].astype(np.float64)
    fast, exact = (
        OnRows(module, Rows(x, weight, batch_size), COVARIANCES["diag"]).engine for module in (_numpy, _array_api)
    )
    assert np.array_equal(fast.nearest(centroids), exact.nearest(centroids))
    assert_close(fast.squared_distances(centroids), exact.squared_distances(centroids), 1e-12)
    for found, expected in zip(fast.sums(centroids, x[0]), exact.sums(centroids, x[0]), strict=True):
        assert_close(found, expected, 1e-11)


def test_equal_centroids_share_no_rows():
    x = np.random.RandomState(0).normal(size=(1000, 2))
    centroids = np.repeat(x[:4], 2, axis=0)
    for module in (_numpy, _array_api):
        on_rows = OnRows(module, Rows(x), COVARIANCES["diag"]).engine
        assert set(on_rows.nearest(centroids)) == {0, 2, 4, 6}
        assert on_rows.sums(centroids, x[0])[0].sum() == 1000


def test_the_result_does_not_depend_on_the_number_of_threads(dtype, monkeypatch):
    monkeypatch.setattr(_numpy, "SLAB_FLOPS", 1)
    x = blobs(n=9000, d=4, k=5, seed=3).astype(dtype)
    fits = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            fits.append(KMeans(5, random_state=0).fit(x))
    assert np.array_equal(fits[0].centroids_, fits[1].centroids_)
    assert fits[0].inertia_ == fits[1].inertia_
