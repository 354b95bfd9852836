"""fit(distributed="torch"): each process that torchrun started has a shard; one mixture is fitted to all of them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import torchrun_fits
import torchrun_killed
from cases import assert_close
from gaussmix import GaussianMixture
from gaussmix.sklearn import GaussianMixture as SklearnMixture

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are Unix's")

EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed.py"
ESTIMATORS = pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])


def torchrun(script, *arguments, options=(), timeout=100):
    """The exit status of a job of two processes, and what it printed; none of it runs longer than it may."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [*("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)), *options]
    environment = {name: value for name, value in os.environ.items() if not re.search("RANK|WORLD|TORCHEL", name)}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        [sys.executable, *launch, str(script), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    return job.returncode, printed


def reports(folder):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def assert_same_outcome(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in ("converged_", "backend_", "n_features_in_"):
            assert found[name] == value, name
        elif name != "precision_":
            assert_close(found[name], value, tolerance, name)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    status, printed = torchrun(torchrun_fits.__file__, folder)
    assert (folder / "1.json").exists(), printed
    return status, printed, reports(folder)


def test_shards_give_the_model_of_the_whole(job):
    _, _, (first, second) = job
    for name, (estimator, x, weight, _, made) in torchrun_fits.fits().items():
        assert first[name] == second[name], name  # the same bits
        assert isinstance(first[name], dict), first[name]
        if not name.startswith("fresh seed"):
            expected = torchrun_fits.outcome(estimator, made(x), weight)
            assert_same_outcome(first[name], expected, 1e-4 if name == "float32" else 1e-9)


def test_groups(job):
    _, _, (first, second) = job
    expected = torchrun_fits.outcome(torchrun_fits.mixture(), torchrun_fits.X, None)
    assert first["group"] == second["group"]
    # Rows come in another order, and k-means' seeds with it.
    assert_close(first["group"]["lower_bounds_"][-1], expected["lower_bounds_"][-1], 0.1)
    for rank, report in enumerate((first, second)):
        expected = torchrun_fits.outcome(torchrun_fits.mixture(), torchrun_fits.X[rank::2], None)
        assert_same_outcome(report["alone"], expected, 1e-9)
        assert_same_outcome(report["not distributed"], expected, 0)


def test_what_is_wrong_in_one_process_is_raised_in_all(job):
    _, _, (first, second) = job
    for name, message in (
        ("NaN", "Input X contains NaN .first in row 17.; remove or impute such rows"),
        ("weights", "sample_weight contains a negative value, -1"),
        ("a NaN in a stream", "Input X contains NaN .first in row 17."),
        ("dimensions", "Expected 2D array, got 1D array"),
    ):
        assert first[name][0] == "RuntimeError"
        assert re.match(f"process 1 of 2 failed, and with it the fit: ValueError: {message}", first[name][1])
        assert second[name][0] == "ValueError"
        assert re.match(message, second[name][1])
    for name, message in (
        ("widths", r"the number of features is 3 in process 0 and 2 in process 1; all 2 processes need the same"),
        ("too few rows", "Expected n_samples >= num_components but got num_components = 3, n_samples = 2"),
        ("no rows", ".*n_samples = 0"),
    ):
        assert first[name] == second[name]
        assert first[name][0] == "ValueError"
        assert re.match(message, first[name][1])


def test_processes_that_are_told_different_things(job):
    _, _, (first, second) = job
    reports = [report["told otherwise"] for report in (first, second)]
    for report in reports:
        assert report.keys() == torchrun_fits.told_otherwise(0).keys()
        assert all(duration < 5 for _, duration in report.values())
    firsts, seconds = ({name: found for name, (found, _) in report.items()} for report in reports)
    for name, what in (
        ("num_components", "num_components is 3 in process 0 and 4"),
        ("covariance_type", "covariance_type is 'full' in process 0 and 'spherical'"),
        ("init_strategy", "init_strategy is 'kmeans' in process 0 and 'random'"),
        ("num_components that is bad", "num_components is 3 in process 0 and -1"),
        ("max_epochs", "max_epochs is 8 in process 0 and 9"),
        ("the dtype", "the dtype of X is 'float64' in process 0 and 'float32'"),
        ("resume", "resume is False in process 0 and True"),
        ("weights", "whether sample_weight is given is False in process 0 and True"),
        ("tol of scikit-learn", "tol is 0.001 in process 0 and 0.0001"),
    ):
        assert firsts[name] == seconds[name] == ["ValueError", f"{what} in process 1; all 2 processes need the same"]
    for name, error, message in (
        ("trainer_params", "TypeError", "trainer_params has unknown settings"),
        ("callback that fails", "KeyError", '"a callback\'s"'),
        *((name, "OSError", "the disk is gone") for name in torchrun_fits.FAILING),
    ):
        assert seconds[name][0] == error, name
        assert seconds[name][1].startswith(message)
        assert firsts[name] == [
            *("RuntimeError", f"process 1 of 2 failed, and with it the fit: {error}: {seconds[name][1]}")
        ]


def test_a_callback_of_one_process_alone(job):
    _, _, (first, second) = job
    for name, last in (("callback of the first", 3), ("callback of the second", 3), ("as before", 8)):
        found, _ = first["told otherwise"][name]
        assert found == second["told otherwise"][name][0]
        assert len(found["lower_bounds_"]) == last
    expected = torchrun_fits.outcome(torchrun_fits.mixture(), torchrun_fits.X, None)
    assert_same_outcome(first["told otherwise"]["as before"][0], expected, 1e-9)


def test_an_error_ends_the_job(job):
    status, printed, _ = job
    assert status != 0
    assert "process 1 of 2 failed, and with it the fit: ValueError: Input X contains NaN (first in row 17)" in printed
    assert "ChildFailedError" in printed


def test_a_process_that_dies_ends_the_job(tmp_path):
    status, printed = torchrun(torchrun_killed.__file__, tmp_path)
    assert status != 0
    assert re.search(r"ChildFailedError(.|\n)*rank *: 1 (.|\n)*exitcode *: -9", printed), printed
    assert not list(tmp_path.glob("*.json"))


def test_a_job_that_is_restarted_goes_on(tmp_path):
    options = ("--max-restarts", "1", "--monitor-interval", "0.1")
    status, printed = torchrun(torchrun_killed.__file__, tmp_path, tmp_path / "fit", options=options)
    assert status == 0, printed
    first, second = reports(tmp_path)
    assert first["found"] == second["found"]
    assert (first["restarts"], second["restarts"]) == (1, 1)
    # The second process died in iteration 5, after the checkpoint of iteration 4.
    assert first["first"] == second["first"] == 5
    expected = torchrun_fits.outcome(torchrun_killed.mixture(), torchrun_fits.X, None)
    assert_same_outcome(first["found"], expected, 1e-9)
    # A process alone finds the fit of the same rows finished.
    seen = []
    resumed = dict(checkpoint=tmp_path / "fit", resume=True, callback=lambda *state: seen.append(state))
    found = torchrun_fits.outcome(torchrun_killed.mixture(), torchrun_fits.X, None, **resumed)
    assert_same_outcome(found, expected, 1e-9)
    assert not seen


def test_the_example(tmp_path):
    status, printed = torchrun(EXAMPLE, tmp_path / "checkpoint")
    assert status == 0, printed
    assert "2 processes, 100,000 rows" in printed
    assert "50,000 rows of this process labelled" in printed
    assert os.listdir(tmp_path) == ["checkpoint"]


# Without torchrun


@ESTIMATORS
def test_without_torchrun(cls, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="finds no processes to work with; start the script with torchrun, or init"):
        cls(2).fit(torchrun_fits.X, distributed="torch")


@ESTIMATORS
@pytest.mark.parametrize(("distributed", "error"), [("spark", ValueError), (True, TypeError), (2, TypeError)])
def test_other_values(cls, distributed, error):
    with pytest.raises(error, match=f"must be 'torch' or a torch.distributed process group, got {distributed!r}"):
        cls(2).fit(torchrun_fits.X, distributed=distributed)


@ESTIMATORS
def test_without_torch(cls, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    with pytest.raises(ImportError, match=r"distributed='torch' needs torch; install gaussmix\[torch\]"):
        cls(2).fit(torchrun_fits.X, distributed="torch")
