"""JAX arrays in host memory: the bits of a NumPy fit, in the library, on the device and in the dtype of the data."""

import importlib.util
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

from cases import blobs, start_for
from gaussmix import GaussianMixture, KMeans
from gaussmix._arrays import as_host, integer_dtype, is_on_host, to_numpy
from gaussmix.backends import _numpy
from gaussmix.backends._dispatch import choose
from gaussmix.rows._data import Rows, fingerprint
from gaussmix.sklearn import GaussianMixture as SklearnMixture

# In each test and not before: what jax does at a fork, the processes that only collect this file do without.
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")

FITTED = ("weights_", "means_", "covariances_", "precisions_cholesky_")
X = blobs(n=401, d=3, k=3)
WEIGHT = np.random.RandomState(0).uniform(0.5, 2, size=len(X)).astype(np.float32)


@pytest.fixture(autouse=True)
def _without_forced_backend(monkeypatch):
    monkeypatch.delenv("GAUSSMIX_BACKEND", raising=False)


@pytest.fixture
def jnp(dtype):
    """jax.numpy, with float64 where the test has a dtype for it."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", dtype == "float64")
    yield jax.numpy
    jax.config.update("jax_enable_x64", before)


class Blocks:
    def __init__(self, x, size=100):
        self.x, self.size = x, size

    def __iter__(self):
        return (self.x[start : start + self.size] for start in range(0, self.x.shape[0], self.size))


class Exported:
    """An array that can be read through DLPack alone."""

    def __init__(self, x, kind=1):
        self.x, self.kind = x, kind

    def __array_namespace__(self, api_version=None):
        return np

    def __dlpack__(self, **kwargs):
        return self.x.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.kind, 0


def assert_like(found, expected, like):
    """The bits of NumPy's, as an array of JAX."""
    assert type(found) is type(like)
    assert found.device == like.device
    assert str(found.dtype) == str(expected.dtype)
    assert np.array_equal(np.asarray(found), expected)


def test_an_array_of_any_library_is_read_where_it_is():
    x = np.arange(6.0)
    assert is_on_host(Exported(x))
    assert np.shares_memory(to_numpy(Exported(x)), x)
    assert choose(Exported(x)) == ("numpy", "the data is in host memory")
    elsewhere = Exported(x, kind=2)
    assert not is_on_host(elsewhere)
    assert as_host(elsewhere) is elsewhere
    assert "Exported is no array in host memory" in _numpy.why_not(elsewhere)


def test_array_api_strict_tests_the_array_api():
    strict = pytest.importorskip("array_api_strict")
    x = strict.asarray(X)
    assert not is_on_host(x)
    assert GaussianMixture(3, random_state=0).fit(x).backend_ == "array_api:array_api_strict"


@needs_jax
@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
def test_a_fit_and_its_predictions_are_those_of_numpy(jnp, covariance, dtype, cls):
    x = X.astype(dtype)
    like = jnp.asarray(x)
    expected = cls(3, covariance_type=covariance.name, random_state=0).fit(x, sample_weight=WEIGHT)
    found = cls(3, covariance_type=covariance.name, random_state=0).fit(like, sample_weight=jnp.asarray(WEIGHT))
    assert found.backend_ == "numpy"
    assert found.precision_ == expected.precision_
    assert found.lower_bounds_ == expected.lower_bounds_
    for name in FITTED:
        assert_like(getattr(found, name), getattr(expected, name), like)
    for method in ("predict_proba", "score_samples"):
        assert_like(getattr(found, method)(like), getattr(expected, method)(x), like)
    assert_like(found.predict(like), expected.predict(x).astype(integer_dtype(like)), like)
    assert found.score(like) == expected.score(x)
    assert np.array_equal(like, x)


@needs_jax
def test_rows_are_not_copied(jnp, dtype):
    like = jnp.asarray(X.astype(dtype))
    array = _numpy.Block(Rows(like)).rows.array
    assert np.shares_memory(array, np.from_dlpack(like))
    assert not array.flags.writeable


@needs_jax
@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
def test_given_starts_samples_and_steps(jnp, dtype, cls):
    x = X.astype(dtype)
    like = jnp.asarray(x)
    names = ("weights_init", "means_init", "precisions_init")
    start = {name: value.astype(dtype) for name, value in start_for(x, 3, "diag").items()}
    fits = []
    for data, asarray in ((x, np.asarray), (like, jnp.asarray)):
        if cls is SklearnMixture:
            mixture = cls(3, covariance_type="diag", random_state=0, **{name: asarray(start[name]) for name in names})
        else:
            mixture = cls(3, covariance_type="diag", random_state=0, init_means=asarray(start["means_init"]))
        fits.append(mixture.fit(data).partial_fit(data, sample_weight=asarray(WEIGHT)))
    expected, found = fits
    for name in FITTED:
        assert_like(getattr(found, name), getattr(expected, name), like)
    drawn, exact = found.sample(7), expected.sample(7)
    if cls is SklearnMixture:
        assert np.array_equal(drawn[1], exact[1])
        drawn, exact = drawn[0], exact[0].astype(str(drawn[0].dtype))
        assert found.bic(like) == expected.bic(x)
    assert_like(drawn, exact, like)


@needs_jax
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks(jnp, covariance, dtype, weighted):
    x = X.astype(dtype)
    like = jnp.asarray(x)
    settings = {"covariance_type": covariance.name, "random_state": 0}
    expected = GaussianMixture(3, **settings).fit(Blocks(x), sample_weight=WEIGHT if weighted else None)
    found = GaussianMixture(3, **settings).fit(Blocks(like), sample_weight=jnp.asarray(WEIGHT) if weighted else None)
    assert found.backend_ == "numpy"
    for name in FITTED:
        assert_like(getattr(found, name), getattr(expected, name), like)
    assert_like(found.predict_proba(Blocks(like)), expected.predict_proba(Blocks(x)), like)
    assert fingerprint(like, jnp.asarray(WEIGHT)) == fingerprint(x, WEIGHT)


@needs_jax
def test_kmeans(jnp, dtype):
    x = X.astype(dtype)
    like = jnp.asarray(x)
    expected = KMeans(3, random_state=0).fit(x, sample_weight=WEIGHT)
    found = KMeans(3, random_state=0).fit(like, sample_weight=jnp.asarray(WEIGHT))
    assert_like(found.centroids_, expected.centroids_, like)
    assert found.inertia_ == expected.inertia_
    for method in ("transform", "score_samples"):
        assert_like(getattr(found, method)(like), getattr(expected, method)(x), like)
    assert_like(found.predict(like), expected.predict(x).astype(integer_dtype(like)), like)


@needs_jax
def test_what_is_kept_and_where_it_goes_on(jnp, dtype, tmp_path):
    x = X.astype(dtype)
    like = jnp.asarray(x)
    found = GaussianMixture(3, random_state=0).fit(like)
    expected = GaussianMixture(3, random_state=0).fit(x)
    again = pickle.loads(pickle.dumps(found))
    found.save(tmp_path / "model")
    loaded = GaussianMixture.load(tmp_path / "model")
    for name in FITTED:
        assert_like(getattr(again, name), getattr(expected, name), like)
        assert np.array_equal(getattr(loaded, name), getattr(expected, name))
    assert_like(loaded.predict_proba(like), expected.predict_proba(x), like)
    assert np.array_equal(found.to_sklearn().means_, expected.means_)
    path = tmp_path / "checkpoint"
    settings = {"random_state": 0, "trainer_params": {"max_epochs": 4}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ConvergenceWarning
        GaussianMixture(3, **settings).fit(x, checkpoint=path, checkpoint_every=1)
    resumed = GaussianMixture(3, random_state=0).fit(like, checkpoint=path, resume=True)
    assert_like(resumed.means_, expected.means_, like)
    if importlib.util.find_spec("torch"):
        assert np.array_equal(to_numpy(found.model_.means), expected.means_)


@needs_jax
@pytest.mark.parametrize("dtype", ["float32"])
def test_the_array_api_is_still_there(jnp, dtype, monkeypatch):
    monkeypatch.setenv("GAUSSMIX_BACKEND", "array_api")
    like, weight = jnp.asarray(X.astype(dtype)), jnp.asarray(WEIGHT)
    settings = {"covariance_type": "spherical", "init_means": X[:3]}
    found = GaussianMixture(3, **settings).fit(like, sample_weight=weight)
    assert found.backend_ == "array_api:jax"
    assert found.precision_ == f"centred-{dtype}"
    clusters = KMeans(3, random_state=0).fit(like)
    monkeypatch.setenv("GAUSSMIX_BACKEND", "numpy")
    expected = GaussianMixture(3, **settings).fit(like, sample_weight=weight)
    assert np.allclose(found.means_, expected.means_, rtol=1e-3)
    assert np.array_equal(found.predict(like), expected.predict(like))
    assert np.allclose(clusters.centroids_, KMeans(3, random_state=0).fit(like).centroids_, rtol=1e-3)


@needs_jax
@pytest.mark.parametrize("dtype", ["float64"])
def test_covariances_that_float32_would_lose(jnp, dtype):
    x = np.concatenate([X, X[:, :1] + 1e-4 * X[:, 1:2]], axis=1).astype(np.float32)
    like = jnp.asarray(x)
    settings = {"covariance_regularization": 1e-9, "init_means": x[:2]}
    found, expected = (GaussianMixture(2, covariance_type="full", **settings).fit(data) for data in (like, x))
    assert expected.covariances_.dtype == np.float64
    for name in FITTED:
        assert_like(getattr(found, name), getattr(expected, name), like)


@needs_jax
@pytest.mark.parametrize("narrow", ["bfloat16", "float16", "int32", "bool"])
def test_dtypes_that_are_not_those_of_what_comes_back(jnp, narrow, dtype):
    like = jnp.asarray(X).astype(narrow)
    found = GaussianMixture(2, random_state=0).fit(like, sample_weight=jnp.asarray(WEIGHT).astype("bfloat16"))
    assert str(found.means_.dtype) == ("float32" if "float16" in narrow else dtype)
    assert found.predict_proba(like).dtype == found.means_.dtype
    assert is_on_host(like)
    assert np.array_equal(to_numpy(like), np.asarray(like))


@needs_jax
def test_data_that_is_not_finite(jnp, dtype):
    like = jnp.asarray(X.astype(dtype)).at[17, 1].set(jnp.nan)
    with pytest.raises(ValueError, match="NaN .first in row 17"):
        GaussianMixture(2).fit(like)
    with pytest.raises(ValueError, match="NaN .first in row 17"):
        GaussianMixture(2).fit(Blocks(like, 10))


@needs_jax
def test_an_array_in_several_parts():
    """DLPack has no name for it: it is computed by JAX."""
    code = """
from functools import partial
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from gaussmix import GaussianMixture
x = np.random.RandomState(0).normal(size=(100, 2)).astype(np.float32)
x[:50] += 9
parts = jax.device_put(x, NamedSharding(Mesh(jax.devices(), "rows"), PartitionSpec("rows")))
mixture = partial(GaussianMixture, 2, covariance_type="spherical", init_means=x[[0, -1]])
found, expected = mixture().fit(parts), mixture().fit(x)
assert found.backend_ == "array_api:jax", found.backend_
assert np.allclose(found.means_, expected.means_, atol=1e-3)
second = mixture().fit(jax.device_put(x, jax.devices()[1]))
assert second.backend_ == "numpy" and second.means_.device == jax.devices()[1], second.means_.device
assert np.array_equal(second.means_, expected.means_)
"""
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=os.environ | environment)
