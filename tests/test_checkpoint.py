"""Callbacks, and checkpoints: an interrupted fit goes on to what it would have been, from a file that is whole."""

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

import oracle
from cases import assert_close, blobs, start_for
from gaussmix import GaussianMixture
from gaussmix._arrays import to_numpy
from gaussmix._checkpoint import Checkpoint
from gaussmix._covariance import COVARIANCES
from gaussmix._data import slices
from gaussmix.sklearn import GaussianMixture as SklearnMixture

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
    found = estimator.clone().set_params(random_state=99)  # the start is in the file
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
    x = blobs(n=3000, d=3, k=12, seed=1, spread=60)
    estimator = mixture(k=12, covariance_type="full")
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
    found = mixture(cls, max_iter=0, random_state=1).fit(X, checkpoint=tmp_path / "fit", resume=True)
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
            raise OSError("the disk is full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        mixture(cls).fit(X, checkpoint=path, checkpoint_every=1)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["fit"]
    assert len(metadata_of(path)["reached"]["lower_bounds"]) == 2
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


def test_a_truncated_file(saved):
    path, resume = saved
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    for length in (0, 4, 8, 100, header - 1, header, header + 1, len(content) - 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"is damaged.*{ANEW.partition(';')[2]}") as error:
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
        with pytest.raises(ValueError, match=ANEW):
            resume()


def test_a_checkpoint_of_another_fit(saved, covariance):
    path, resume = saved
    for other in ({"k": 2}, {"covariance_type": "tied"}, {"x": X[1:]}, {"x": X[:, :1]}):
        with pytest.raises(ValueError, match=f"is the checkpoint of another fit .*{ANEW.partition('.*')[2]}"):
            resume(**other)
    before = path.read_bytes()
    if "n_init" in metadata_of(path)["identity"]:
        with pytest.raises(ValueError, match=r"of another fit \({'n_init': 2}, not {'n_init': 3}\)"):
            resume(n_init=3)
    assert path.read_bytes() == before


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
        with pytest.raises(ValueError, match=f"is no checkpoint of this version.*{ANEW.partition('.*')[2]}"):
            resume()
    path.write_text("weights: 1, 2, 3")
    with pytest.raises(ValueError, match=ANEW):
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
    return np.linalg.inv(covariances) if covariance.name in ("full", "tied") else 1 / covariances


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
