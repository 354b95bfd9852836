"""k-means against `_array_api`."""

import numpy as np
import pytest
import torch

import gaussmix_kernels as kernels
from cases import assert_close
from gaussmix import KMeans
from gaussmix._arrays import to_numpy
from gaussmix.backends import _array_api, _triton
from gaussmix.rows._data import Rows
from gaussmix_kernels import _kmeans
from kernels.common import prepare, rows, tensor

SHAPES = [(1, 1, 1), (45, 2, 3), (70, 5, 17), (33, 33, 3), (20, 3, 70)]


@pytest.mark.parametrize(("n", "d", "k"), SHAPES)
def test_nearest_centroid_and_sums(n, d, k, exact):
    x, weight = rows(n, d, weighted=True)
    centroids = x[np.random.RandomState(1).randint(n, size=k)] + 0.01
    data = prepare(x, weight, exact=exact)
    labels = kernels.nearest(data, tensor(centroids) - data.shift)
    distances = ((x[:, None] - centroids) ** 2).sum(axis=2)
    found = distances[np.arange(n), to_numpy(labels)]
    assert np.all(found <= distances.min(axis=1) + (1e-11 if exact else 1e-4))
    counts, sums = kernels.sums(data, labels, k)
    assigned = np.eye(k)[to_numpy(labels)] * (1 if weight is None else weight[:, None])
    assert_close(counts, assigned.sum(axis=0), 1e-12 if exact else 1e-6)
    assert_close(sums, assigned.T @ (x - to_numpy(data.shift)), 1e-12 if exact else 1e-6)


def test_sums_of_several_slabs(exact, short_slabs):
    test_nearest_centroid_and_sums(101, 3, 4, exact)


def test_the_first_of_equal_centroids(exact):
    x, _ = rows(50, 2)
    data = prepare(x, exact=exact)
    labels = kernels.nearest(data, tensor(np.repeat(x[:20], 2, axis=0)) - data.shift)
    assert set(to_numpy(labels)) <= set(range(0, 40, 2))


def test_squared_distances_are_those_of_the_rows(monkeypatch):
    monkeypatch.setattr(_kmeans, "ROWS", 7)
    x, _ = rows(30, 3)
    labels = np.arange(30) % 4
    found = kernels.squared_distances(tensor(x.astype(np.float32)), tensor(x[:4]), tensor(labels, dtype=torch.int32))
    assert_close(found, ((x - x[labels]) ** 2).sum(axis=1), 1e-14)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), SHAPES[:4])
def test_clusters_equal_the_array_api(dtype, n, d, k, weighted):
    x, weight = rows(n, d, weighted=weighted)
    centroids = x[np.random.RandomState(1).randint(n, size=k)]
    found = _triton.Block(Rows(tensor(x.astype(dtype), "F"), None if weight is None else tensor(weight)))
    exact = _array_api.Block(Rows(x, weight))
    labels = to_numpy(found.nearest(tensor(centroids)))
    assert labels.dtype == np.int64
    distances = np.linalg.norm(x[:, None] - centroids, axis=2)
    assert np.all(distances[np.arange(n), labels] <= distances.min(axis=1) + 1e-4)
    tolerance = 1e-6 if dtype == "float32" else 1e-12
    assert_close(to_numpy(found.squared_distances(tensor(centroids))), exact.squared_distances(centroids), tolerance)
    value, expected = found.sums(tensor(centroids), tensor(x[0])), exact.sums(centroids, x[0])
    assert_close(to_numpy(value), expected, 1e-6 if dtype == "float32" else 1e-11)


@pytest.mark.parametrize("strategy", ["kmeans++", "random"])
@pytest.mark.parametrize("weighted", [False, True])
def test_fits_equal_those_of_numpy(dtype, strategy, weighted, monkeypatch):
    x, weight = rows(120, 3, weighted=weighted)
    x += 20 * (np.arange(120) % 3)[:, None]
    x = x.astype(dtype)
    expected = KMeans(3, init_strategy=strategy, random_state=0).fit(x, sample_weight=weight)
    monkeypatch.setenv("GAUSSMIX_BACKEND", "triton")
    there = tensor(x)
    found = KMeans(3, init_strategy=strategy, random_state=0)
    found.fit(there, sample_weight=None if weight is None else tensor(weight))
    tolerance = 1e-5 if dtype == "float32" else 1e-11
    assert isinstance(found.centroids_, torch.Tensor)
    assert found.centroids_.dtype == there.dtype
    assert_close(to_numpy(found.centroids_), expected.centroids_, tolerance)
    assert found.inertia_ == pytest.approx(expected.inertia_, rel=tolerance)
    labels, distances, scores = found.predict(there), found.transform(there), found.score_samples(there)
    monkeypatch.delenv("GAUSSMIX_BACKEND")
    assert labels.dtype == torch.int64
    assert np.array_equal(to_numpy(labels), expected.predict(x))
    assert_close(to_numpy(distances), expected.transform(x), tolerance)
    assert_close(to_numpy(scores), expected.score_samples(x), tolerance)
