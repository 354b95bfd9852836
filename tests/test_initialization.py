"""Where EM and k-means start."""

import numpy as np
import pytest
from sklearn.cluster import KMeans as ReferenceKMeans

from cases import assert_close, blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix._arrays import to_numpy
from gaussmix._initialization import find_means, lloyd
from gaussmix.backends._array_api import nearest
from gaussmix.backends._dispatch import clusters
from gaussmix.rows._data import Rows
from gaussmix.sklearn import GaussianMixture as SklearnMixture

STRATEGIES = ("kmeans", "kmeans++", "random", "random_from_data")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_seed_gives_one_start_in_every_library(library, covariance, dtype, strategy):
    x = blobs(n=400, d=3, k=3, seed=1).astype(dtype)
    settings = {"covariance_type": covariance.name, "init_strategy": strategy, "trainer_params": {"max_epochs": 0}}
    found = GaussianMixture(3, **settings, random_state=7).fit(library.asarray(x))
    again = GaussianMixture(3, **settings, random_state=np.random.RandomState(7)).fit(x)
    other = GaussianMixture(3, **settings, random_state=8).fit(x)
    tolerance = 1e-6 if dtype == "float32" else 1e-12
    assert_close(to_numpy(found.means_), again.means_, tolerance, "means")
    assert_close(to_numpy(found.covariances_), again.covariances_, tolerance, "covariances")
    assert found.num_iter_ == 0
    assert not found.converged_
    if strategy == "random":
        assert np.abs(other.means_ - again.means_).max() > 1e-3


@pytest.mark.parametrize("strategy", ["kmeans", "kmeans++", "random_from_data"])
def test_rows_belong_to_the_nearest_mean_and_parameters_are_theirs(covariance, strategy):
    x = blobs(n=300, d=2, k=3, seed=2)
    rows = Rows(x)
    means = find_means(rows, 3, strategy, np.random.RandomState(0))
    labels = np.argmin(((x[:, None] - means) ** 2).sum(axis=2), axis=1)
    mixture = GaussianMixture(
        3, covariance_type=covariance.name, init_strategy=strategy, trainer_params={"max_epochs": 0}, random_state=0
    ).fit(x)
    assert_close(mixture.weights_, np.bincount(labels) / len(x), 1e-12, "weights")
    assert_close(mixture.means_, [x[labels == k].mean(axis=0) for k in range(3)], 1e-12, "means")
    within = np.stack([np.cov(x[labels == k].T, bias=True) for k in range(3)])
    counts = np.bincount(labels)
    variances = np.stack([np.diag(sigma) for sigma in within])
    expected = {
        "full": within + 1e-6 * np.eye(2),
        "tied": np.tensordot(counts, within, 1) / counts.sum() + 1e-6 * np.eye(2),
        "diag": variances + 1e-6,
        "tied_diag": counts @ variances / counts.sum() + 1e-6,
        "spherical": variances.mean(axis=1) + 1e-6,
    }[covariance.name]
    assert_close(mixture.covariances_, expected, 1e-10, "covariances")


def test_random_from_data_starts_at_rows():
    x = blobs(n=50, d=2, k=2)
    means = find_means(Rows(x), 5, "random_from_data", np.random.RandomState(0))
    assert all((x == mean).all(axis=1).any() for mean in means)
    assert len(np.unique(means, axis=0)) == 5


def test_kmeans_start_is_as_good_as_scikit_learns_kmeans():
    x = blobs(n=50_000, d=8, k=16, seed=3, spread=2.0)
    ratios = []
    for seed in range(10):
        means = find_means(Rows(x), 16, "kmeans", np.random.RandomState(seed))
        reference = ReferenceKMeans(16, n_init=1, random_state=seed).fit(x)
        ratios.append(float(clusters(Rows(x)).squared_distances(means).sum()) / reference.inertia_)
    assert np.median(ratios) < 1.01


@pytest.mark.usefixtures("implementation")
def test_lloyd_ends_where_scikit_learns_does_from_the_same_seeds():
    x = blobs(n=2000, d=3, k=5, seed=4, spread=3.0)
    seeds = x[:5]
    expected = ReferenceKMeans(5, init=seeds, n_init=1, tol=0, algorithm="lloyd").fit(x)
    found = lloyd(clusters(Rows(x)), seeds, tolerance=0, max_iter=300)
    assert found.converged
    assert_close(found.centroids, expected.cluster_centers_, 1e-9)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("unit", [2.0**-20, 2.0**14, 2.0**20])
def test_lloyd_takes_the_same_iterations_in_every_unit(library, dtype, unit):
    x = blobs(n=2000, d=3, k=5, seed=4, spread=3.0).astype(dtype)
    movements = {1.0: [], unit: []}
    results = {}
    for scale, seen in movements.items():
        rows = Rows(library.asarray(scale * x, dtype))
        seeds = scale * x[:5].astype(np.float64)
        results[scale] = lloyd(
            clusters(rows), seeds, tolerance=1e-4, max_iter=300, callback=lambda i, move, seen=seen: seen.append(move)
        )
    assert results[unit].n_iter == results[1.0].n_iter > 3
    assert results[unit].converged
    assert [move / unit for move in movements[unit]] == movements[1.0]
    assert np.array_equal(to_numpy(results[unit].centroids) / unit, to_numpy(results[1.0].centroids))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e4, 1e6])
def test_lloyd_stops_where_scikit_learn_does(unit):
    x = unit * blobs(n=2000, d=3, k=5, seed=4, spread=3.0)
    expected = ReferenceKMeans(5, init=x[:5], n_init=1, tol=1e-4, algorithm="lloyd").fit(x)
    found = lloyd(clusters(Rows(x)), x[:5], tolerance=1e-4, max_iter=300)
    assert found.n_iter == expected.n_iter_
    assert_close(found.centroids / unit, expected.cluster_centers_ / unit, 1e-9)


@pytest.mark.usefixtures("implementation")
def test_an_empty_cluster_moves_to_the_farthest_row(library):
    x = np.array([[0.0], [1.0], [2.0], [50.0], [51.0], [100.0]])
    seeds = library.asarray([[1.0], [1000.0], [2000.0]])
    found = lloyd(clusters(Rows(library.asarray(x))), seeds, tolerance=0, max_iter=10)
    # All rows belong to the first centroid; 100 and then 0 are farthest from their mean, 34.
    assert sorted(to_numpy(found.centroids)[:, 0].tolist()) == [1.0, 50.5, 100.0]


@pytest.mark.usefixtures("implementation")
def test_an_empty_cluster_moves_to_a_row_that_has_weight(library):
    x = np.array([[0.0], [1.0], [50.0], [1000.0]])
    rows = Rows(library.asarray(x), library.asarray([1.0, 1.0, 1.0, 0.0]))
    found = lloyd(clusters(rows), np.zeros((3, 1)), tolerance=0, max_iter=10)
    assert sorted(to_numpy(found.centroids)[:, 0].tolist()) == [0, 1, 50]


@pytest.mark.usefixtures("implementation")
def test_clusters_stay_empty_where_rows_are_fewer_than_centroids(library):
    x = library.asarray(np.repeat([[0.0, 0.0], [1.0, 1.0]], 10, axis=0))
    found = lloyd(clusters(Rows(x)), library.asarray([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]]), tolerance=0, max_iter=10)
    assert found.converged
    assert to_numpy(found.centroids).tolist() == [[0, 0], [1, 1], [5, 5]]


def test_nearest_keeps_its_digits_far_from_the_origin(library):
    x = 1e8 + np.arange(20.0)[:, None]
    centroids = np.array([[1e8 + 4.9], [1e8 + 5.1], [1e8 + 15]])
    expected = np.argmin(np.abs(x - centroids.T), axis=1)
    assert np.array_equal(to_numpy(nearest(library.asarray(x), library.asarray(centroids))), expected)


def test_init_means_are_taken_as_kmeans_found_them(library, covariance):
    x = blobs(n=200, d=2, k=2, seed=5)
    means = x[[0, 1]]
    mixture = GaussianMixture(
        2, covariance_type=covariance.name, init_means=library.asarray(means), trainer_params={"max_epochs": 0}
    ).fit(library.asarray(x))
    labels = np.argmin(((x[:, None] - means) ** 2).sum(axis=2), axis=1)
    assert_close(to_numpy(mixture.means_), [x[labels == k].mean(axis=0) for k in range(2)], 1e-12)


def in_memory(x, library):
    return library.asarray(x)


def in_blocks(x, library):
    parts = [library.asarray(x[:150]), library.asarray(x[150:])]
    return type("Parts", (), {"__iter__": lambda self: iter(parts)})()


def in_dask(x, library):
    if library.name != "numpy":
        pytest.skip("Dask's arrays here are made of NumPy's")
    return pytest.importorskip("dask.array").from_array(x, chunks=(150, 2))


@pytest.mark.parametrize("source", [in_memory, in_blocks, in_dask])
@pytest.mark.parametrize("given", [(30.0, 70.0), (1.0, 99.0)])
def test_means_far_from_their_rows_cost_no_digits(library, covariance, source, given):
    x = 100.0 * (np.arange(400) % 2)[:, None] + 1e-6 * np.random.RandomState(0).normal(size=(400, 2))
    within = [np.cov(x[label::2].T, bias=True) for label in (0, 1)]
    expected = {
        "full": within,
        "tied": np.mean(within, axis=0),
        "diag": [np.diag(matrix) for matrix in within],
        "tied_diag": np.diag(np.mean(within, axis=0)),
        "spherical": [np.diag(matrix).mean() for matrix in within],
    }[covariance.name]
    data, means = source(x, library), np.repeat(np.array(given)[:, None], 2, axis=1)
    for max_epochs in (0, 10):
        mixture = GaussianMixture(
            2,
            covariance_type=covariance.name,
            covariance_regularization=0,
            init_means=means,
            trainer_params={"max_epochs": max_epochs},
        ).fit(data)
        assert np.abs(to_numpy(mixture.covariances_) - expected).max() <= 1e-9 * np.abs(expected).max()


def test_a_component_without_rows_keeps_its_place(library, covariance, dtype):
    x = np.random.RandomState(0).normal(size=(200, 1)).astype(dtype)
    for max_epochs in range(4):
        mixture = GaussianMixture(
            2,
            covariance_type=covariance.name,
            init_means=[[0.0], [1000.0]],
            trainer_params={"max_epochs": max_epochs},
            convergence_tolerance=0.5,
        )
        if max_epochs == 1:
            continue  # one iteration can not have converged: that it warns is tested elsewhere
        mixture.fit(library.asarray(x))
        assert to_numpy(mixture.weights_).tolist() == [1.0, 0.0]
        assert to_numpy(mixture.means_)[1].tolist() == [1000.0]
        variance = float(x.var()) + 1e-6
        assert_close(
            to_numpy(mixture.covariances_).ravel(), np.full(to_numpy(mixture.covariances_).size, variance), 1e-5
        )
        assert np.all(np.isfinite(to_numpy(mixture.score_samples(library.asarray(x)))))
        assert to_numpy(mixture.predict_proba(library.asarray(x)))[:, 1].max() == 0


def test_given_parts_replace_those_of_the_start(covariance):
    x = blobs(n=200, d=2, k=2, seed=6)
    means = np.array([[0.0, 0.0], [1.0, 1.0]])
    weights = np.array([0.25, 0.75])
    shape = covariance.shape(2, 2)
    precisions = np.broadcast_to(
        2 * (np.eye(2) if covariance.has_matrices else np.ones(())),
        shape,
    ).copy()
    mixture = SklearnMixture(
        2, covariance_type=covariance.name, max_iter=0, weights_init=weights, means_init=means, random_state=0
    ).fit(x)
    assert mixture.weights_.tolist() == weights.tolist()
    assert mixture.means_.tolist() == means.tolist()
    only_precisions = SklearnMixture(
        2, covariance_type=covariance.name, max_iter=0, precisions_init=precisions, random_state=0
    ).fit(x)
    assert_close(only_precisions.precisions_, precisions, 1e-12)
    assert not np.allclose(only_precisions.means_, means)


@pytest.mark.parametrize("estimator", [GaussianMixture(2), SklearnMixture(2), KMeans(2)])
def test_global_generators_stay_untouched(estimator):
    torch = pytest.importorskip("torch")
    np.random.seed(0)
    torch.manual_seed(0)
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state().clone()
    estimator.fit(torch.as_tensor(blobs(n=200, k=2)))
    if hasattr(estimator, "sample"):
        estimator.sample(3)
    assert np.array_equal(np.random.get_state()[1], before)
    assert torch.equal(torch.get_rng_state(), torch_before)
