"""Callbacks, and checkpoints: an interrupted fit goes on to what it would have been, from a file that is whole."""

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sklearn.exceptions import ConvergenceWarning

import oracle
from cases import assert_close, blobs, start_for
from gaussmix import GaussianMixture, _files
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix.rows._data import slices
from gaussmix.sklearn import GaussianMixture as SklearnMixture
from gaussmix.storage._checkpoint import Checkpoint, opened

pytestmark = pytest.mark.usefixtures("unconverged")

ARRAYS = ("weights_", "means_", "covariances_", "precisions_cholesky_")
TYPES = st.sampled_from(sorted(COVARIANCES))
X = blobs(n=211, d=2, k=3, seed=5, spread=2)
ITERATIONS = 9
ESTIMATORS = pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])


class InterruptionError(Exception):
    pass


class InBlocks:
    def __init__(self, x, size=50):
        self.x, self.size = x, size

    def __iter__(self):
        return (self.x[rows, :] for rows in slices(self.x.shape[0], self.size))


def mixture(cls=GaussianMixture, k=3, max_iter=ITERATIONS, tol=0.0, **params):
    params = {"random_state": 0} | params
    if cls is GaussianMixture:
        return cls(k, convergence_tolerance=tol, trainer_params={"max_epochs": max_iter}, **params)
    return cls(k, tol=tol, max_iter=max_iter, **params)


def interrupt_at(n):
    """A callback that raises when it is called for the n-th time."""
    calls = []

    def callback(iteration, bound, parameters):
        calls.append(iteration)
        if len(calls) == n:
            raise InterruptionError

    return callback


def noting(seen):
    """A callback that keeps the numbers of the iterations."""
    return lambda iteration, bound, parameters: seen.append(iteration)


def interrupted(estimator, x, n, path, **arguments):
    with pytest.raises(InterruptionError):
        estimator.clone().fit(x, callback=interrupt_at(n), checkpoint=path, **arguments)


def assert_same_fit(found, expected, tolerance=1e-12):
    for name in ARRAYS:
        assert_close(to_numpy(getattr(found, name)), to_numpy(getattr(expected, name)), tolerance, name)
    assert_close(found.lower_bounds_, expected.lower_bounds_, tolerance, "lower bounds")
    assert found.converged_ == expected.converged_
    assert found.precision_ == expected.precision_


# What was interrupted


@pytest.mark.parametrize("is_in_blocks", [False, True], ids=["in memory", "in blocks"])
@settings(max_examples=6)
@given(covariance_type=TYPES, at=st.integers(1, ITERATIONS), every=st.integers(1, 5))
def test_a_resumed_fit_is_that_of_an_uninterrupted_one(library, dtype, is_in_blocks, covariance_type, at, every):
    x = library.asarray(X, dtype)
    data = InBlocks(x) if is_in_blocks else x
    for cls in (GaussianMixture, SklearnMixture):
        estimator = mixture(cls, covariance_type=covariance_type)
        seen = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "fit"
            interrupted(estimator, data, at, path, checkpoint_every=every)
            found = estimator.clone()
            found.fit(data, checkpoint=path, resume=True, callback=noting(seen))
            assert os.listdir(folder) == ["fit"]
        # The checkpoint is written before the callback is asked.
        assert seen == list(range(at - at % every + 1, ITERATIONS + 1))
        assert_same_fit(found, estimator.fit(data))
        assert library.owns(found.means_)
        assert str(found.means_.dtype).endswith(dtype)


@pytest.mark.parametrize("init_strategy", ["kmeans++", "random", "random_from_data"])
def test_every_start(tmp_path, init_strategy):
    estimator = mixture(init_strategy=init_strategy)
    interrupted(estimator, X, 4, tmp_path / "fit", checkpoint_every=3)
    found = estimator.clone()
    assert_same_fit(found.fit(X, checkpoint=tmp_path / "fit", resume=True), estimator.fit(X))


@ESTIMATORS
def test_the_weights_of_rows(tmp_path, cls):
    weight = np.random.RandomState(0).uniform(size=len(X)) * (np.arange(len(X)) % 5 > 0)
    interrupted(mixture(cls), X, 4, tmp_path / "fit", sample_weight=weight, checkpoint_every=2)
    found = mixture(cls).fit(X, sample_weight=weight, checkpoint=tmp_path / "fit", resume=True)
    assert_same_fit(found, mixture(cls).fit(X, sample_weight=weight))


@pytest.mark.parametrize("is_in_blocks", [False, True], ids=["in memory", "in blocks"])
def test_the_form_of_the_e_step_changes_on_the_way(tmp_path, covariance, dtype, is_in_blocks, monkeypatch):
    """Components start as wide as the data is, nearly equal, and take some iterations to become 1e4 times narrower."""
    monkeypatch.delenv("GAUSSMIX_BACKEND", raising=False)  # one of them has a single form
    rng = np.random.RandomState(0)
    centres = 1e4 * np.vstack([np.zeros(3), np.eye(3)])
    x = np.concatenate([rng.normal(size=(100, 3)) * [1, 2, 0.5] + centre for centre in centres]).astype(dtype)
    start = start_for(x, 4, covariance.name)
    start["means_init"] = x.mean(axis=0) + 1e3 * rng.normal(size=(4, 3))
    estimator = mixture(SklearnMixture, k=4, covariance_type=covariance.name, max_iter=25, **start)
    data = InBlocks(x) if is_in_blocks else x
    expected = estimator.clone().fit(data)
    forms = []
    for at in (1, 3, 6, 7, 8, 9, 20):
        interrupted(estimator, data, at, tmp_path / "fit", checkpoint_every=1)
        forms.append(metadata_of(tmp_path / "fit")["form"])
        assert_same_fit(estimator.clone().fit(data, checkpoint=tmp_path / "fit", resume=True), expected)
    assert forms[0] == f"expanded-{dtype}" != forms[-1]


def test_separated_components_which_are_pruned(tmp_path):
    x = blobs(n=3000, d=48, k=8, seed=1, spread=60)
    estimator = mixture(k=8, covariance_type="full")
    interrupted(estimator, x, 5, tmp_path / "fit", checkpoint_every=2)
    found, expected = estimator.clone().fit(x, checkpoint=tmp_path / "fit", resume=True), estimator.fit(x)
    assert_same_fit(found, expected)
    assert found.precision_ == "centred-float64"


@pytest.mark.parametrize("random_state", [0, None])
@pytest.mark.parametrize("init_params", ["kmeans", "random"])
def test_several_starts(tmp_path, init_params, random_state):
    """Interrupted in any of them: the starts after it are those of the same random numbers."""
    params = dict(n_init=3, init_params=init_params, random_state=random_state, k=4)
    estimator = mixture(SklearnMixture, **params)
    for at in (1, 5, 9, 10, 14, 19, 27):
        path = tmp_path / str(at)
        if random_state is None:
            # Fresh numbers: two fits that go on from the same file end in the same place.
            interrupted(estimator, X, at, path, checkpoint_every=3)
            (tmp_path / "copy").write_bytes(path.read_bytes())
            expected = estimator.clone().fit(X, checkpoint=tmp_path / "copy", resume=True)
        else:
            interrupted(estimator, X, at, path, checkpoint_every=3)
            expected = estimator.clone().fit(X)
        assert metadata_of(path)["start"] == (at - 1) // ITERATIONS
        found = estimator.clone().fit(X, checkpoint=path, resume=True)
        assert_same_fit(found, expected)
        assert found.n_iter_ == expected.n_iter_


def test_a_start_that_converged_is_not_run_again(tmp_path):
    estimator = mixture(SklearnMixture, n_init=3, tol=1e-2, max_iter=200, init_params="random_from_data")
    lengths = []
    whole = estimator.clone().fit(X, callback=noting(lengths))
    firsts = [index for index, iteration in enumerate(lengths) if iteration == 1]
    assert len(firsts) == 3
    for at in (firsts[1], firsts[1] + 1, firsts[2], firsts[2] + 1, len(lengths)):
        path, seen = tmp_path / str(at), []
        interrupted(estimator, X, at, path, checkpoint_every=1)
        found = estimator.clone()
        found.fit(X, checkpoint=path, resume=True, callback=noting(seen))
        assert seen == lengths[at:]
        assert_same_fit(found, whole)


def test_warm_start(tmp_path):
    def warm():
        return mixture(SklearnMixture, max_iter=3).fit(X).set_params(warm_start=True, max_iter=ITERATIONS)

    expected, found = warm().fit(X), warm()
    with pytest.raises(InterruptionError):
        warm().fit(X, callback=interrupt_at(5), checkpoint=tmp_path / "fit", checkpoint_every=2)
    found.fit(X, checkpoint=tmp_path / "fit", resume=True)
    assert_same_fit(found, expected)
    assert found.n_iter_ == expected.n_iter_ == ITERATIONS


# What was not


@ESTIMATORS
def test_there_is_no_file_yet(tmp_path, cls):
    path = tmp_path / "a" / "folder" / "fit"
    assert_same_fit(mixture(cls).fit(X, checkpoint=path, resume=True), mixture(cls).fit(X))
    assert os.listdir(path.parent) == ["fit"]


@ESTIMATORS
@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_a_finished_fit_is_returned(tmp_path, cls, tol):
    estimator = mixture(cls, tol=tol, max_iter=ITERATIONS if tol == 0 else 100)
    expected = estimator.clone().fit(X, checkpoint=str(tmp_path / "fit"))
    before = (tmp_path / "fit").read_bytes()
    assert expected.converged_ == (tol > 0)
    seen = []
    again = dict(checkpoint=tmp_path / "fit", resume=True, callback=lambda *_: seen.append(_))
    found = estimator.clone().fit(X, **again)
    assert not seen
    assert_same_fit(found, expected, 0)
    assert (tmp_path / "fit").read_bytes() == before


@ESTIMATORS
def test_more_iterations_go_on(tmp_path, cls):
    mixture(cls, max_iter=4).fit(X, checkpoint=tmp_path / "fit")
    seen = []
    found = mixture(cls, max_iter=ITERATIONS)
    found.fit(X, checkpoint=tmp_path / "fit", resume=True, callback=noting(seen))
    assert seen == list(range(5, ITERATIONS + 1))
    assert_same_fit(found, mixture(cls).fit(X))


@ESTIMATORS
def test_no_iterations(tmp_path, cls):
    expected = mixture(cls, max_iter=0).fit(X, checkpoint=tmp_path / "fit")
    found = mixture(cls, max_iter=0).fit(X, checkpoint=tmp_path / "fit", resume=True)
    assert_same_fit(found, expected)
    assert_same_fit(mixture(cls).fit(X, checkpoint=tmp_path / "fit", resume=True), mixture(cls).fit(X))


@ESTIMATORS
def test_without_resume_a_fit_starts_anew_over_the_file(tmp_path, cls):
    mixture(cls, k=2).fit(X, checkpoint=tmp_path / "fit")
    assert_same_fit(mixture(cls).fit(X, checkpoint=tmp_path / "fit"), mixture(cls).fit(X))
    assert_same_fit(mixture(cls).fit(X, checkpoint=tmp_path / "fit", resume=True), mixture(cls).fit(X), 0)


def test_a_checkpoint_changes_nothing_of_a_fit(tmp_path, library, covariance):
    x = library.asarray(X)
    estimator = mixture(covariance_type=covariance.name, tol=1e-3, max_iter=100)
    found = estimator.clone().fit(x, checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert_same_fit(found, estimator.fit(x))


# The file


def metadata_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["gaussmix"])


def test_nothing_in_the_file_is_code(tmp_path):
    SklearnMixture(3, n_init=2, max_iter=3, random_state=0).fit(X, checkpoint=tmp_path / "fit")
    arrays = load_file(tmp_path / "fit")
    assert {name.partition(".")[0] for name in arrays} == {"reached", "best", "random_state"}
    assert metadata_of(tmp_path / "fit")["identity"]["shape"] == [211, 2]
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads((tmp_path / "fit").read_bytes())


@ESTIMATORS
def test_a_write_that_fails_leaves_the_file_before(tmp_path, monkeypatch, cls):
    path, replace, writes = tmp_path / "fit", os.replace, []

    def fail(source, target):
        writes.append(Path(source).stat().st_size)
        if len(writes) == 4:  # after the start and two iterations
            raise OSError(28, "the disk is full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        mixture(cls).fit(X, checkpoint=path, checkpoint_every=1)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["fit"]
    assert len(metadata_of(path)["reached"]) == 2
    assert_same_fit(mixture(cls).fit(X, checkpoint=path, resume=True), mixture(cls).fit(X))


KILLED = """
import sys
import numpy as np
from gaussmix import GaussianMixture
from cases import blobs

path, iterations = sys.argv[1], int(sys.argv[2])
mixture = GaussianMixture(
    3, covariance_type="full", convergence_tolerance=0, random_state=0, trainer_params={"max_epochs": iterations}
)
print("ready", flush=True)
mixture.fit(
    blobs(n=211, d=2, k=3, seed=5, spread=2),
    checkpoint=path,
    checkpoint_every=1,
    resume=True,
    callback=lambda iteration, *_: print(iteration, flush=True),
)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is Unix's")
def test_a_process_that_is_killed(tmp_path):
    """At any moment, in the middle of writing too: the file is whole, and the fit goes on from it."""
    path, iterations = tmp_path / "fit", 100_000
    identity = {"num_components": 3, "covariance_type": "full", "shape": [211, 2]}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    rng, reached = np.random.RandomState(0), 0
    for _ in range(3):
        script = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", KILLED, str(path), str(iterations)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert script.stdout.readline() == "ready\n"
            first = int(script.stdout.readline())
            time.sleep(rng.uniform(0.02, 0.3))
        finally:
            script.send_signal(signal.SIGKILL)
            printed = script.communicate(timeout=60)[0].split("\n")
        assert script.returncode == -signal.SIGKILL
        assert first == reached + 1
        # Whole: it loads, and stands at most an iteration further than what was printed.
        reached = len(Checkpoint(path, 1, identity).load().reached.lower_bounds)
        last = int(printed[-2]) if len(printed) > 1 else first
        assert last <= reached <= last + 1
    params = dict(covariance_type="full", max_iter=reached + 5)
    found = mixture(**params).fit(X, checkpoint=path, resume=True)
    assert_same_fit(found, mixture(**params).fit(X))


@pytest.fixture(params=[GaussianMixture, SklearnMixture])
def saved(request, tmp_path):
    """A checkpoint, and how to go on from it."""
    path = tmp_path / "fit.checkpoint"
    params = {"n_init": 2} if request.param is SklearnMixture else {}
    mixture(request.param, max_iter=3, **params).fit(X, checkpoint=path)

    def resume(x=X, **other):
        return mixture(request.param, **(params | other)).fit(x, checkpoint=path, resume=True)

    return path, resume


ANEW = r"fit\.checkpoint.*; pass resume=False to start anew over it, or another path"
REMOVE = r"fit\.checkpoint.*; pass another path, or remove it to start anew"


def test_a_truncated_file(saved):
    path, resume = saved
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    for length in (0, 4, 8, 100, header - 1, header, header + 1, len(content) - 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"is damaged.*{REMOVE.partition(';')[2]}") as error:
            resume()
        assert str(path) in str(error.value)
    path.write_bytes(content)
    resume()


def test_a_flipped_bit(saved):
    """Wherever it is: in the arrays, and in what is said about them."""
    path, resume = saved
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    rng = np.random.RandomState(0)
    for place in [*rng.randint(header, size=60), *rng.randint(header, len(content), size=20)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randint(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=REMOVE):
            resume()


@functools.cache
def finished():
    """The content of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        mixture(SklearnMixture, max_iter=2, n_init=2).fit(X, checkpoint=Path(folder) / "fit")
        return (Path(folder) / "fit").read_bytes()


@settings(max_examples=60)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit(at, bit):
    """Is refused, wherever it is."""
    estimator = mixture(SklearnMixture, max_iter=2, n_init=2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit"
        flipped = bytearray(finished())
        flipped[int(at * len(flipped))] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=str(path)):
            estimator.fit(X, checkpoint=path, resume=True)
        assert path.read_bytes() == flipped
        assert os.listdir(folder) == ["fit"]


# Another fit


MEANS = X[[3, 77, 150]]
WEIGHT = np.random.RandomState(0).uniform(0.5, 2, size=len(X))
# What was changed, for both classes, and what the error says of it.
OTHERS = {
    "rows": ({"x": X + 1000}, "the data or its weights;"),
    "a row": ({"x": np.where(X[17, 1] == X, 0.5, X)}, "the data or its weights;"),
    "weights": ({"sample_weight": WEIGHT}, "the data or its weights;"),
    "number of rows": ({"x": X[1:]}, r"shape is \[211, 2\] there and \[210, 2\] here; the data or its weights;"),
    "number of features": ({"x": X[:, :1]}, r"shape is \[211, 2\] there and \[211, 1\] here; the data"),
    "dtype": ({"x": X.astype(np.float32)}, "dtype is 'float64' there and 'float32' here; the data or its weights;"),
    "random_state": ({"random_state": 1}, "random_state is 0 there and 1 here;"),
    "k": ({"k": 2}, r"n\w*_components is 3 there and 2 here;"),
    "covariance_type": ({"covariance_type": "tied"}, "covariance_type is '.*' there and 'tied' here;"),
}
OTHERS_OF = {
    GaussianMixture: {
        "regularisation": (
            {"covariance_regularization": 1e-2},
            "covariance_regularization is 1e-06 there and 0.01 here;",
        ),
        "start": ({"init_strategy": "random"}, "init_strategy is 'kmeans' there and 'random' here;"),
        "means": ({"init_means": MEANS}, "init_means is None there and .*sha256.* here;"),
    },
    SklearnMixture: {
        "regularisation": ({"reg_covar": 1e-2}, "reg_covar is 1e-06 there and 0.01 here;"),
        "start": ({"init_params": "random"}, "init_params is 'kmeans' there and 'random' here;"),
        "means": ({"means_init": MEANS}, "means_init is None there and .*sha256.* here;"),
        "mixing weights": ({"weights_init": [0.2, 0.3, 0.5]}, "weights_init is None there"),
        "precisions": (
            {"precisions_init": np.ones((3, 2)), "covariance_type": "diag"},
            "precisions_init is None there",
        ),
        "starts": ({"n_init": 3}, "n_init is 1 there and 3 here;"),
    },
}


@pytest.mark.parametrize("is_in_blocks", [False, True], ids=["in memory", "in blocks"])
@ESTIMATORS
def test_a_checkpoint_of_another_fit(tmp_path, cls, is_in_blocks):
    path = tmp_path / "fit.checkpoint"

    def fit(x=X, sample_weight=None, resume=False, **params):
        params = {"covariance_type": "diag", "max_iter": 3} | params
        data = InBlocks(x) if is_in_blocks else x
        return mixture(cls, **params).fit(data, sample_weight=sample_weight, checkpoint=path, resume=resume)

    fit()
    before = path.read_bytes()
    for other, message in (OTHERS | OTHERS_OF[cls]).values():
        with pytest.raises(
            ValueError, match=f"is the checkpoint of another fit, which differs in: {message}.* pass resum"
        ):
            fit(**other, resume=True)
        assert path.read_bytes() == before
    fit(sample_weight=WEIGHT)
    for weight in (None, WEIGHT[::-1]):
        with pytest.raises(ValueError, match="differs in: the data or its weights;"):
            fit(sample_weight=weight, resume=True)
    fit(sample_weight=WEIGHT, resume=True, max_iter=5)


def test_a_warm_start_from_other_parameters(tmp_path):
    path, params = tmp_path / "fit.checkpoint", dict(max_iter=3, warm_start=True)
    one = mixture(SklearnMixture, **params).fit(X)
    two = mixture(SklearnMixture, **params).fit(X[::-1] + 1)
    one.fit(X, checkpoint=path)
    for other in (two, mixture(SklearnMixture, **params), mixture(SklearnMixture, max_iter=3)):
        with pytest.raises(
            ValueError, match=r"differs in: warm_start is .*sha256.* there and .* here; pass resume=False"
        ):
            other.fit(X, checkpoint=path, resume=True)
    # Where there is nothing to go on from, the setting says nothing.
    mixture(SklearnMixture, **params).fit(X, checkpoint=path)
    mixture(SklearnMixture, max_iter=3).fit(X, checkpoint=path, resume=True)


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
def test_the_same_rows_elsewhere(tmp_path, library, dtype, cls):
    """In another library, and as a stream: the fit goes on."""
    x, estimator = X.astype(dtype), mixture(cls)
    expected = estimator.clone().fit(x, sample_weight=WEIGHT)
    for data in (library.asarray(x), InBlocks(library.asarray(x)), InBlocks(library.asarray(x), 33)):
        interrupted(estimator, x, 4, tmp_path / "fit", sample_weight=WEIGHT)
        seen = []
        found = estimator.clone()
        resumed = dict(checkpoint=tmp_path / "fit", resume=True, callback=noting(seen))
        found.fit(data, sample_weight=library.asarray(WEIGHT), **resumed)
        assert seen[0] == 1 or library.name == "numpy"
        assert library.owns(found.means_)
        for name in ARRAYS:
            assert_close(to_numpy(getattr(found, name)), getattr(expected, name), 1e-4 if dtype == "float32" else 1e-9)


def test_the_same_rows_of_a_dask_array(tmp_path):
    da = pytest.importorskip("dask.array")
    estimator = mixture()
    interrupted(estimator, X, 4, tmp_path / "fit", checkpoint_every=2)
    found = estimator.clone().fit(da.from_array(X, chunks=(50, -1)), checkpoint=tmp_path / "fit", resume=True)
    assert_close(found.means_, estimator.clone().fit(X).means_, 1e-9)
    with pytest.raises(ValueError, match="differs in: the data or its weights;"):
        estimator.fit(da.from_array(X + 1, chunks=(50, -1)), checkpoint=tmp_path / "fit", resume=True)


# Another end


@ESTIMATORS
def test_a_tighter_tolerance_goes_on(tmp_path, cls):
    loose = mixture(cls, tol=1e-1, max_iter=200).fit(X, checkpoint=tmp_path / "fit")
    assert loose.converged_
    found, expected = mixture(cls, tol=1e-6, max_iter=200), mixture(cls, tol=1e-6, max_iter=200).fit(X)
    found.fit(X, checkpoint=tmp_path / "fit", resume=True)
    assert_same_fit(found, expected)
    assert len(found.lower_bounds_) > len(loose.lower_bounds_)
    # And a looser one is content with what is there.
    seen = []
    again = mixture(cls, tol=1e-1, max_iter=200)
    again.fit(X, checkpoint=tmp_path / "fit", resume=True, callback=noting(seen))
    assert_same_fit(again, expected, 0)
    assert not seen


@ESTIMATORS
def test_fewer_iterations_than_there_are(tmp_path, cls):
    expected = mixture(cls).fit(X, checkpoint=tmp_path / "fit")
    before = (tmp_path / "fit").read_bytes()
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        found = mixture(cls, max_iter=2).fit(X, checkpoint=tmp_path / "fit", resume=True)
    assert_same_fit(found, expected, 0)
    assert (tmp_path / "fit").read_bytes() == before


def test_the_best_of_starts_that_are_done_goes_on(tmp_path):
    """Also where it is interrupted again."""
    params = dict(n_init=3, init_params="random_from_data", k=4, random_state=4)
    loose = mixture(SklearnMixture, tol=1e-2, max_iter=200, **params).fit(X, checkpoint=tmp_path / "fit")
    assert metadata_of(tmp_path / "fit")["start"] == 2
    tight = mixture(SklearnMixture, tol=1e-7, max_iter=500, **params)
    content, seen = (tmp_path / "fit").read_bytes(), []
    expected = tight.clone()
    expected.fit(X, checkpoint=tmp_path / "fit", resume=True, callback=noting(seen))
    assert expected.converged_
    assert expected.lower_bounds_[: loose.n_iter_] == loose.lower_bounds_
    (tmp_path / "fit").write_bytes(content)
    last = dict(checkpoint=tmp_path / "fit", resume=True, checkpoint_every=1, callback=interrupt_at(len(seen) - 1))
    with pytest.raises(InterruptionError):
        tight.clone().fit(X, **last)
    assert metadata_of(tmp_path / "fit")["start"] == 3
    assert_same_fit(tight.clone().fit(X, checkpoint=tmp_path / "fit", resume=True), expected)


# Two fits


@ESTIMATORS
@pytest.mark.skipif(sys.platform == "win32", reason="fcntl is Unix's")
def test_two_fits_at_a_time(tmp_path, cls):
    path, refused = tmp_path / "fit", []

    def fit_again(iteration, *_):
        for resume in (False, True):
            with pytest.raises(
                ValueError, match=r"checkpoint=.*fit' belongs to a fit that is running; wait for it, or"
            ):
                mixture(cls).fit(X, checkpoint=path, resume=resume)
            refused.append(iteration)
        mixture(cls, max_iter=1).fit(X, checkpoint=tmp_path / "other")

    found = mixture(cls, max_iter=2).fit(X, checkpoint=path, callback=fit_again)
    assert refused == [1, 1, 2, 2]
    assert_same_fit(found, mixture(cls, max_iter=2).fit(X))
    assert sorted(os.listdir(tmp_path)) == ["fit", "other"]


LOCKED = """
import os, sys
from pathlib import Path
from gaussmix._files import locked

with locked(Path(sys.argv[1])) as is_own:
    print(is_own, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="fcntl is Unix's")
def test_a_process_that_was_killed_locks_nobody_out(tmp_path):
    path = tmp_path / "fit"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", LOCKED, str(path)], env=environment, stdin=-1, stdout=-1, text=True
    ) as script:
        assert script.stdout.readline() == "True\n"
        with pytest.raises(ValueError, match="belongs to a fit that is running"):
            mixture().fit(X, checkpoint=path)
        script.kill()
    assert os.listdir(tmp_path) == [".fit-lock"]
    mixture(max_iter=1).fit(X, checkpoint=path)
    assert os.listdir(tmp_path) == ["fit"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def fail(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(fcntl, "flock", fail)
    mixture(max_iter=1).fit(X, checkpoint=tmp_path / "fit")
    monkeypatch.setattr(_files, "fcntl", None)
    mixture(max_iter=1).fit(X, checkpoint=tmp_path / "fit", resume=True)
    assert os.listdir(tmp_path) == ["fit"]


@pytest.mark.skipif(sys.platform == "win32", reason="fcntl is Unix's")
def test_a_lock_that_is_removed_while_it_is_waited_for(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    flock, removed = fcntl.flock, []

    def slow(descriptor, how):
        if not removed:
            removed.append((tmp_path / ".fit-lock").unlink())
        return flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with _files.locked(tmp_path / "fit") as is_own:
        assert is_own
        with _files.locked(tmp_path / "fit") as is_own:
            assert not is_own
    assert not os.listdir(tmp_path)


class Ranks:
    """What a checkpoint asks of a group of processes, in one of them alone."""

    def __init__(self, rank):
        self.rank = rank

    def from_first(self, value):
        return value


def test_in_a_group_the_first_process_alone_touches_the_file(tmp_path):
    (tmp_path / "theirs").write_text("a letter")
    with opened(tmp_path / "theirs", 1, {}, resume=True, group=Ranks(1)) as (checkpoint, state):
        assert state is None
        checkpoint.save(None)
        assert os.listdir(tmp_path) == ["theirs"]
    with pytest.raises(ValueError, match="theirs"), opened(tmp_path / "theirs", 1, {}, resume=True, group=Ranks(0)):
        pass
    assert os.listdir(tmp_path) == ["theirs"]


# Files that somebody made


def crafted(path, change):
    """Write the checkpoint anew with other arrays and metadata, and digests that fit them."""
    metadata, arrays = metadata_of(path), load_file(path)
    del metadata["sha256"]
    change(metadata, arrays)
    path.write_bytes(_files.with_arrays(arrays, metadata))


def setting(name, value):
    return lambda metadata, arrays: metadata.update({name: value})


def array(name, change):
    return lambda metadata, arrays: arrays.update({name: change(arrays[name])})


def first_to(value):
    def change(x):
        x = x.copy()
        x.flat[0] = value
        return x

    return change


def random_numbers(*state):
    return setting("random_state", list(state))


CRAFTED = {
    "a position beyond the end": random_numbers("MT19937", 10**6, 0, 0.0),
    "a position before the beginning": random_numbers("MT19937", -1, 0, 0.0),
    "a position that is no integer": random_numbers("MT19937", 1.5, 0, 0.0),
    "a huge position": random_numbers("MT19937", 2**63, 0, 0.0),
    "another generator": random_numbers("PCG64", 0, 0, 0.0),
    "a number that may be there": random_numbers("MT19937", 0, 7, 0.0),
    "a number that is none": random_numbers("MT19937", 0, 1, float("nan")),
    "too few random numbers": random_numbers("MT19937"),
    "short keys": array("random_state", lambda keys: keys[:10]),
    "long keys": array("random_state", lambda keys: keys.astype(np.uint64)),
    "no keys": lambda metadata, arrays: arrays.pop("random_state"),
    "a start before the first": setting("start", -1),
    "a start after the last": setting("start", 2**63),
    "a start that is no integer": setting("start", 1.0),
    "a start that is true": setting("start", True),
    "no start": lambda metadata, arrays: metadata.pop("start"),
    "a form": setting("form", "imagined"),
    "a form that is no word": setting("form", ["centred-float64"]),
    "bounds that are infinite": setting("reached", [-3.0, float("inf")]),
    "bounds that are words": setting("reached", ["-3.0"]),
    "bounds that are huge": setting("reached", [-3.0, 2**63]),
    "bounds that are no list": setting("best", {"lower_bounds": []}),
    "no bounds": lambda metadata, arrays: metadata.pop("reached"),
    "weights": array("reached.weights", first_to(-0.1)),
    "weights that are NaN": array("best.weights", first_to(np.nan)),
    "weights without a sum of 1": array("reached.weights", lambda weights: 2 * weights),
    "weights of another number": array("reached.weights", lambda weights: np.full(4, 0.25)),
    "means": array("reached.means", lambda means: means[:, :1]),
    "means of another dtype": array("best.means", lambda means: means.astype(np.float32)),
    "means that are infinite": array("reached.means", first_to(np.inf)),
    "means that are missing": lambda metadata, arrays: arrays.pop("reached.means"),
    "covariances": array("reached.covariances", lambda covariances: covariances[..., 0]),
    "covariances below 0": array("reached.covariances", first_to(-1.0)),
    "factors": array("best.precision_cholesky", lambda factors: factors[:1]),
    "factors of 0": array("reached.precision_cholesky", first_to(0.0)),
}


@pytest.mark.parametrize("how", CRAFTED)
def test_what_a_checkpoint_can_not_say(tmp_path, covariance, how):
    path = tmp_path / "fit.checkpoint"
    estimator = mixture(SklearnMixture, n_init=2, max_iter=2, covariance_type=covariance.name)
    estimator.clone().fit(X, checkpoint=path)
    crafted(path, CRAFTED[how])
    with pytest.raises(ValueError, match=f"is damaged: .*{REMOVE.partition('.*')[2]}"):
        estimator.fit(X, checkpoint=path, resume=True)
    assert not hasattr(estimator, "means_")
    assert os.listdir(tmp_path) == ["fit.checkpoint"]


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "1" * 10_000, '{"format": 1, "identity": []}', "1e999"]
)
def test_metadata_that_is_none(saved, text):
    path, resume = saved
    save_file({"x": np.zeros(1)}, path, {"gaussmix": text})
    with pytest.raises(ValueError, match=REMOVE):
        resume()


# What is written over


@ESTIMATORS
@pytest.mark.parametrize("resume", [False, True])
def test_a_fit_writes_over_nothing_but_a_checkpoint(tmp_path, cls, resume):
    GaussianMixture(2, random_state=0).fit(X).save(tmp_path)
    (tmp_path / "letter").write_text("dear")
    save_file({"means": X}, tmp_path / "theirs")
    (tmp_path / "link").symlink_to(tmp_path / "letter")
    (tmp_path / "new").symlink_to(tmp_path / "nothing")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    cases = {
        "model.safetensors": "model.safetensors is no checkpoint; pass another path, or remove it",
        "theirs": "theirs is no checkpoint; pass another path, or remove it",
        "letter": "letter is damaged: .*; pass another path, or remove it",
        "link": "checkpoint=.*link' is a link, which would be replaced; pass the path that it leads to",
        "new": "checkpoint=.*new' is a link",
    }
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        cases["pipe"] = "checkpoint=.*pipe' is a pipe or a device; pass the path of a file"
        cases["/dev/null"] = "checkpoint='/dev/null' is a pipe or a device"
    there = sorted(os.listdir(tmp_path))
    for name, message in cases.items():
        seen = []
        with pytest.raises(ValueError, match=message):
            mixture(cls).fit(X, checkpoint=tmp_path / name, resume=resume, callback=noting(seen))
        assert not seen
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(os.listdir(tmp_path)) == there


def test_an_empty_file_is_written_over(tmp_path):
    (tmp_path / "fit").touch()
    mixture(max_iter=2).fit(X, checkpoint=tmp_path / "fit")
    mixture(max_iter=2).fit(X, checkpoint=tmp_path / "fit", resume=True)


@ESTIMATORS
def test_paths(tmp_path, cls, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (b"bytes", "text", Path("path")):
        mixture(cls, max_iter=2).fit(X, checkpoint=path)
        mixture(cls, max_iter=2).fit(X, checkpoint=path, resume=True)
    assert sorted(os.listdir(tmp_path)) == ["bytes", "path", "text"]
    for path in (7, True, ["fit"]):
        with pytest.raises(TypeError, match="checkpoint must be the path of a file, got"):
            mixture(cls).fit(X, checkpoint=path)
    with pytest.raises(ValueError, match="has a null character in it"):
        mixture(cls).fit(X, checkpoint="a\0b")


def test_what_killed_writes_left_is_removed_once_it_is_old(tmp_path):
    old, new, theirs = (tmp_path / name for name in (".fit.abcdefgh.aside", ".fit.12345678.aside", ".fit.settings"))
    for path in (old, new, theirs):
        path.write_text("x")
    for path in (old, theirs):
        os.utime(path, (0, time.time() - 2 * _files.ABANDONED))
    mixture(max_iter=1).fit(X, checkpoint=tmp_path / "fit")
    assert sorted(os.listdir(tmp_path)) == [new.name, theirs.name, "fit"]


def test_a_checkpoint_of_the_other_class(tmp_path):
    params = dict(covariance_type="diag", max_iter=2)
    mixture(**params).fit(X, checkpoint=tmp_path / "fit")
    with pytest.raises(ValueError, match="is the checkpoint of another fit"):
        mixture(SklearnMixture, **params).fit(X, checkpoint=tmp_path / "fit", resume=True)


def test_files_of_others(saved, tmp_path):
    path, resume = saved
    resume().save(tmp_path / "model")
    save_file({"means": X}, tmp_path / "theirs")
    for other in ("model/model.safetensors", "theirs"):
        path.write_bytes((tmp_path / other).read_bytes())
        with pytest.raises(ValueError, match=f"is no checkpoint.*{REMOVE.partition('.*')[2]}"):
            resume()
    path.write_text("weights: 1, 2, 3")
    with pytest.raises(ValueError, match=REMOVE):
        resume()


@ESTIMATORS
def test_what_is_refused(tmp_path, cls):
    estimator = mixture(cls)
    with pytest.raises(IsADirectoryError, match=r"checkpoint=.* is a directory; pass the path of a file"):
        estimator.fit(X, checkpoint=tmp_path)
    for every, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="checkpoint_every must be"):
            estimator.fit(X, checkpoint=tmp_path / "fit", checkpoint_every=every)
    with pytest.raises(ValueError, match="resume=True goes on from a checkpoint; pass checkpoint, the path of its"):
        estimator.fit(X, resume=True)
    assert not os.listdir(tmp_path)
    assert not hasattr(estimator, "means_")


@ESTIMATORS
def test_a_folder_that_can_not_be_written_to(tmp_path, monkeypatch, cls):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"checkpoint=.*file.fit.* can not be written.*; pass a path"):
        mixture(cls).fit(X, checkpoint=tmp_path / "file" / "fit")

    # Permissions do not stop root, as whom the suite may run.
    def fail(path, *_):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", fail)
    seen = []
    with pytest.raises(PermissionError, match=r"checkpoint=.*fit.* can not be written.*; pass a path") as error:
        mixture(cls).fit(X, checkpoint=tmp_path / "fit", callback=lambda *_: seen.append(_))
    assert error.value.errno == 13
    assert not seen


# Callbacks


@pytest.mark.parametrize("is_in_blocks", [False, True], ids=["in memory", "in blocks"])
def test_what_a_callback_sees(library, covariance, is_in_blocks):
    x = library.asarray(X)
    seen = []
    estimator = mixture(covariance_type=covariance.name, covariance_regularization=1e-3)
    estimator.fit(InBlocks(x) if is_in_blocks else x, callback=lambda *state: seen.append(state))
    assert [iteration for iteration, _, _ in seen] == list(range(1, ITERATIONS + 1))
    assert [bound for _, bound, _ in seen] == estimator.lower_bounds_
    steps = [parameters.mapped(to_numpy) for _, _, parameters in seen]
    for (_, bound, _), before, after in zip(seen[1:], steps, steps[1:], strict=False):
        now = (before.weights, before.means, before.covariances)
        sigmas = oracle.matrices(before.covariances, covariance.name, 3, 2)
        assert bound == pytest.approx(oracle.evidence(X, before.weights, before.means, sigmas)[1].mean(), rel=1e-9)
        expected = oracle.em_step(X, *now, covariance.name, 1e-3)
        for found, value in zip((after.weights, after.means, after.covariances), expected, strict=True):
            assert_close(found, value, 1e-9)
        assert_close(covariance.square(after.precision_cholesky), inverse(after.covariances, covariance), 1e-8)
    assert_close(to_numpy(estimator.means_), steps[-1].means, 0)


def inverse(covariances, covariance):
    return np.linalg.inv(covariances) if covariance.has_matrices else 1 / covariances


def test_float32_is_fitted_in_float64():
    seen = []
    estimator = mixture().fit(X.astype(np.float32), callback=lambda *state: seen.append(state[2].means.dtype))
    assert set(seen) == {np.dtype(np.float64)}
    assert estimator.means_.dtype == np.float32


@ESTIMATORS
@pytest.mark.parametrize("answer", [True, 1, np.True_, "enough"])
def test_a_true_answer_ends_the_fit_with_what_it_has(cls, answer):
    estimator = mixture(cls).fit(X, callback=lambda iteration, *_: answer if iteration == 4 else 0)
    assert not estimator.converged_
    assert_same_fit(estimator, mixture(cls, max_iter=4).fit(X))
    assert len(estimator.lower_bounds_) == 4


@ESTIMATORS
def test_a_fit_that_a_callback_ended_goes_on(tmp_path, cls):
    mixture(cls).fit(X, checkpoint=tmp_path / "fit", callback=lambda iteration, *_: iteration == 4)
    assert_same_fit(mixture(cls).fit(X, checkpoint=tmp_path / "fit", resume=True), mixture(cls).fit(X))


@ESTIMATORS
def test_what_a_callback_raises_passes_through(cls):
    estimator, error = mixture(cls), KeyError("mine")

    def callback(*_):
        raise error

    with pytest.raises(KeyError) as caught:
        estimator.fit(X, callback=callback)
    assert caught.value is error
    assert not hasattr(estimator, "means_")


@ESTIMATORS
def test_a_callback_changes_nothing_of_a_fit(cls, covariance):
    params = dict(covariance_type=covariance.name, tol=1e-3, max_iter=100)
    found = mixture(cls, **params).fit(X, callback=lambda *_: None)
    assert_same_fit(found, mixture(cls, **params).fit(X))


def test_a_callback_for_each_start():
    seen = []
    params = dict(n_init=3, max_iter=2)
    mixture(SklearnMixture, **params).fit(X, callback=noting(seen))
    assert seen == [1, 2] * 3


def test_a_callback_beside_a_progress_bar(capfd, tmp_path):
    pytest.importorskip("tqdm")
    params = {"max_epochs": 5, "enable_progress_bar": True}
    seen = []
    estimator = GaussianMixture(3, convergence_tolerance=0, random_state=0, trainer_params=params)
    estimator.fit(X, callback=noting(seen), checkpoint=tmp_path / "fit")
    assert seen == [1, 2, 3, 4, 5]
    assert "iteration 5" in capfd.readouterr().err
    # The bar of a resumed fit begins where the fit goes on.
    estimator.set_params(trainer_params=params | {"max_epochs": 7})
    estimator.fit(X, callback=noting(seen), checkpoint=tmp_path / "fit", resume=True)
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    printed = capfd.readouterr().err
    assert "iteration 7" in printed
    assert "100%" in printed


def test_a_callback_beside_verbose(capsys, tmp_path):
    seen = []
    estimator = mixture(SklearnMixture, verbose=2, verbose_interval=2, max_iter=5)
    estimator.fit(X, callback=noting(seen), checkpoint=tmp_path / "fit")
    printed = capsys.readouterr().out
    assert seen == [1, 2, 3, 4, 5]
    assert printed.count("  Iteration ") == 2
    estimator.set_params(max_iter=8).fit(X, checkpoint=tmp_path / "fit", resume=True)
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("  Iteration")] == ["6", "8"]
    # The first change is that from the iteration before the interruption.
    changes = [float(line.rpartition(" ")[2]) for line in printed.splitlines() if line.startswith("  Iteration")]
    assert_close(changes, np.diff(estimator.lower_bounds_)[[4, 6]], 1e-5)


def test_interrupted_where_the_reason_is_the_user(tmp_path):
    def callback(iteration, *_):
        if iteration == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mixture().fit(X, checkpoint=tmp_path / "fit", checkpoint_every=2, callback=callback)
    assert_same_fit(mixture().fit(X, checkpoint=tmp_path / "fit", resume=True), mixture().fit(X))
