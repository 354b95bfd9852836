"""Rows in blocks: batches, memory maps, weights."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import PARAMETER_TOLERANCE, assert_close, blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix.rows import _data
from gaussmix.rows._data import Rows, fingerprint, slices

pytestmark = pytest.mark.usefixtures("unconverged")

TYPES = st.sampled_from(sorted(COVARIANCES))


def model(x, k, covariance_type, batch_size=None, **settings):
    settings = {"random_state": 0, "convergence_tolerance": 0, "trainer_params": {"max_epochs": 10}} | settings
    return GaussianMixture(k, covariance_type=covariance_type, batch_size=batch_size, **settings).fit(x)


def assert_same_model(found, expected, tolerance):
    for name in ("weights_", "means_", "covariances_", "precisions_cholesky_", "lower_bounds_"):
        assert_close(to_numpy(getattr(found, name)), to_numpy(getattr(expected, name)), tolerance, name)


@given(st.integers(1, 100), st.integers(1, 120))
def test_slices_cover_every_row_once(n, size):
    covered = [i for part in slices(n, size) for i in range(part.start, part.stop)]
    assert covered == list(range(n))


@pytest.mark.parametrize("strategy", ["kmeans", "kmeans++", "random", "random_from_data"])
@given(batch_size=st.integers(1, 260), covariance_type=TYPES)
def test_batches_do_not_change_the_fit(strategy, batch_size, covariance_type):
    # Sorted by cluster: the case in which a running mean goes wrong.
    x = blobs(n=240, d=2, k=3, seed=5, sort=True)
    whole = model(x, 3, covariance_type, init_strategy=strategy)
    found = model(x, 3, covariance_type, batch_size, init_strategy=strategy)
    assert_same_model(found, whole, 1e-10)
    assert_close(found.predict_proba(x), whole.predict_proba(x), 1e-8)


def test_two_far_halves_in_two_batches_have_the_variance_of_the_whole(library, covariance):
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.normal(size=1000), 100 + rng.normal(size=1000)])[:, None]
    expected = x.var()  # about 2501
    for order in (slice(None), slice(None, None, -1)):
        mixture = model(library.asarray(x[order]), 1, covariance.name, batch_size=1000)
        assert_close(to_numpy(mixture.covariances_).ravel(), [expected + 1e-6], 1e-10)
        assert_close(to_numpy(mixture.means_).ravel(), [x.mean()], 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_memory_map_is_read_block_by_block(tmp_path, covariance, dtype, mode):
    x = (10 * blobs(n=503, d=3, k=2)).astype(dtype)
    path = tmp_path / "x.bin"
    x.tofile(path)
    mapped = np.memmap(path, dtype=dtype, mode=mode, shape=x.shape)
    found, expected = (model(data, 2, covariance.name, batch_size=100) for data in (mapped, x))
    assert_same_model(found, expected, PARAMETER_TOLERANCE.get(dtype, 1e-9))
    assert type(found.means_) is np.ndarray
    assert np.array_equal(found.predict(mapped), expected.predict(x))
    assert found.predict_proba(mapped).dtype == (np.float32 if dtype == "float32" else np.float64)


# The fingerprint


@given(st.integers(1, 7), st.integers(0, 40), st.booleans(), st.data())
def test_a_fingerprint_knows_neither_library_nor_order_nor_blocks(library, dtype, d, n, is_weighted, data):
    x = blobs(n=n, d=d, k=2).astype(dtype)
    weight = np.random.RandomState(0).uniform(size=n) if is_weighted else None
    expected = fingerprint(x, weight)
    assert 0 <= expected < 2**64
    order = data.draw(st.permutations(range(n)))
    cut = data.draw(st.integers(0, n))
    parts = 0
    for rows in (order[:cut], order[cut:]):
        own = None if weight is None else library.asarray(weight[rows])
        parts += fingerprint(library.asarray(x[rows].reshape(-1, d)), own)
    assert parts % 2**64 == expected
    assert fingerprint(np.asfortranarray(x), weight) == fingerprint(np.repeat(x, 2, axis=1)[:, ::2], weight) == expected


def test_a_fingerprint_of_many_blocks(dtype, monkeypatch):
    x, weight = blobs(n=100).astype(dtype), np.arange(100.0)
    expected = fingerprint(x), fingerprint(x, weight)
    monkeypatch.setattr(_data, "PRINTED_ROWS", 17)
    assert (fingerprint(x), fingerprint(x, weight)) == expected


def test_a_fingerprint_on_a_gpu_is_that_of_the_host(dtype, monkeypatch):
    """With tensors in host memory taken for those of a GPU."""
    torch = pytest.importorskip("torch")
    x, weight = blobs(n=300, d=5).astype(dtype), np.arange(300.0)
    tensor = torch.as_tensor(x)
    monkeypatch.setattr(_data, "is_cupy_array", torch.is_tensor)
    monkeypatch.setattr(_data, "to_numpy", lambda value: np.asarray(value))
    for own in (None, weight):
        assert _data.fingerprint(tensor, None if own is None else torch.as_tensor(own)) == fingerprint(x, own)


@pytest.mark.parametrize("is_round", [False, True])
def test_what_changes_a_fingerprint(dtype, is_round):
    rng = np.random.RandomState(0)
    x = rng.normal(size=(200, 4)).astype(dtype)
    x = np.round(8 * x) if is_round else x
    weight = 1.0 + rng.randint(3, size=200)
    one, sign = x.copy(), x.copy()
    one[17, 2] += 1
    sign[::2] *= -1
    others = [one, sign, -x, x[:, ::-1], x[::-1, :1] + x, np.concatenate([x[:, :2], x[::-1, 2:]], axis=1), x[:-1]]
    others += [x * np.array([-1, 1, -1, 1]), np.concatenate([x[:1], x[:-1]]), x * 2]
    seen = [fingerprint(x), *map(fingerprint, others), fingerprint(x, weight), fingerprint(x[::-1], weight)]
    seen += [
        fingerprint(x, 2 * weight),
        fingerprint(x, np.ones(200)),
        fingerprint(x.astype("f4" if dtype == "float64" else "f8")),
    ]
    assert len(set(seen)) == len(seen)


def test_blocks_leave_out_rows_of_weight_zero():
    x = np.arange(12.0).reshape(6, 2)
    rows = Rows(x, np.array([0.0, 1, 0, 0, 2, 0]), batch_size=2)
    blocks = list(rows.blocks(100))
    assert [block.tolist() for block, _ in blocks] == [[[2.0, 3.0]], [[8.0, 9.0]]]
    assert [weight.tolist() for _, weight in blocks] == [[1.0], [2.0]]
    assert rows.mean(100).tolist() == [(2 + 2 * 8) / 3, (3 + 2 * 9) / 3]


@pytest.mark.parametrize("strategy", ["kmeans", "kmeans++", "random", "random_from_data"])
def test_rows_of_weight_zero_are_no_part_of_the_data(library, covariance, strategy):
    x = blobs(n=300, d=2, k=3, seed=6)
    weight = np.ones(len(x))
    weight[::7] = 0
    x[::7] = 1e3
    settings = {"init_strategy": strategy, "random_state": 3}
    found = GaussianMixture(3, covariance_type=covariance.name, **settings).fit(
        library.asarray(x), sample_weight=library.asarray(weight)
    )
    expected = GaussianMixture(3, covariance_type=covariance.name, **settings).fit(library.asarray(x[weight > 0]))
    assert_same_model(found, expected, 1e-9)


def test_a_sample_depends_on_the_seed_and_not_on_the_library(library):
    x = blobs(n=1000, d=2)
    drawn = Rows(library.asarray(x)).sample(50, np.random.RandomState(0))
    assert drawn.array.dtype == np.float64
    assert np.array_equal(drawn.array, Rows(x).sample(50, np.random.RandomState(0)).array)
    assert len(np.unique(drawn.array[:, 0])) == 50
    assert np.array_equal(Rows(library.asarray(x)).sample(1000, np.random.RandomState(0)).array, x)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batches_do_not_change_kmeans(library, batch_size):
    x = blobs(n=200, d=2, k=3, seed=8, sort=True)
    whole = KMeans(3, random_state=0).fit(library.asarray(x))
    found = KMeans(3, random_state=0, batch_size=batch_size).fit(library.asarray(x))
    assert_close(to_numpy(found.centroids_), to_numpy(whole.centroids_), 1e-12)
    assert found.num_iter_ == whole.num_iter_
    assert_close(found.inertia_, whole.inertia_, 1e-12)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[::-1],
        lambda x: np.asfortranarray(x),
        lambda x: np.ascontiguousarray(x.T).T,
        lambda x: x[::3, 1:],
    ],
)
def test_any_strides_give_the_fit_of_contiguous_rows(covariance, view):
    x = view(blobs(n=240, d=4, k=2, seed=9))
    found, expected = (model(data, 2, covariance.name) for data in (x, np.ascontiguousarray(x)))
    assert_same_model(found, expected, 1e-12)


def test_expanded_and_sliced_tensors(covariance):
    torch = pytest.importorskip("torch")
    base = torch.as_tensor(blobs(n=240, d=4, k=2, seed=9))
    for x in (base[:, ::2], base.T.contiguous().T, base[::3]):
        assert_same_model(model(x, 2, covariance.name), model(x.contiguous(), 2, covariance.name), 1e-12)
    equal_rows = torch.tensor([[1.0, 2.0]]).expand(10, 2)
    mixture = model(equal_rows, 1, covariance.name)
    assert_close(to_numpy(mixture.means_), [[1.0, 2.0]], 1e-7)


@pytest.mark.parametrize("strategy", ["kmeans++", "random"])
def test_a_fit_never_holds_an_array_of_rows_by_components(covariance, strategy):
    x = np.random.RandomState(0).normal(size=(100_000, 2))
    k = 100  # n x k would be 80 MB
    settings = dict(covariance_type=covariance.name, init_strategy=strategy, random_state=0)
    tracemalloc.start()
    try:
        GaussianMixture(k, trainer_params={"max_epochs": 1}, **settings).fit(x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6


@pytest.mark.big
def test_more_than_two_to_the_31_values(covariance):
    n, d = 2**25 + 3, 64  # 8.6 GB in float32
    x = np.zeros((n, d), dtype=np.float32)
    x[::2] = 1
    x[-3:] = 50
    mixture = GaussianMixture(
        3, covariance_type=covariance.name, init_means=x[[0, 1, -1]], trainer_params={"max_epochs": 2}
    ).fit(x)
    assert_close(mixture.weights_ * n, [n // 2 - 1, n // 2 - 1, 3], 1e-3)
    assert mixture.predict(x)[[0, 1, -4, -2, -1]].tolist() == [0, 1, (n - 4) % 2, 2, 2]
