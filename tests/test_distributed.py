"""Several processes that share the rows: any number of them as threads, and two real ones under Lightning Fabric."""

import copy
import json
import os
import pickle
import re
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
from gaussmix import GaussianMixture, KMeans
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._parameters import SingularCovarianceError
from gaussmix.compat import _fabric
from gaussmix.rows import _group, _processes
from gaussmix.sklearn import GaussianMixture as SklearnMixture

pytestmark = pytest.mark.usefixtures("unconverged")

MIXTURES = (GaussianMixture, SklearnMixture)
ESTIMATORS = pytest.mark.parametrize("cls", [GaussianMixture, KMeans])
ARRAYS = ("weights_", "means_", "covariances_", "precisions_cholesky_", "lower_bounds_", "centroids_", "inertia_")
TWO = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}


class Group(_group.Group):
    """Threads in the place of processes; what they sum has to be equally long."""

    def __init__(self, rank, size, slots, barrier):
        self.rank, self.size, self.device, self._slots, self._barrier = rank, size, "cpu", slots, barrier

    def _all_gather(self, value):
        return self._exchanged("gather", value)

    def _all_reduce(self, vector):
        return np.sum(self._exchanged(f"sum {vector.shape}", vector), axis=0)

    def _exchanged(self, kind, value):
        self._slots[self.rank] = kind, value
        self._barrier.wait()
        kinds, values = zip(*copy.deepcopy(self._slots), strict=True)
        assert set(kinds) == {kind}
        self._barrier.wait()
        return list(values)


def groups_of(size):
    slots, barrier = [None] * size, threading.Barrier(size, timeout=5)
    return [Group(rank, size, slots, barrier) for rank in range(size)]


def in_each(groups, function):
    """What `function` of each process's group finds or raises, as they run at the same time."""

    def run(group):
        try:
            return function(group)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(run, groups))


def launch(fabric_params, function):
    """`function` in as many threads as there are devices; what all of them have found."""

    def run(group):
        with group.together():
            return pickle.dumps(function(group))

    found = in_each(groups_of(fabric_params["devices"]), run)
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
    x = blobs(n=2000, d=48, k=8, seed=1, spread=60)
    params = dict(k=8, covariance_type="full")
    found = fitted(x, 2, **params)
    assert_same_fit(found, fitted(x, **params), 1e-10)
    assert found.precision_ == "centred-float64"


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


# Processes that are told different things, or fail: each has a share of X


@pytest.fixture
def groups(monkeypatch):
    """Three processes, which are what `fit` takes for `distributed`."""
    monkeypatch.setattr("gaussmix._methods.process_group", lambda distributed, X, device: distributed)
    return groups_of(3)


def mixture(cls=GaussianMixture, max_iter=6, **params):
    if cls is GaussianMixture:
        return cls(**{"num_components": 2, "random_state": 0, "trainer_params": {"max_epochs": max_iter}} | params)
    return cls(**{"n_components": 2, "random_state": 0, "max_iter": max_iter} | params)


def fit_shares(groups, *fits):
    """The estimators of the processes once they are fitted, or the errors; a fit is (estimator, arguments of fit)."""

    def fit(group):
        estimator, arguments = fits[group.rank]
        return estimator.fit(**{"X": SHARES[group.rank]} | arguments, distributed=group)

    return in_each(groups, fit)


def assert_usable(groups):
    """The next fit in these processes is that of the whole."""
    found = fit_shares(groups, *((mixture(convergence_tolerance=0), {}) for _ in groups))
    expected = mixture(convergence_tolerance=0).fit(np.concatenate(SHARES))
    for each in found:
        assert_same_fit(each, expected, 1e-9)


SHARES = np.array_split(blobs(n=90, d=2, k=2, seed=3, sort=True), [20, 50])
IDENTITIES = np.broadcast_to(np.eye(2), (2, 2, 2))
DIFFERING = [
    ("num_components", GaussianMixture, 2, 3),
    ("num_components", GaussianMixture, 2, 0),
    ("covariance_type", GaussianMixture, "full", "diag"),
    ("covariance_type", GaussianMixture, "tied", "round"),
    ("init_strategy", GaussianMixture, "kmeans", "random"),
    ("init_strategy", GaussianMixture, "kmeans++", "random_from_data"),
    ("init_means", GaussianMixture, SHARES[0][:2], SHARES[1][:2]),
    ("init_means", GaussianMixture, None, SHARES[1][:2]),
    ("convergence_tolerance", GaussianMixture, 1e-3, 1e-9),
    ("covariance_regularization", GaussianMixture, 1e-6, 1e-2),
    ("random_state", GaussianMixture, 0, 1),
    ("n_components", SklearnMixture, 2, 3),
    ("covariance_type", SklearnMixture, "spherical", "tied"),
    ("tol", SklearnMixture, 1e-3, 1e-9),
    ("reg_covar", SklearnMixture, 1e-6, 1e-2),
    ("max_iter", SklearnMixture, 6, 7),
    ("n_init", SklearnMixture, 1, 2),
    ("init_params", SklearnMixture, "kmeans", "random"),
    ("weights_init", SklearnMixture, None, [0.5, 0.5]),
    ("means_init", SklearnMixture, SHARES[0][:2], SHARES[1][:2]),
    ("precisions_init", SklearnMixture, IDENTITIES, 2 * IDENTITIES),
    ("random_state", SklearnMixture, 3, 4),
    ("warm_start", SklearnMixture, False, True),
]


@pytest.mark.parametrize("odd", [0, 1, 2])
@pytest.mark.parametrize(("name", "cls", "value", "other"), DIFFERING)
def test_a_parameter_that_differs(groups, name, cls, value, other, odd):
    values = [other if rank == odd else value for rank in range(3)]
    found = fit_shares(groups, *((mixture(cls, **{name: each}), {}) for each in values))
    first, second = (0, 1) if odd == 0 else (0, odd)
    shown = [re.escape(repr(each)) if isinstance(each, (str, int, float)) else ".*" for each in values]
    message = f"^{name} is {shown[first]} in process {first} and {shown[second]} in process {second}; all 3 processes"
    for error in found:
        assert isinstance(error, ValueError)
        assert re.search(message, str(error))
    assert_usable(groups)


def warm(x):
    return mixture(SklearnMixture, warm_start=True).fit(x)


def other_fits(folder):
    """Two fits that differ in what is no parameter, and what the error says of it."""
    x, path = SHARES[1], folder / "fit"
    weights, strict = {"sample_weight": np.ones(len(x))}, {"checkpoint": path, "resume": True}
    return {
        "max_epochs is 6 in process 0 and 7": ((mixture(), {}), (mixture(max_iter=7), {})),
        "precision is None in process 0 and 'float32'": (
            (mixture(), {}),
            (mixture(trainer_params={"max_epochs": 6, "precision": 32}), {}),
        ),
        "the class is 'gaussmix._mixture.GaussianMixture' in process 0 and 'gaussmix.sklearn.GaussianMixture'": (
            *((mixture(), {}), (mixture(SklearnMixture), {})),
        ),
        "checkpoint is None in process 0 and '.*fit'": ((mixture(), {}), (mixture(), {"checkpoint": path})),
        "checkpoint_every is 10 in process 0 and 2": ((mixture(), {}), (mixture(), {"checkpoint_every": 2})),
        "resume is False in process 0 and True": ((mixture(), {"checkpoint": path}), (mixture(), strict)),
        "whether sample_weight is given is False in process 0 and True": ((mixture(), {}), (mixture(), weights)),
        "weights_ .warm_start. is .* in process 0 and None": (
            (warm(x), {}),
            (mixture(SklearnMixture, warm_start=True), {}),
        ),
        "weights_ .warm_start. is .* in process 0 and {": ((warm(x), {}), (warm(x[1:]), {})),
        "the number of features is 2 in process 0 and 1": ((mixture(), {}), (mixture(), {"X": x[:, :1]})),
        "the dtype of X is 'float64' in process 0 and 'float32'": (
            *((mixture(SklearnMixture), {}), (mixture(SklearnMixture), {"X": x.astype(np.float32)})),
        ),
    }


@pytest.mark.parametrize("message", other_fits(Path()))
def test_a_fit_that_differs(groups, message, tmp_path):
    usual, odd = other_fits(tmp_path)[message]
    for error in fit_shares(groups, usual, odd, copy.deepcopy(usual)):
        assert isinstance(error, ValueError)
        assert re.search(f"^{message}.* in process 1; all 3 processes need the same$", str(error))
    assert_usable(groups)


def test_implementations_that_differ(groups, monkeypatch):
    strict = pytest.importorskip("array_api_strict")
    monkeypatch.delenv("GAUSSMIX_BACKEND", raising=False)
    arguments = {"X": strict.asarray(SHARES[2])}
    for error in fit_shares(groups, (mixture(), {}), (mixture(), {}), (mixture(), arguments)):
        message = (
            "the implementation is 'numpy' in process 0 and 'array_api' in process 2; all 3 processes need the same"
        )
        assert str(error) == message
    assert_usable(groups)


@pytest.mark.parametrize("cls", MIXTURES)
def test_what_may_differ(groups, cls, capsys):
    """How rows are read and what is shown; of random states that are no integers, that of the first process counts."""
    own = {"batch_size": 7, "num_workers": 1} if cls is GaussianMixture else {"verbose": 1, "verbose_interval": 3}
    states = [5, np.random if cls is GaussianMixture else None, np.random.RandomState(1)]
    fits = [(mixture(cls, random_state=state, **(own if state == 5 else {})), {}) for state in states]
    found = fit_shares(groups, *fits)
    expected = mixture(cls, random_state=5).fit(np.concatenate(SHARES))
    for each in found:
        assert_same_means(each, expected)


def assert_same_means(found, expected):
    assert len(found.lower_bounds_) == len(expected.lower_bounds_)
    assert_close(found.means_, expected.means_, 1e-9)


@pytest.mark.parametrize("having", [(0,), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("cls", MIXTURES)
def test_callbacks_of_some_processes(groups, cls, having):
    """A callback of the last of them ends the fit; the others see what happens until then."""
    seen = {rank: [] for rank in having}

    def callback(rank):
        def call(iteration, bound, parameters):
            seen[rank].append(iteration)
            return rank == having[-1] and iteration == 3

        return {"callback": call} if rank in having else {}

    tolerance = {"convergence_tolerance": 0} if cls is GaussianMixture else {"tol": 0}
    found = fit_shares(groups, *((mixture(cls, **tolerance), callback(rank)) for rank in range(3)))
    expected = mixture(cls, max_iter=3, **tolerance).fit(np.concatenate(SHARES))
    for each in found:
        assert_same_means(each, expected)
    assert seen == {rank: [1, 2, 3] for rank in having}


class Failing:
    """Blocks of rows, of which the last can not be read in one of the passes."""

    def __init__(self, x, fails_in):
        self.x, self.passes, self.fails_in = x, 0, fails_in

    def __iter__(self):
        self.passes += 1
        yield self.x[:5]
        if self.passes == self.fails_in:
            raise OSError("the disk is gone")
        yield self.x[5:]


def assert_all_failed(found, failed, error, message):
    assert type(found[failed]) is error
    assert re.search(message, str(found[failed]))
    for rank in {0, 1, 2} - {failed}:
        assert type(found[rank]) is RuntimeError
        start = f"process {failed} of 3 failed, and with it the fit: {error.__name__}: "
        assert str(found[rank]) == f"{start}{found[failed]}"


@pytest.mark.parametrize("fails_in", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("strategy", ["kmeans", "random"])
@pytest.mark.parametrize("cls", MIXTURES)
def test_a_source_that_fails(groups, covariance, cls, strategy, fails_in):
    init = {"init_strategy": strategy} if cls is GaussianMixture else {"init_params": strategy, "tol": 0}
    params = {"covariance_type": covariance.name} | init
    if cls is GaussianMixture:
        params["convergence_tolerance"] = 0
    failed = fails_in % 3
    sources = ({"X": Failing(SHARES[failed], fails_in)} if rank == failed else {} for rank in range(3))
    found = fit_shares(groups, *((mixture(cls, **params), arguments) for arguments in sources))
    assert_all_failed(found, failed, OSError, "^the disk is gone$")
    assert_usable(groups)


def raising(iteration, bound, parameters):
    if iteration == 2:
        raise KeyError("a callback's")


@pytest.mark.parametrize("failed", [0, 1])
@pytest.mark.parametrize("others", [{}, {"callback": lambda *args: None}])
@pytest.mark.parametrize("cls", MIXTURES)
def test_a_callback_that_fails(groups, cls, others, failed):
    arguments = ({"callback": raising} if rank == failed else others for rank in range(3))
    found = fit_shares(groups, *((mixture(cls), each) for each in arguments))
    assert_all_failed(found, failed, KeyError, "a callback's")
    assert_usable(groups)


@pytest.mark.parametrize("every", [1, 2, 100])
@pytest.mark.parametrize("cls", MIXTURES)
def test_a_checkpoint_that_can_not_be_written(groups, cls, every, tmp_path):
    """From the second iteration on there is a directory in its place; in the last case its end alone tells."""

    def obstruct(iteration, bound, parameters):
        if iteration == 2:
            (tmp_path / "fit").unlink()
            (tmp_path / "fit" / "in").mkdir(parents=True)

    tolerance = {"convergence_tolerance": 0} if cls is GaussianMixture else {"tol": 0}
    arguments = {"checkpoint": tmp_path / "fit", "checkpoint_every": every}
    calls = [{"callback": obstruct}, {}, {}]
    found = fit_shares(groups, *((mixture(cls, **tolerance), arguments | each) for each in calls))
    assert_all_failed(found, 0, type(found[0]), "^.Errno .* can not be written .*; pass a path where it can be")
    assert_usable(groups)


def test_what_fails_in_one_process_alone(groups, monkeypatch):
    """The progress bar of the first process, say: its stderr is closed."""

    def closed(*args):
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr("gaussmix._em.ProgressBar.__call__", closed)
    shown = {"max_epochs": 6, "enable_progress_bar": True}
    found = fit_shares(groups, *((mixture(trainer_params=shown), {}) for _ in groups))
    assert_all_failed(found, 0, BrokenPipeError, "^nobody reads$")


@pytest.mark.parametrize(
    "cls",
    [GaussianMixture, KMeans],
)
def test_a_launched_process_that_fails(cls, monkeypatch):
    method, found = _processes.InProcesses.reduce, []

    def fails_in_one(self, *args):
        if self._group.rank == 1:
            raise MemoryError("no room")
        return method(self, *args)

    def launch(fabric_params, function):
        def run(group):
            with group.together():
                return function(group)

        found.extend(in_each(groups_of(3), run))
        raise found[0]

    monkeypatch.setattr(_processes.InProcesses, "reduce", fails_in_one)
    monkeypatch.setattr(f"{cls.__module__}.launch", launch)
    with pytest.raises(RuntimeError, match="process 1 of 3 failed"):
        fitted(np.concatenate(SHARES), 3, cls=cls, k=2)
    assert_all_failed(found, 1, MemoryError, "^no room$")


def test_two_ways_to_ask_for_processes(groups):
    settings = {"devices": 2, "accelerator": "cpu"}
    for error in fit_shares(groups, *((mixture(trainer_params=settings), {}) for _ in groups)):
        assert isinstance(error, ValueError)
        assert re.search("trainer_params starts processes .*, and distributed names some that are there", str(error))


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
    monkeypatch.setattr(_fabric.atexit, "register", lambda function: left.append(function))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        call = dict(function=lambda group: group.size, is_own=is_own)
        fabric = type("Fabric", (), {"device": "cpu"})()
        assert pickle.loads(_fabric._in_group(fabric, **call)) == 1
        # The script goes on: its next fit meets the other processes in the same group.
        assert left == ([_group.leave] if is_own else [])
        left.clear()
        monkeypatch.setattr(_fabric, "parent_process", lambda: "who spawned this one")
        _fabric._in_group(fabric, **call)
        assert left == ([True] if is_own else [])
    finally:
        monkeypatch.undo()
        _group.leave()
    _group.leave()  # nothing to leave


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
    refused = [report.pop("apart") for report in (first, second)]
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
    for name, what in (
        ("components", "num_components is 2 in process 0 and 3"),
        ("clusters", "random_state is 0 in process 0 and 1"),
        ("rows", "the shape of X is (200, 3) in process 0 and (201, 3)"),
    ):
        message = f"{what} in process 1; all 2 processes need the same"
        assert [report[name] for report in refused] == [["ValueError", message]] * 2
    assert [report["callback"] for report in refused] == [
        ["RuntimeError", "process 1 of 2 failed, and with it the fit: OSError: the disk is full"],
        ["OSError", "the disk is full"],
    ]


def test_two_spawned_processes_give_the_fit_of_one(tmp_path):
    (found,) = run(tmp_path, "ddp_spawn")
    assert_same_outcome(found["full"], two_processes.outcome(*two_processes.fits()["full"]))
