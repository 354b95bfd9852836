"""Dask arrays: fits on the active scheduler, lazy predictions, and what goes wrong with both."""

import logging
import os
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import PARAMETER_TOLERANCE, assert_close, blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix._covariance import COVARIANCES
from gaussmix.sklearn import GaussianMixture as SklearnMixture

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

pytestmark = pytest.mark.usefixtures("unconverged")

ARRAYS = ("weights_", "means_", "covariances_", "precisions_cholesky_")
STRATEGIES = ("kmeans", "kmeans++", "random", "random_from_data")
TYPES = st.sampled_from(sorted(COVARIANCES))


def fitted(x, k=3, sample_weight=None, **params):
    params = {"random_state": 0, "convergence_tolerance": 0, "trainer_params": {"max_epochs": 6}} | params
    return GaussianMixture(k, **params).fit(x, sample_weight=sample_weight)


def assert_same_fit(found, expected, tolerance=1e-9):
    for name in ARRAYS:
        assert type(getattr(found, name)) is np.ndarray
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert_close(getattr(found, name), getattr(expected, name), tolerance, name)
    assert_close(found.lower_bounds_, expected.lower_bounds_, tolerance, "lower bounds")
    assert (found.backend_, found.converged_) == (expected.backend_, expected.converged_)


def counted(x, chunks):
    """x in chunks, and the numbers of the blocks that have been read."""
    read, lock = [], threading.Lock()

    def look(block, block_id=None):
        with lock:
            read.append(block_id[0])
        return block

    return da.from_array(x, chunks=chunks).map_blocks(look, dtype=x.dtype, meta=x[:0]), read


# The same fit as in memory


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_dask_array_is_fitted_as_the_array_it_stands_for(covariance, dtype, strategy):
    x = blobs(n=400).astype(dtype)
    params = {"covariance_type": covariance.name, "init_strategy": strategy}
    assert_same_fit(fitted(da.from_array(x, chunks=(90, 2)), **params), fitted(x, **params), PARAMETER_TOLERANCE[dtype])


@st.composite
def chunkings(draw, n):
    """Numbers of rows of chunks, some of them 0 or 1, and weights: none, or one chunk's and every third row's of 0."""
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=10)))
    sizes = np.diff([0, *cuts, n]).tolist()
    if draw(st.booleans()):
        return tuple(sizes), None
    weight = np.random.RandomState(draw(st.integers(0, 99))).uniform(0.5, 2, size=n)
    weight[::3] = 0
    chunk = draw(st.integers(0, len(cuts)))
    if sizes[chunk] < n // 2:
        weight[sum(sizes[:chunk]) : sum(sizes[: chunk + 1])] = 0
    return tuple(sizes), weight


@given(TYPES, st.sampled_from(STRATEGIES), chunkings(120), st.booleans())
@settings(max_examples=20)
def test_chunks_and_weights_change_nothing(covariance_type, strategy, chunking, is_lazy):
    sizes, weight = chunking
    x = blobs(n=120, d=2, k=3)
    params = {"covariance_type": covariance_type, "init_strategy": strategy, "covariance_regularization": 1e-3}
    lazy = da.from_array(weight, chunks=50) if is_lazy and weight is not None else weight
    with dask.config.set(scheduler="synchronous"):
        found = fitted(da.from_array(x, chunks=(sizes, 1)), sample_weight=lazy, **params)
    assert_same_fit(found, fitted(x, sample_weight=weight, **params))


def test_chunks_of_one_row():
    x = blobs(n=60, d=2, k=2)
    assert_same_fit(fitted(da.from_array(x, chunks=(1, -1)), k=2), fitted(x, k=2))


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_the_active_scheduler_runs_it(scheduler):
    x, seen = blobs(n=300), set()

    def look(block):
        seen.add(threading.get_ident())
        return block

    X = da.from_array(x, chunks=(50, -1)).map_blocks(look, dtype=x.dtype, meta=x[:0])
    with dask.config.set(scheduler=scheduler):
        found = fitted(X)
    assert_same_fit(found, fitted(x))
    assert (threading.get_ident() in seen) == (scheduler == "synchronous")


def test_the_array_api_implementation_has_the_same(covariance, implementation):
    x = blobs(n=200)
    params = {"covariance_type": covariance.name}
    assert_same_fit(fitted(da.from_array(x, chunks=70), **params), fitted(x, **params))


def test_integers_and_half_precision():
    x = np.round(20 * blobs(n=200)).astype(np.int32)
    assert_same_fit(fitted(da.from_array(x, chunks=70)), fitted(x))
    half = blobs(n=200).astype(np.float16)
    found = fitted(da.from_array(half, chunks=70))
    assert found.means_.dtype == np.float32
    assert_same_fit(found, fitted(half), 1e-4)


def test_settings_of_the_trainer_move_each_block():
    x = blobs(n=200)
    params = {"trainer_params": {"max_epochs": 4, "precision": 32}}
    found = fitted(da.from_array(x, chunks=70), **params)
    assert found.means_.dtype == np.float32
    assert_same_fit(found, fitted(x, **params), 1e-4)


def test_scikit_learns_class():
    x = blobs(n=300)
    X, weight = da.from_array(x, chunks=80), np.random.RandomState(0).uniform(size=300)
    params = {"random_state": 0, "tol": 0, "max_iter": 5, "n_init": 2, "init_params": "random"}
    found = SklearnMixture(3, **params).fit(X, sample_weight=da.from_array(weight, chunks=80))
    expected = SklearnMixture(3, **params).fit(x, sample_weight=weight)
    assert_same_fit(found, expected)
    assert_close(found.precisions_, expected.precisions_, 1e-9)
    assert found.score(X) == pytest.approx(expected.score(x), rel=1e-12)
    assert found.bic(X) == pytest.approx(expected.bic(x), rel=1e-12)
    assert found.aic(X) == pytest.approx(expected.aic(x), rel=1e-12)
    assert_close(found.score_samples(X).compute(), expected.score_samples(x), 1e-9)
    found = SklearnMixture(3, **params | {"n_init": 1, "warm_start": True}).fit(X).fit(X)
    assert_same_fit(found, SklearnMixture(3, **params | {"n_init": 1, "warm_start": True}).fit(x).fit(x))


@pytest.mark.parametrize("is_weighted", [False, True])
def test_k_means(implementation, dtype, is_weighted):
    x = blobs(n=400).astype(dtype)
    X = da.from_array(x, chunks=(90, 2))
    weight = np.random.RandomState(0).randint(3, size=400) if is_weighted else None
    found = KMeans(5, random_state=0).fit(X, sample_weight=weight)
    expected = KMeans(5, random_state=0).fit(x, sample_weight=weight)
    assert_close(found.centroids_, expected.centroids_, PARAMETER_TOLERANCE[dtype])
    assert found.num_iter_ == expected.num_iter_
    assert found.inertia_ == pytest.approx(expected.inertia_, rel=1e-9)
    assert found.score(X) == pytest.approx(expected.score(x), rel=1e-6)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_empty_clusters_move_to_the_same_rows(is_weighted):
    # Many equal rows: seeds coincide, and of the rows that are farthest several are equally far.
    x = np.repeat([[0.0, 0], [0, 1], [9, 9], [-9, 9], [9, -9]], [40, 1, 3, 3, 3], axis=0)
    weight = np.where(np.arange(50) % 5 == 4, 0.0, 1.0) if is_weighted else None
    for seed in range(6):
        params = {"init_strategy": "random", "random_state": seed}
        found = KMeans(5, **params).fit(da.from_array(x, chunks=(7, -1)), sample_weight=weight)
        expected = KMeans(5, **params).fit(x, sample_weight=weight)
        assert_close(found.centroids_, expected.centroids_, 1e-12)


def test_what_is_read():
    x = blobs(n=400)
    X, read = counted(x, 100)
    weight = np.ones(400)
    weight[100:200] = 0
    fitted(X, sample_weight=weight)
    # The first pass, the sample, the start and the iterations; but for the first, not the block without weight.
    assert sorted(read) == sorted([1] + [0, 2, 3] * (3 + 6))


def test_a_task_starts_no_threads(monkeypatch):
    monkeypatch.setattr("gaussmix._threads.ThreadPoolExecutor", None)
    x = np.random.RandomState(0).normal(size=(40_000, 16))
    X = da.from_array(x, chunks=(20_000, -1))
    mixture = fitted(X, k=16, init_means=x[:16], trainer_params={"max_epochs": 1})
    mixture.predict(X).compute()


# Predictions


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
def test_predictions_are_lazy(cls, dtype):
    x = blobs(n=400).astype(dtype)
    X, read = counted(x, (90, 2))
    mixture = cls(3, random_state=0).fit(x)
    for method in ("predict", "predict_proba", "score_samples"):
        found, expected = getattr(mixture, method)(X), getattr(mixture, method)(x)
        assert read == []
        assert isinstance(found, da.Array)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.chunks[0] == X.chunks[0]
        assert type(found._meta) is np.ndarray
        computed = found.compute()
        assert computed.dtype == expected.dtype
        assert_close(computed, expected, PARAMETER_TOLERANCE[dtype], method)
        read.clear()
    assert mixture.score(X) == pytest.approx(mixture.score(x), rel=1e-12 if dtype == "float64" else 1e-5)
    one, read = counted(x, (90, -1))
    mixture.predict_proba(one)[200:210].compute()
    assert read == [2]


def test_k_means_predicts_lazily(dtype):
    x = blobs(n=400).astype(dtype)
    X, read = counted(x, 90)
    clustering = KMeans(3, random_state=0).fit(x)
    for method in ("predict", "transform", "score_samples"):
        found, expected = getattr(clustering, method)(X), getattr(clustering, method)(x)
        assert read == []
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert_close(found.compute(), expected, PARAMETER_TOLERANCE[dtype], method)
        read.clear()


def test_fit_predict_is_lazy_after_the_fit():
    x = blobs(n=300)
    X = da.from_array(x, chunks=70)
    labels = GaussianMixture(3, random_state=0).fit_predict(X)
    assert isinstance(labels, da.Array)
    assert (labels.compute() == GaussianMixture(3, random_state=0).fit_predict(x)).all()
    assert isinstance(KMeans(3, random_state=0).fit_transform(X), da.Array)


def test_another_fit_changes_no_prediction():
    x = blobs(n=300)
    mixture = GaussianMixture(3, random_state=0).fit(x)
    labels, expected = mixture.predict(da.from_array(x, chunks=70)), mixture.predict(x)
    mixture.fit(x[::-1] + 5)
    assert (labels.compute() == expected).all()


def test_predictions_of_chunks_of_unknown_size_and_of_empty_ones():
    x = blobs(n=300)
    mixture = SklearnMixture(3, random_state=0).fit(x)
    X = da.from_array(x, chunks=(70, -1))
    some = X[X[:, 0] > 0]
    expected = x[x[:, 0] > 0]
    assert np.isnan(some.shape[0])
    assert_close(mixture.predict_proba(some).compute(), mixture.predict_proba(expected), 1e-9)
    assert mixture.score(some) == pytest.approx(mixture.score(expected), rel=1e-12)
    assert mixture.bic(some) == pytest.approx(mixture.bic(expected), rel=1e-12)
    empty = da.from_array(x, chunks=((0, 300, 0), 3))
    assert_close(mixture.predict(empty).compute(), mixture.predict(x), 0)
    assert_close(KMeans(2, random_state=0).fit(empty).transform(empty).compute().shape, (300, 2), 0)
    with pytest.raises(ValueError, match="0 sample"):
        mixture.score(X[X[:, 0] > 1e6])


# What goes wrong


def test_the_first_row_that_is_not_finite_is_named():
    x = blobs(n=1000)
    for block, row in ((80, 803), (57, 575)):
        x[row, 1] = np.nan
        X = da.from_array(x, chunks=(10, -1))
        for estimator in (GaussianMixture(3), KMeans(3), SklearnMixture(3)):
            with pytest.raises(ValueError, match=rf"NaN \(first in row {row}\)"):
                estimator.fit(X)
        mixture = GaussianMixture(3, random_state=0).fit(x[:500])
        with pytest.raises(
            ValueError, match=rf"block {block}, which begins after row {10 * block}: .*NaN.*row {row % 10}"
        ):
            mixture.predict(X[: row + 1]).compute()


@pytest.mark.parametrize("estimator", [GaussianMixture(3), KMeans(3), SklearnMixture(3)])
def test_nothing_is_read_of_what_can_not_be_fitted(estimator):
    x = blobs(n=100)
    X, read = counted(x, 30)
    for bad, weight, message in (
        (X[X[:, 0] > 0], None, r"compute_chunk_sizes"),
        (X.astype(complex), None, "Complex data"),
        (X[:, 0], None, "2D array"),
        (X[:, :0], None, "0 feature"),
        (X, np.ones(99), "one weight for each of the 100 rows"),
        (X, da.ones(99), "one weight for each of the 100 rows"),
        (X, da.ones((100, 2)), "one weight for each of the 100 rows"),
        (X, da.ones(100, dtype=complex), "dtype complex128"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.fit(bad, sample_weight=weight)
    assert read == []


@pytest.mark.parametrize(
    ("weight", "message"),
    [([1, -1], "negative value, -1"), ([1, np.nan], "NaN or infinity"), ([0, 0], "zero for every row")],
)
@pytest.mark.parametrize("is_lazy", [False, True])
def test_weights_that_are_none(weight, message, is_lazy):
    weight = np.repeat(np.asarray(weight, dtype=float), 50)
    with pytest.raises(ValueError, match=message):
        GaussianMixture(2).fit(da.ones((100, 2), chunks=30), sample_weight=da.from_array(weight) if is_lazy else weight)


def test_fewer_rows_than_components():
    X = da.from_array(blobs(n=20), chunks=6)
    with pytest.raises(ValueError, match="num_components = 21, n_samples = 20"):
        GaussianMixture(21).fit(X)
    with pytest.raises(ValueError, match="num_clusters = 3, n_samples = 2"):
        KMeans(3).fit(X, sample_weight=np.arange(20) < 2)


def test_predictions_for_other_data_fail_at_once():
    x = blobs(n=100)
    mixture = GaussianMixture(2, random_state=0).fit(x)
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3"):
        mixture.predict(da.ones((10, 2)))
    with pytest.raises(ValueError, match="not fitted"):
        GaussianMixture().predict(da.ones((10, 2)))


def test_a_block_that_is_not_what_the_array_says():
    x = blobs(n=90)
    X = da.from_array(x, chunks=(30, -1)).map_blocks(lambda block: block[:-1], dtype=x.dtype, meta=x[:0])
    with pytest.raises(ValueError, match="block after row 0 has 29 rows, and 30"):
        GaussianMixture(2).fit(X)


def changing(x, chunks, since, change):
    """x in chunks, of which the second is `change(rows)` from the `since`-th time on that it is read."""
    read, lock = [], threading.Lock()

    def look(block, block_id=None):
        with lock:
            read.append(block_id[0])
            times = read.count(1)
        return change(block) if block_id[0] == 1 and times >= since else block

    return da.from_array(x, chunks=chunks).map_blocks(look, dtype=x.dtype, meta=x[:0])


CHANGES = {
    "new rows": (lambda block: np.random.normal(size=block.shape), "has other rows"),
    "signs": (np.negative, "has other rows"),
    "NaN": (lambda block: np.full_like(block, np.nan), "has other rows"),
    "fewer rows": (lambda block: block[:-1], r"has shape \(29, 3\) in a later pass, and had \(30, 3\) in the first"),
    "a column less": (lambda block: block[:, :2], r"has shape \(30, 2\) in a later pass, and had \(30, 3\) in"),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("since", [2, 3, 4])
def test_a_block_that_differs_between_passes(how, since):
    x = blobs(n=100)
    change, message = CHANGES[how]
    for estimator in (GaussianMixture(3, random_state=0), SklearnMixture(3, random_state=0), KMeans(3, random_state=0)):
        for weight in (None, np.arange(100.0)):
            with pytest.raises(ValueError, match=rf"block 1 of the Dask array {message}.*; pass .*X.persist"):
                estimator.fit(changing(x, (30, -1), since, change), sample_weight=weight)
        assert not {"means_", "centroids_"} & vars(estimator).keys()


def test_weights_that_differ_between_passes():
    x = blobs(n=100)
    weight = changing(np.ones((100, 1)), (30, -1), 2, lambda block: np.random.uniform(size=block.shape))[:, 0]
    with pytest.raises(ValueError, match="block 1 of the Dask array has other rows or weights"):
        GaussianMixture(3, random_state=0).fit(da.from_array(x, chunks=(30, -1)), sample_weight=weight)


def test_a_block_of_another_width_is_named():
    x = blobs(n=90)
    X = changing(x, (30, -1), 1, lambda block: block[:, :2])
    for estimator in (GaussianMixture(2), KMeans(2)):
        with pytest.raises(ValueError, match="the block after row 30 has 2 features, and 3 as the Dask array has it"):
            estimator.fit(X)
        with pytest.raises(
            ValueError, match="block 1, which begins after row 30: X has 2 features, but .* expecting 3"
        ):
            estimator.clone().fit(x).predict(X).compute()


def test_other_collections_are_not_computed_in_secret():
    lazy = dask.delayed(np.ones((5, 2)))
    for method in (GaussianMixture(1).fit, GaussianMixture(1).fit(np.ones((5, 2))).predict):
        with pytest.raises(TypeError, match=r"pass a Dask array: .*to_dask_array"):
            method(lazy)


def test_a_singular_covariance_is_the_error_of_the_array():
    x = np.zeros((40, 2))
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        fitted(da.from_array(x, chunks=7), k=1, covariance_regularization=0)


def test_many_small_chunks_are_warned_of():
    x = blobs(n=600)
    with pytest.warns(UserWarning, match=r"200 blocks of about 0 KiB.*X.rechunk\(\(600, -1\)\)") as caught:
        fitted(da.from_array(x, chunks=(3, -1)), trainer_params={"max_epochs": 1})
    assert [warning.filename for warning in caught if warning.category is UserWarning] == [__file__]


def test_statistics_larger_than_the_data_are_warned_of(monkeypatch):
    monkeypatch.setattr("gaussmix.rows._dask.STATISTICS_BYTES", 0)
    x = blobs(n=40)
    with pytest.warns(UserWarning, match=r"statistics of all 5 blocks .*rechunk") as caught:
        fitted(da.from_array(x, chunks=8), covariance_type="full")
    assert [warning.filename for warning in caught if warning.category is UserWarning] == [__file__]
    fitted(da.from_array(x, chunks=8), covariance_type="spherical")


# A cluster


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    quiet = logging.getLogger("distributed")
    level = quiet.level
    with warnings.catch_warnings():
        # What distributed and its event loop leave open when processes end is not ours.
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        settings = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
        with distributed.LocalCluster(**settings) as local, distributed.Client(local) as client:
            quiet.setLevel(logging.CRITICAL)
            yield client
    quiet.setLevel(level)


def test_two_processes_give_the_model_of_one(cluster, covariance):
    x = blobs(n=2000)
    weight = np.random.RandomState(0).randint(3, size=2000).astype(float)
    params = {"covariance_type": covariance.name, "trainer_params": {"max_epochs": 4}}
    X = da.from_array(x, chunks=(500, -1)).persist()
    assert_same_fit(fitted(X, **params), fitted(x, **params))
    found, expected = (fitted(a, sample_weight=weight, init_strategy="random", **params) for a in (X, x))
    assert_same_fit(found, expected)
    assert (found.predict(X).compute() == expected.predict(x)).all()
    assert found.score(X) == pytest.approx(expected.score(x), rel=1e-12)


def test_an_error_comes_from_a_worker_as_it_is(cluster):
    x = blobs(n=1000)
    x[575, 1] = np.inf
    with pytest.raises(ValueError, match=r"infinity \(first in row 575\)"):
        GaussianMixture(3).fit(da.from_array(x, chunks=(100, -1)))


def test_k_means_in_two_processes(cluster):
    x = blobs(n=2000)
    X = da.from_array(x, chunks=(500, -1))
    found, expected = (KMeans(4, random_state=0).fit(a) for a in (X, x))
    assert_close(found.centroids_, expected.centroids_, 1e-9)
    assert (found.predict(X).compute() == expected.predict(x)).all()


def killing(block, marker, count):
    """The block; the `count`-th that is read takes its process with it, once."""
    with Path(marker).open("ab") as file:
        file.write(b".")
    if Path(marker).stat().st_size == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return block


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_worker_that_dies_does_not_change_the_fit(cluster, tmp_path):
    x = blobs(n=2000)
    X = da.from_array(x, chunks=(300, -1))
    marker = str(tmp_path / "read")
    # Seven blocks: three passes before the first iteration.
    dying = X.map_blocks(killing, marker, 7 * 5 + 3, dtype=x.dtype, meta=x[:0])
    before = set(cluster.run(os.getpid).values())
    found = fitted(dying, covariance_type="full")
    assert Path(marker).stat().st_size > 7 * 9
    assert before - set(cluster.run(os.getpid).values())
    assert_same_fit(found, fitted(x, covariance_type="full"))
