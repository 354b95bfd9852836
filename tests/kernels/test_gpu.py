"""What only a GPU can show: CuPy, streams, more than 2^31 numbers, the same bits, no recompilation, no stray access."""

import gc
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import gaussmix_kernels as kernels
from cases import PARAMETER_TOLERANCE, assert_close, blobs, start_for
from gaussmix import KMeans
from gaussmix._arrays import to_numpy
from gaussmix.sklearn import GaussianMixture
from gaussmix_kernels import _centred, _features, _parameters, _prepass, _sums, gate
from kernels.common import DEVICE

pytestmark = [
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU, and TRITON_INTERPRET not set to 1"),
    pytest.mark.usefixtures("unconverged"),
]

PARAMETERS = ("weights_", "means_", "covariances_")


def fitted(x, covariance_type, k=4, iterations=10):
    start = start_for(to_numpy(x), k, covariance_type)
    mixture = GaussianMixture(k, covariance_type=covariance_type, tol=0, max_iter=iterations, reg_covar=1e-3, **start)
    return mixture.fit(x)


def assert_fits_are_close(found, expected, dtype):
    for name in PARAMETERS:
        assert_close(to_numpy(getattr(found, name)), getattr(expected, name), PARAMETER_TOLERANCE[dtype], name)


@pytest.mark.parametrize(("n", "d", "k"), [(10_001, 8, 4), (50_003, 33, 17), (20_001, 70, 5)])
def test_fits_of_many_rows_equal_those_of_numpy(covariance, dtype, n, d, k):
    x = blobs(n=n, d=d, k=k).astype(dtype)
    found = fitted(torch.as_tensor(x, device="cuda"), covariance.name, k)
    assert found.backend_ == "triton"
    assert found.means_.device.type == "cuda"
    assert_fits_are_close(found, fitted(x.astype(np.float64), covariance.name, k), dtype)


@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own stream"])
def test_cupy_arrays_in_and_out(covariance, dtype, own_stream):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    x = blobs(n=5003, d=5, k=4).astype(dtype)
    stream = cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.Stream.null
    with stream:
        there, source = cupy.zeros(x.shape, dtype), cupy.asarray(x)
        stream.synchronize()
        # Some tenths of a second on this very stream: a fit that is not ordered after it sees zeros.
        clock = cupy.RawKernel(
            'extern "C" __global__ void wait() { long long t = clock64(); while (clock64() - t < 600000000LL); }',
            "wait",
        )
        clock((1,), (1,), ())
        there[...] = source
        found = fitted(there, covariance.name)
        labels, proba = found.predict(there), found.predict_proba(there)
        clusters = KMeans(4, random_state=0).fit(there)
        assert isinstance(clusters.centroids_, cupy.ndarray)
        assert isinstance(found.means_, cupy.ndarray)
        assert isinstance(labels, cupy.ndarray)
        assert found.backend_ == "triton"
        x = there.get().astype(np.float64)
        expected = fitted(x, covariance.name)
        assert_fits_are_close(found, expected, dtype)
        assert_close(proba.get(), expected.predict_proba(x), 1e-2 if dtype == "float32" else 1e-8)
        assert np.mean(labels.get() == expected.predict(x)) > 0.999


def test_cupy_memory_is_shared():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    from gaussmix.backends._triton import _tensor

    x = cupy.zeros((7, 3))
    assert _tensor(x).data_ptr() == x.data.ptr
    strided = cupy.zeros((14, 6))[::2, ::2]
    assert _tensor(strided).stride() == (12, 2)


def test_a_stream_of_torch(covariance):
    x = blobs(n=20_001, d=8, k=4)
    expected = fitted(x, covariance.name)
    stream = torch.cuda.Stream()
    there = torch.empty((20_001, 8), dtype=torch.float64, device="cuda")
    source = torch.as_tensor(x).pin_memory()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        there.copy_(source, non_blocking=True)
        found = fitted(there, covariance.name)
    assert_fits_are_close(found, expected, "float64")


def test_the_same_fit_gives_the_same_bits(covariance, dtype):
    x = torch.as_tensor(blobs(n=100_003, d=12, k=6).astype(dtype), device="cuda")
    first, second = (fitted(x, covariance.name, k=6) for _ in range(2))
    for name in PARAMETERS:
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.lower_bounds_ == second.lower_bounds_
    assert torch.equal(first.predict_proba(x), second.predict_proba(x))


def test_another_number_of_rows_compiles_nothing(covariance, dtype):
    from triton.runtime import JITFunction

    def compiled():
        modules = (_centred, _features, _parameters, _prepass, _sums, *map(kernels.type_of, gate.TYPES))
        functions = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, JITFunction)}
        return sum(len(cache[0]) for function in functions.values() for cache in function.device_caches.values())

    def everything(n):
        x = torch.as_tensor(blobs(n=n, d=5, k=4).astype(dtype), device="cuda")
        found = fitted(x, covariance.name)
        found.predict(x)
        found.predict_proba(x)
        KMeans(4, random_state=0).fit(x)

    everything(4096)
    before = compiled()
    assert before > 0
    for n in (1, 16, 4095, 4097, 70_000):
        everything(max(n, 50 + n % 2))
    assert compiled() == before


@pytest.mark.big
def test_more_than_31_bits_of_numbers(covariance):
    n, d = 2**27 + 5, 17
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of GPU memory; {free / 2**30:.0f} are free")
    x = torch.zeros((n, d), dtype=torch.float16, device="cuda")
    x[::2] = 6
    torch.manual_seed(0)
    for start in range(0, n, 2**24):
        part = x[start : start + 2**24]
        part += torch.randn(part.shape, dtype=torch.float16, device="cuda")
    start = dict(weights_init=[0.5, 0.5], means_init=[[0.0] * d, [6.0] * d])
    found = GaussianMixture(2, covariance_type=covariance.name, tol=0, max_iter=2, **start).fit(x)
    assert found.backend_ == "triton"
    assert n * d > 2**31
    assert_close(to_numpy(found.weights_), [0.5, 0.5], 1e-3)
    assert_close(to_numpy(found.means_), [[0.0] * d, [6.0] * d], 1e-3)
    # The last rows are read and labelled as the first ones are.
    labels = found.predict(x)
    assert torch.equal(labels[-2000:] == labels[0], (torch.arange(n - 2000, n, device="cuda") % 2) == 0)
    del x, labels
    gc.collect()
    torch.cuda.empty_cache()


SANITIZED = """
import numpy as np, torch
from gaussmix import GaussianMixture, KMeans
x = torch.as_tensor(np.random.RandomState(0).normal(size=(301, 5)), device="cuda")
for dtype in (torch.float32, torch.float64):
    for name in ("full", "tied", "diag", "spherical"):
        mixture = GaussianMixture(3, covariance_type=name, trainer_params={"max_epochs": 2}, random_state=0)
        mixture.fit(x.to(dtype)).predict_proba(x.to(dtype))
    KMeans(3, random_state=0).fit(x.to(dtype))
"""


def test_no_access_outside_of_memory():
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-W", "ignore", "-c", SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
