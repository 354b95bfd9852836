"""Several processes that share the rows: any number of them as threads, and two real ones under Lightning Fabric."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import two_processes
from cases import PARAMETER_TOLERANCE, assert_close, blobs
from gaussmix import GaussianMixture, KMeans, _distributed
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._parameters import SingularCovarianceError

pytestmark = pytest.mark.usefixtures("unconverged")

ESTIMATORS = pytest.mark.parametrize("cls", [GaussianMixture, KMeans])
ARRAYS = ("weights_", "means_", "covariances_", "precisions_cholesky_", "lower_bounds_", "centroids_", "inertia_")
TWO = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}


class Group(_distributed.Group):
    """Threads in the place of processes."""

    def __init__(self, rank, size, slots, barrier):
        self.rank, self.size, self.device, self._slots, self._barrier = rank, size, "cpu", slots, barrier

    def each(self, value):
        self._slots[self.rank] = value
        self._barrier.wait()
        values = copy.deepcopy(self._slots)
        self._barrier.wait()
        return values

    def sum(self, values):
        return np.sum(self.each(values), axis=0)

    def from_first(self, value):
        return self.each(value)[0]


def launch(fabric_params, function):
    """`function` in as many threads as there are devices; what all of them have found."""
    size = fabric_params["devices"]
    slots, barrier = [None] * size, threading.Barrier(size, timeout=20)

    def run(rank):
        try:
            return pickle.dumps(function(Group(rank, size, slots, barrier)))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(run, range(size)))
    if isinstance(found[0], Exception):
        assert {repr(error) for error in found} == {repr(found[0])}
        raise found[0]
    assert set(found) == {found[0]}
    return pickle.loads(found[0])


@pytest.fixture
def threads(monkeypatch):
    for module in ("_mixture", "_kmeans"):
        monkeypatch.setattr(f"gaussmix.{module}.launch", launch)


def fitted(
    x, devices=None, sample_weight=None, cls=GaussianMixture, k=3, batch_size=None, trainer_params=None, **params
):
    if cls is GaussianMixture:
        params = {"convergence_tolerance": 0} | params
    settings = {"max_epochs": 8} | (trainer_params or {}) | ({"devices": devices} if devices else {})
    return cls(k, random_state=0, batch_size=batch_size, trainer_params=settings, **params).fit(
        x, sample_weight=sample_weight
    )


def assert_same_fit(found, expected, tolerance):
    assert found.persistent_attributes == expected.persistent_attributes
    for name in set(ARRAYS) & set(found.persistent_attributes):
        assert_close(to_numpy(getattr(found, name)), to_numpy(getattr(expected, name)), tolerance, name)
    assert (found.num_iter_, found.converged_) == (expected.num_iter_, expected.converged_)


@st.composite
def shares(draw, n):
    """A number of processes, and weights: none, or 0 for some rows and for all of some shares."""
    size = draw(st.integers(2, 5))
    if draw(st.booleans()):
        return size, None
    weight = np.random.RandomState(draw(st.integers(0, 99))).uniform(0.5, 2, size=n)
    weight[:: draw(st.integers(2, 7))] = 0
    for rank in draw(st.sets(st.integers(0, size - 1), max_size=size // 2)):
        weight[n * rank // size : n * (rank + 1) // size] = 0
    return size, weight


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("strategy", ["kmeans", "random"])
@settings(max_examples=8)
@given(shares=shares(101), covariance_type=st.sampled_from(sorted(COVARIANCES)))
def test_any_number_of_processes_gives_the_fit_of_one(library, strategy, shares, covariance_type):
    x = library.asarray(blobs(n=101, d=2, k=3, seed=5, sort=True))
    size, weight = shares
    params = dict(init_strategy=strategy, covariance_type=covariance_type, sample_weight=weight)
    found = fitted(x, size, **params)
    assert_same_fit(found, fitted(x, **params), 1e-9)
    assert library.owns(found.means_)


@pytest.mark.usefixtures("threads")
@settings(max_examples=8)
@given(shares=shares(101))
def test_any_number_of_processes_gives_the_clusters_of_one(library, implementation, shares):
    x = library.asarray(blobs(n=101, d=2, k=4, seed=5, sort=True))
    size, weight = shares
    params = dict(cls=KMeans, k=4, sample_weight=weight)
    found = fitted(x, size, **params)
    assert_same_fit(found, fitted(x, **params), 1e-12)
    assert library.owns(found.centroids_)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n", [2, 3, 7])
def test_more_processes_than_rows(library, covariance, n):
    x = library.asarray(blobs(n=n, d=2, k=1))
    for strategy in ("kmeans", "random"):
        params = dict(k=1, covariance_type=covariance.name, init_strategy=strategy)
        assert_same_fit(fitted(x, 5, **params), fitted(x, **params), 1e-9)
    assert_same_fit(fitted(x, 5, cls=KMeans, k=1), fitted(x, cls=KMeans, k=1), 1e-12)


@pytest.mark.usefixtures("threads")
def test_the_form_of_the_e_step_changes_in_all_processes(covariance, dtype):
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.normal(size=(150, 3)) * [1, 2, 0.5] + centre for centre in (0, 1e4, 3e4)]).astype(dtype)
    params = dict(covariance_type=covariance.name, init_means=x[:3] + 1e4, trainer_params={"max_epochs": 30})
    found, expected = fitted(x, 3, **params), fitted(x, **params)
    assert found.precision_ == expected.precision_
    for name in ("weights_", "means_", "covariances_", "precisions_cholesky_", "nll_"):
        assert_close(getattr(found, name), getattr(expected, name), PARAMETER_TOLERANCE[dtype], name)


@pytest.mark.usefixtures("threads")
def test_shares_of_separated_components_are_pruned():
    x = blobs(n=2000, d=3, k=12, seed=1, spread=60)
    params = dict(k=12, covariance_type="full")
    assert_same_fit(fitted(x, 2, **params), fitted(x, **params), 1e-10)


@pytest.mark.usefixtures("threads")
@ESTIMATORS
def test_batches_and_precision(cls, library):
    x = library.asarray(blobs(n=301, d=2, k=3))
    assert_same_fit(fitted(x, 2, cls=cls, batch_size=40), fitted(x, cls=cls), 1e-9)
    single = {"precision": 32}
    found, expected = (fitted(x, devices, cls=cls, trainer_params=single) for devices in (2, None))
    assert_same_fit(found, expected, PARAMETER_TOLERANCE["float32"])


@pytest.mark.usefixtures("threads")
def test_one_process_shows_a_progress_bar(capfd):
    fitted(blobs(n=60), 3, trainer_params={"enable_progress_bar": True})
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", [2, 3])
def test_all_processes_raise_the_same_error(library, covariance, size):
    x = library.asarray(two_processes.COLLAPSED)
    params = dict(k=2, covariance_type=covariance.name, covariance_regularization=0)
    with pytest.raises(SingularCovarianceError) as expected:
        fitted(x, **params)
    with pytest.raises(SingularCovarianceError) as found:
        fitted(x, size, **params)
    assert str(found.value) == str(expected.value)


# What is refused before a process is started


@ESTIMATORS
def test_a_loader_can_not_be_shared(cls):
    class Blocks:
        def __iter__(self):
            return iter(np.split(blobs(n=40), 4))

    with pytest.raises(TypeError, match="several processes share the rows of an array.*or devices=1"):
        cls(2, trainer_params=TWO).fit(Blocks())


@ESTIMATORS
@pytest.mark.parametrize(
    "params", [{"devices": 2}, {"devices": [0, 1]}, {"devices": -1}, {"num_nodes": 2}, {"strategy": "ddp"}]
)
def test_without_lightning(cls, params, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(ImportError, match=r"which Lightning Fabric launches; install gaussmix\[lightning\]"):
        cls(2, trainer_params={"accelerator": "cpu"} | params).fit(blobs(n=40))


# How processes are started


@pytest.fixture
def fabric(monkeypatch):
    """What Lightning Fabric is told, in a process that it says is the only one."""
    pytest.importorskip("torch")
    told = {}

    class Fabric:
        strategy = object()

        def __init__(self, **params):
            told.update(params)

        def launch(self, function):
            return function(self)

    monkeypatch.setitem(sys.modules, "lightning_fabric", type(sys)("lightning_fabric"))
    sys.modules["lightning_fabric"].Fabric = Fabric
    return told


def test_a_strategy_of_one_process(fabric):
    with pytest.raises(
        ValueError, match="started a single process with strategy object; pass devices of at least 2, or"
    ):
        GaussianMixture(2, trainer_params={"strategy": "single_device", "max_epochs": 3}).fit(blobs(n=40))
    assert fabric == {"strategy": "single_device"}


def test_processes_that_torchrun_has_started(fabric, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for params, devices in (({"strategy": "ddp"}, 2), ({"strategy": "ddp", "devices": 3}, 3)):
        with pytest.raises(ValueError, match="single process"):
            GaussianMixture(2, trainer_params=params).fit(blobs(n=40))
        assert fabric.pop("devices") == devices


@pytest.mark.parametrize("is_own", [True, False])
def test_the_group_lives_as_long_as_whoever_made_it(is_own, monkeypatch):
    distributed = pytest.importorskip("torch.distributed")
    left = []
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: left.append(True))
    monkeypatch.setattr(_distributed.atexit, "register", lambda function: left.append(function))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        call = dict(function=lambda group: group.size, is_own=is_own)
        fabric = type("Fabric", (), {"device": "cpu"})()
        assert pickle.loads(_distributed._in_group(fabric, **call)) == 1
        # The script goes on: its next fit meets the other processes in the same group.
        assert left == ([_distributed._leave] if is_own else [])
        left.clear()
        monkeypatch.setattr(_distributed, "parent_process", lambda: "who spawned this one")
        _distributed._in_group(fabric, **call)
        assert left == ([True] if is_own else [])
    finally:
        monkeypatch.undo()
        _distributed._leave()
    _distributed._leave()  # nothing to leave


# Two processes


def run(folder, strategy, timeout=120):
    """What the processes of `two_processes.py` wrote, once all of them have ended."""
    pytest.importorskip("lightning_fabric")
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name and "WORLD" not in name}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    script = subprocess.Popen(
        [sys.executable, two_processes.__file__, strategy, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = script.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(script.pid, signal.SIGKILL)
        raise
    assert script.returncode == 0, printed
    assert "Traceback" not in printed
    reports = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    for _ in range(100):
        if not any(is_running(report["pid"]) for report in reports):
            break
        time.sleep(0.1)
    assert not [report["pid"] for report in reports if is_running(report["pid"])]
    return [report["found"] for report in reports]


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def assert_same_outcome(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, (list, float)) and name != "error":
            assert_close(found[name], value, 1e-9, name)
        else:
            assert found[name] == value, name


def test_two_processes_give_the_fits_of_one(tmp_path):
    first, second = run(tmp_path, "ddp")
    assert first == second
    assert first.keys() == two_processes.fits().keys()
    for name, fit in two_processes.fits().items():
        if name == "fresh seed":
            assert first[name]["num_iter_"] == 8
        elif name == "float32":
            assert_close(first[name]["covariances_"], two_processes.outcome(*fit)["covariances_"], 1e-4)
        else:
            assert_same_outcome(first[name], two_processes.outcome(*fit))
    error, message, is_numpys = first["singular"]["error"]
    assert error == "SingularCovarianceError"
    assert "is not positive definite" in message
    assert is_numpys


def test_two_spawned_processes_give_the_fit_of_one(tmp_path):
    (found,) = run(tmp_path, "ddp_spawn")
    assert_same_outcome(found["full"], two_processes.outcome(*two_processes.fits()["full"]))
