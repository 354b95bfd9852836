"""Rows that lie in files: numpy.memmap, h5py.Dataset and zarr.Array are read block by block, never whole."""

import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import PARAMETER_TOLERANCE, assert_close, blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix.rows import _blocks
from gaussmix.sklearn import GaussianMixture as SklearnMixture

pytestmark = pytest.mark.usefixtures("unconverged")

ARRAYS = ("weights_", "means_", "covariances_", "precisions_cholesky_")
X = blobs(n=1003, d=3, k=3, seed=4, sort=True)
WEIGHT = np.random.RandomState(0).uniform(0.5, 2, size=len(X)) * (np.arange(len(X)) % 7 > 0)


@dataclass
class Sliced:
    """What h5py's and zarr's arrays have in common; notes what is read, and can fail."""

    array: Any
    chunks: Any = None
    fails_at: float = np.inf  # the read that fails, counted from 0
    reads: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self):
        self.shape, self.dtype, self.ndim = self.array.shape, self.array.dtype, self.array.ndim

    def __getitem__(self, rows):
        if len(self.reads) >= self.fails_at:
            raise OSError("the disk is gone")
        self.reads.append((rows.start, rows.stop))
        return self.array[rows]


# Where the rows of an array can lie


def memmap(x, folder, mode="r"):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode=mode)


def fortran_memmap(x, folder):
    return memmap(np.asfortranarray(x), folder)


def strided_memmap(x, folder):
    """Every second row and column of a file, from the second on, backwards."""
    whole = np.full((2 * len(x) + 1, 2 * x.shape[1] + 1), 77, dtype=x.dtype)
    whole[1::2, 1::2] = x[::-1]
    return memmap(whole, folder)[1::2, 1::2][::-1]


def raw_memmap(x, folder):
    """A file without a header of NumPy's: rows begin in the middle of a page."""
    (folder / "x.bin").write_bytes(b"\x01" * 24 + x.tobytes())
    return np.memmap(folder / "x.bin", x.dtype, "r", offset=24, shape=x.shape)


def h5py_dataset(x, folder, **how):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_dataset("x", data=x, **how)
    return h5py.File(folder / "x.h5")["x"]


def zarr_array(x, folder, **how):
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(store=str(folder / "x.zarr"), shape=x.shape, dtype=x.dtype, overwrite=True, **how)
    array[:] = x
    return zarr.open_array(str(folder / "x.zarr"), mode="r")


SOURCES = {
    "memmap": memmap,
    "memmap r+": lambda x, folder: memmap(x, folder, "r+"),
    "memmap c": lambda x, folder: memmap(x, folder, "c"),
    "Fortran memmap": fortran_memmap,
    "strided memmap": strided_memmap,
    "raw memmap": raw_memmap,
    "h5py contiguous": h5py_dataset,
    "h5py chunks": lambda x, folder: h5py_dataset(x, folder, chunks=(70, 2)),
    "h5py compressed": lambda x, folder: h5py_dataset(x, folder, chunks=(128, 1), compression="gzip", shuffle=True),
    "zarr": lambda x, folder: zarr_array(x, folder, chunks=(90, 2)),
    "zarr in one chunk": lambda x, folder: zarr_array(x, folder, chunks=x.shape),
    "zarr shards": lambda x, folder: zarr_array(x, folder, chunks=(50, 3), shards=(200, 3)),
    "sliced": lambda x, folder: Sliced(x),
}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    return lambda x: SOURCES[request.param](x, tmp_path)


def fitted(x, cls=GaussianMixture, sample_weight=None, **params):
    if cls is GaussianMixture:
        params = {"convergence_tolerance": 0, "trainer_params": {"max_epochs": 4}} | params
    return cls(3, random_state=0, **params).fit(x, sample_weight=sample_weight)


def assert_same_fit(found, expected, tolerance=1e-10):
    for name in ("centroids_",) if isinstance(found, KMeans) else ARRAYS:
        assert type(getattr(found, name)) is np.ndarray
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert_close(getattr(found, name), getattr(expected, name), tolerance, name)
    assert found.n_features_in_ == expected.n_features_in_


# The same model


def test_rows_in_a_file_give_the_model_of_rows_in_memory(source, covariance, dtype):
    x = X.astype(dtype)
    data, tolerance = source(x), 1e-10 if dtype == "float64" else PARAMETER_TOLERANCE[dtype]
    for weight in (None, WEIGHT):
        params = dict(covariance_type=covariance.name, sample_weight=weight)
        found, expected = fitted(data, batch_size=311, **params), fitted(x, **params)
        assert_same_fit(found, expected, tolerance)
        assert_close(found.lower_bounds_, expected.lower_bounds_, tolerance, "lower bounds")
        assert found.backend_ == expected.backend_


def test_predictions_for_rows_in_a_file(source, dtype):
    x = X.astype(dtype)
    mixture = fitted(x, covariance_type="full").set_params(batch_size=177)
    data = source(x)
    for method in ("predict", "predict_proba", "score_samples", "score"):
        found, expected = getattr(mixture, method)(data), getattr(mixture, method)(x)
        assert type(found) is type(expected)
        assert getattr(found, "dtype", None) == getattr(expected, "dtype", None)
        assert_close(found, expected, 1e-9 if dtype == "float64" else 1e-4, method)


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint16", "float16", "bool", ">f8"])
def test_other_dtypes(source, dtype):
    # Unsigned integers begin at 0.
    x = (X + 40 if dtype == "uint16" else X > 0 if dtype == "bool" else X).astype(dtype)
    found, expected = (fitted(data, covariance_type="tied") for data in (source(x), x))
    tolerance = PARAMETER_TOLERANCE["float32"] if dtype == "float16" else 1e-10
    assert_same_fit(found, expected, tolerance)
    assert found.means_.dtype == ("float32" if dtype == "float16" else "float64")
    assert_close(found.predict_proba(source(x)), found.predict_proba(x), tolerance)


def test_the_estimator_of_scikit_learn(source):
    data = source(X)
    found, expected = (fitted(x, SklearnMixture, sample_weight=WEIGHT) for x in (data, X))
    assert_same_fit(found, expected)
    assert found.n_iter_ == expected.n_iter_
    assert_close(found.precisions_, expected.precisions_, 1e-10)
    for method in ("predict", "predict_proba", "score_samples", "score", "aic", "bic"):
        assert_close(getattr(found, method)(data), getattr(expected, method)(X), 1e-9, method)


def test_kmeans(source):
    data = source(X)
    found, expected = (fitted(x, KMeans, sample_weight=WEIGHT) for x in (data, X))
    assert_same_fit(found, expected)
    assert found.inertia_ == pytest.approx(expected.inertia_, rel=1e-10)
    for method in ("predict", "transform", "score_samples", "score"):
        assert_close(getattr(found, method)(data), getattr(expected, method)(X), 1e-10, method)


@pytest.mark.parametrize("init_strategy", ["kmeans++", "random", "random_from_data"])
def test_every_start(source, init_strategy):
    params = dict(init_strategy=init_strategy, covariance_type="full")
    assert_same_fit(fitted(source(X), batch_size=100, **params), fitted(X, **params))


def test_a_private_map_keeps_what_was_written_to_it(tmp_path):
    x = memmap(X, tmp_path, "c")
    x[:400] += 5.0
    changed = np.array(x)
    mixture = fitted(x, batch_size=100)
    assert_same_fit(mixture, fitted(changed))
    mixture.predict(x)
    assert np.array_equal(x, changed)
    assert np.array_equal(np.load(tmp_path / "x.npy"), X)


def test_a_shared_map_keeps_what_was_written_to_it(tmp_path):
    x = memmap(X, tmp_path, "r+")
    x[:400] += 5.0
    changed = np.array(x)
    assert_same_fit(fitted(x, batch_size=100), fitted(changed))
    assert np.array_equal(x, changed)
    x.flush()
    assert np.array_equal(np.load(tmp_path / "x.npy"), changed)


def test_results_of_arithmetic_on_a_map(tmp_path):
    # Of numpy.memmap's type, but in memory.
    assert_same_fit(fitted(memmap(X, tmp_path) * 1.0, batch_size=100), fitted(X))


# Blocks


@settings(max_examples=15)
@given(batch_size=st.integers(1, 1200), chunk=st.integers(1, 1200) | st.none())
def test_batch_size_changes_the_blocks_alone(batch_size, chunk):
    data = Sliced(X[:203], None if chunk is None else (chunk, 3))
    found = fitted(data, covariance_type="full", batch_size=batch_size, trainer_params={"max_epochs": 3})
    assert_same_fit(found, fitted(X[:203], covariance_type="full", trainer_params={"max_epochs": 3}))
    # The first pass, of chunks as they are: as many of them as hold a batch.
    size = -(-batch_size // (chunk or 1)) * (chunk or 1)
    n_blocks = -(-203 // size)
    first_pass = [(start, min(start + size, 203)) for start in range(0, 203, size)]
    for start in range(0, len(data.reads), n_blocks):
        assert data.reads[start : start + n_blocks] == first_pass


def test_blocks_have_a_size_without_batch_size(monkeypatch):
    monkeypatch.setattr(_blocks, "BLOCK_BYTES", 100 * X.itemsize * X.shape[1])
    data = Sliced(X, (40, 2))
    assert_same_fit(fitted(data), fitted(X))
    assert {stop - start for start, stop in data.reads} == {120, 1003 % 120}


def test_rows_are_read_ahead_by_one_thread(monkeypatch):
    threads = set()

    class Watched(Sliced):
        def __getitem__(self, rows):
            threads.add(threading.current_thread())
            return super().__getitem__(rows)

    before = set(threading.enumerate())
    fitted(Watched(X), batch_size=100)
    assert threading.main_thread() not in threads
    assert set(threading.enumerate()) <= before


# What is refused


def test_nan_names_its_row(source):
    x = np.concatenate([X] * 6)
    x[57 * 100 + 43, 1] = np.nan
    with pytest.raises(ValueError, match="contains NaN .first in row 5743"):
        GaussianMixture(3, batch_size=100).fit(source(x))
    mixture = fitted(X, batch_size=100)
    with pytest.raises(ValueError, match="contains NaN .first in row 5743"):
        mixture.predict(source(x))


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture, KMeans])
@pytest.mark.parametrize("shape", [(12,), (4, 3, 2), (0, 3), (5, 0)])
@pytest.mark.parametrize("dtype", ["float64", "int16"])
def test_shapes_that_are_no_rows(tmp_path, cls, shape, dtype):
    x = np.zeros(shape, dtype)
    with pytest.raises(ValueError, match=r"Expected 2D array, got|Found array with") as expected:
        cls(1).fit(x)
    sources = {"sliced": Sliced(x), "h5py": h5py_dataset(x, tmp_path), "zarr": zarr_array(x, tmp_path, chunks="auto")}
    if x.size:
        sources["memmap"] = memmap(x, tmp_path)
    for name, data in sources.items():
        with pytest.raises(ValueError, match=r"Expected 2D array, got|Found array with") as found:
            cls(1).fit(data)
        words = len("Found array with 0 sample(s)")
        assert str(found.value)[:words] == str(expected.value)[:words], name


def test_dtypes_that_are_no_numbers(tmp_path):
    with pytest.raises(ValueError, match="Complex data not supported"):
        GaussianMixture().fit(memmap(X.astype(complex), tmp_path))
    for dtype in ("datetime64[s]", [("a", float), ("b", float)]):
        with pytest.raises((TypeError, ValueError), match="dtype"):
            GaussianMixture().fit(Sliced(np.zeros((10, 2), dtype)))


def test_weights_of_another_length(source):
    for n in (len(X) - 1, len(X) + 1):
        with pytest.raises(ValueError, match="sample_weight has shape"):
            GaussianMixture(2).fit(source(X), sample_weight=np.ones(n))


def test_another_number_of_features_in_predict(source):
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3"):
        fitted(X).predict(source(X[:, :2].copy()))


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture, KMeans])
def test_what_reading_raises_passes_through(cls, monkeypatch):
    """In the first pass, in the start and in EM: the estimator has nothing of a fit, and no thread stays."""
    monkeypatch.setattr(_blocks, "BLOCK_BYTES", 100 * X.itemsize * X.shape[1])
    whole = Sliced(X, (100, 3))
    cls(3, random_state=0).fit(whole)
    before = set(threading.enumerate())
    for fails_at in sorted({0, 5, 11, 16, 27, len(whole.reads) - 1}):
        estimator = cls(3, random_state=0)
        data = Sliced(X, (100, 3), fails_at)
        with pytest.raises(OSError, match="^the disk is gone$") as caught:
            estimator.fit(data)
        assert len(data.reads) == fails_at
        assert "__getitem__" in "".join(traceback.format_tb(caught.value.__traceback__))
        assert set(threading.enumerate()) <= before
        assert not [name for name in vars(estimator) if name.endswith("_") and name != "n_features_in_"]


def test_a_failing_predict_leaves_no_thread():
    mixture = fitted(X, batch_size=100)
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="the disk is gone"):
        mixture.predict(Sliced(X, None, 15))
    assert set(threading.enumerate()) <= before


def test_an_interrupted_fit_leaves_no_thread():
    before = set(threading.enumerate())

    def interrupt(iteration, bound, parameters):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GaussianMixture(3, batch_size=100, random_state=0).fit(Sliced(X), callback=interrupt)
    assert set(threading.enumerate()) <= before


# Memory

MEMORY = """
import os, resource, sys, warnings
import numpy as np
from gaussmix import GaussianMixture

def peak():
    # Linux counts in ru_maxrss what the process that started this one has.
    if not os.path.exists("/proc/self/status"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**10

def fit(rows):
    order = dict(shape=(rows, 16), fortran_order=sys.argv[2] == "columns")
    x = np.lib.format.open_memmap(sys.argv[1], mode="w+", dtype=np.float32, **order)
    some = x[:: rows // 500]
    some[:] = np.random.RandomState(0).normal(size=some.shape)  # the rest is a hole in the file
    del some
    del x
    x = np.load(sys.argv[1], mmap_mode="r")
    warnings.simplefilter("ignore")
    mixture = GaussianMixture(2, random_state=0, init_strategy="random_from_data", trainer_params={"max_epochs": 2})
    return x.nbytes / 2**20, mixture.fit(x).nll_

fit(1_000_000)  # has loaded, and compiled, all that the larger file needs
before = peak()
size, nll = fit(9_900_000)
print(size, peak() - before, nll)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is Unix's")
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_memory_does_not_grow_with_the_file(tmp_path, order):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "x.npy"), order], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    size, grown, nll = map(float, done.stdout.split())
    assert size > 600
    assert grown < 300, f"{grown:.0f} MiB for a file of {size:.0f} MiB"
    assert np.isfinite(nll)
