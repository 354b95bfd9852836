"""Rows of host memory on a GPU: a simulated one, whose work is as late as it can be, and a real one where there is one.

On the simulated device nothing that is put into a stream happens before somebody waits for it. Tensors are full of NaN
until their copy has happened, so that who reads too early notices.
"""

import queue
import threading
from collections import deque
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cases import PARAMETER_TOLERANCE, assert_close
from gaussmix import GaussianMixture, KMeans
from gaussmix._covariance import COVARIANCES

torch = pytest.importorskip("torch")
# Imports torch.
from gaussmix.rows import _gpu, _placement  # noqa: E402

pytestmark = pytest.mark.usefixtures("unconverged")

X = np.random.RandomState(0).normal(size=(1003, 3)) + np.repeat([[0.0], [9.0]], [500, 503], axis=0)


class Event:
    def __init__(self, stream):
        self.stream, self.happened = stream, False

    def synchronize(self):
        while not self.happened:
            self.stream.queue.popleft()()


class Stream:
    def __init__(self, where="cuda:0"):
        self.queue = deque()

    def record_event(self):
        event = Event(self)
        self.queue.append(lambda: setattr(event, "happened", True))
        return event

    def wait_event(self, event):
        event.synchronize()  # what works on rows here are CPUs, which do so at once

    def synchronize(self):
        self.record_event().synchronize()


class Device:
    """A GPU with its own stream of work; counts what it holds."""

    def __init__(self):
        self.stream, self.current = Stream(), threading.local()
        self.free, self.pinned, self.shared = 2**40, 0, []

    @contextmanager
    def within(self, stream):
        before, self.current.stream = getattr(self.current, "stream", self.stream), stream
        yield
        self.current.stream = before

    def copied(self, x, where="cuda:0", dtype=None):
        """What `tensor.to(where, dtype, non_blocking=True)` gives."""
        there = torch.full_like(x, torch.nan, dtype=dtype)
        stream = getattr(self.current, "stream", self.stream)
        stream.queue.append(lambda: there.copy_(x))
        if stream is self.stream:  # pageable memory: it waits
            stream.synchronize()
        return there


@pytest.fixture
def device(monkeypatch):
    device = Device()

    def pin_memory(tensor):
        device.pinned += 1
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", device.within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: device.stream)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (device.free, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda where: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where: 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: device.shared.append(stream))
    monkeypatch.setattr(_placement, "_n_gpus", lambda: 2)
    monkeypatch.setattr(
        _placement, "_moved", lambda x, where: x if where == "cpu" else device.copied(_gpu.as_tensor(x), where)
    )
    rounded = _placement.Placement.rounded
    monkeypatch.setattr(
        _placement.Placement,
        "rounded",
        lambda settings, x: (
            device.copied(x, dtype=getattr(torch, settings.dtype))
            if settings.dtype and torch.is_tensor(x)
            else rounded(settings, x)
        ),
    )
    return device


class Loader:
    """Blocks of rows, anew in each pass."""

    def __init__(self, *blocks):
        self.blocks = blocks

    def __iter__(self):
        return iter(self.blocks)


def awkward_blocks():
    read_only = X[300:301].copy()
    read_only.flags.writeable = False
    return [X[:300], read_only, X[400:300:-1], torch.as_tensor(X[401:404]), np.asfortranarray(X[404:]), X[:0]]


# Copies


def test_blocks_arrive_whole_and_in_order(device):
    expected = [np.asarray(block) for block in awkward_blocks()]
    number = 0
    for found in _gpu.sent("cuda:0", device.copied, awkward_blocks()):
        assert np.array_equal(found.numpy(), expected[number])
        number += 1
    assert number == len(expected) == device.pinned
    # The allocator knows that the stream of the work reads what belongs to the stream of the copies.
    assert device.shared == [device.stream] * number


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_blocks_arrive_on_a_real_gpu():
    def place(x):
        return x.to("cuda:0", non_blocking=True)

    total = 0.0
    blocks = [np.full((2**18, 16), value, dtype=np.float32) for value in range(20)] + awkward_blocks()
    for block, found in zip(blocks, _gpu.sent("cuda:0", place, blocks), strict=True):
        assert found.is_cuda
        assert np.array_equal(found.cpu().numpy(), np.asarray(block))
        total += float(found.sum())
    assert total == pytest.approx(sum(float(np.asarray(block).sum()) for block in blocks))


def test_the_next_block_is_copied_while_one_is_in_use_and_no_more(device):
    begun, worked_on = queue.Queue(), []

    def blocks():
        for number in range(12):
            begun.put(number)
            yield X[:5]

    for number, _ in enumerate(_gpu.sent("cuda:0", device.copied, blocks())):
        assert number or begun.get() == 0
        # Another thread begins with the next block while this one is in use.
        assert number == 11 or begun.get(timeout=10) == number + 1
        assert begun.empty()
        # All but the last one before it are done with.
        assert worked_on == list(range(number - 1))
        device.stream.queue.append(partial(worked_on.append, number))


def test_a_source_that_raises_halfway(device):
    def blocks():
        yield X[:4]
        raise OSError("the disk is gone")

    sent = _gpu.sent("cuda:0", device.copied, blocks())
    assert next(sent).shape == (4, 3)
    with pytest.raises(OSError, match="the disk is gone"):
        next(sent)


def test_a_pass_that_is_given_up_ends(device):
    before = threading.active_count()
    sent = _gpu.sent("cuda:0", device.copied, [X[:4]] * 5)
    next(sent)
    sent.close()
    assert threading.active_count() == before


# Where rows go


@pytest.mark.parametrize(("dtype", "row_bytes"), [("float64", 8 * 3), ("float32", 4 * 3)])
def test_rows_go_in_blocks_where_they_would_not_have_room(device, monkeypatch, dtype, row_bytes):
    x = X.astype(dtype)
    monkeypatch.setattr(_gpu, "BLOCK_BYTES", 200 * row_bytes + 1)
    device.free = _gpu.ROOM * len(X) * row_bytes
    assert _gpu.block_rows(x, "cuda:0") is None
    device.free -= 1
    assert _gpu.block_rows(x, "cuda:0") == 200
    # What the allocator keeps for itself is free.
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda where: 101)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where: 100)
    assert _gpu.block_rows(x, "cuda:0") is None


def fitted(x, covariance_type="diag", batch_size=None, sample_weight=None, **params):
    settings = dict(covariance_type=covariance_type, init_means=X[[0, 600]], batch_size=batch_size)
    params = dict(max_epochs=4, enable_progress_bar=False) | params
    mixture = GaussianMixture(2, convergence_tolerance=0, trainer_params=params, **settings)
    return mixture.fit(x, sample_weight=sample_weight)


def forms(x, folder):
    """The rows in each form that goes block by block: (rows, batch_size)."""
    np.save(folder / "x.npy", x)
    return {
        "array": (x, 300),
        "tensor": (torch.as_tensor(x), 77),
        "memmap": (np.load(folder / "x.npy", mmap_mode="r"), 400),
        "loader": (Loader(x[:1], x[1:700], x[700:]), None),
        "too large": (x, None),
    }


@pytest.mark.parametrize("covariance_type", sorted(COVARIANCES))
@pytest.mark.parametrize("form", ["array", "tensor", "memmap", "loader", "too large"])
def test_fits_and_predictions_are_those_of_the_host(device, monkeypatch, tmp_path, form, covariance_type, dtype):
    host = X.astype(dtype)
    x, batch_size = forms(host, tmp_path)[form]
    if form == "too large":
        device.free = 3 * x.nbytes - 1
        monkeypatch.setattr(_gpu, "BLOCK_BYTES", 3 * x.itemsize * 250)
    expected = fitted(host, covariance_type)
    found = fitted(x, covariance_type, batch_size, accelerator="gpu")
    assert device.pinned > 4  # a block or more for each iteration
    tolerance = 1e-10 if dtype == "float64" else PARAMETER_TOLERANCE[dtype]
    for name in ("weights_", "means_", "covariances_"):
        value = getattr(found, name)
        assert type(value) is (torch.Tensor if form == "tensor" else np.ndarray)
        assert str(value.dtype).endswith(dtype)
        assert_close(np.asarray(value), getattr(expected, name), tolerance, name)
    assert_close(np.asarray(found.score_samples(x)), expected.score_samples(host), tolerance)
    assert np.array_equal(found.predict(x), expected.predict(host))


def test_weights_travel_with_the_rows(device):
    weight = np.random.RandomState(1).randint(0, 3, len(X)).astype(float)
    expected = fitted(X, sample_weight=weight)
    found = fitted(X, batch_size=300, sample_weight=weight, accelerator="gpu", devices=[1])
    assert_close(found.means_, expected.means_, 1e-10)


def test_rows_that_have_room_go_as_a_whole(device):
    found = fitted(X, accelerator="gpu")
    assert device.pinned == 0
    assert_close(found.means_, fitted(X).means_, 1e-10)


def test_the_device_rounds(device):
    found = fitted(X, batch_size=300, accelerator="gpu", precision=32)
    assert found.means_.dtype == np.float32
    assert_close(found.means_, fitted(X).means_, 1e-4)


def test_k_means_on_rows_that_pass_through(device):
    settings = dict(convergence_tolerance=0, random_state=0)
    expected = KMeans(2, **settings).fit(X)
    found = KMeans(2, batch_size=100, trainer_params={"accelerator": "gpu"}, **settings).fit(X)
    assert device.pinned > 20
    assert_close(found.centroids_, expected.centroids_, 1e-10)
    assert np.array_equal(found.predict(X), expected.predict(X))


def test_the_benchmark(device, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import gpu

    monkeypatch.setattr(gpu, "HOST", (600, 5, 3))
    monkeypatch.setattr(_gpu, "BLOCK_BYTES", 4 * 5 * 128)
    monkeypatch.setattr(gpu.Bench, "dry", False)
    monkeypatch.setattr(gpu.Bench, "milliseconds", lambda bench, function: 1e3 * bench.seconds(function))
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where=None: 0)
    bench = gpu.Bench("cpu")
    gpu.from_host(bench)
    assert "skipped" not in bench.found
    assert [row["type"] for row in bench.found["host"]] == list(gpu.TYPES)
    assert all(row["ms"] > 0 for row in bench.found["host"])
