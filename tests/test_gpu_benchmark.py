"""The parts of benchmarks/gpu.py that need no GPU: what it refuses, its tables, and its plain EM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cases import OnRows
from gaussmix._covariance import COVARIANCES
from gaussmix._parameters import Parameters
from gaussmix.backends import _array_api
from gaussmix.rows._data import Rows

# Those that have kernels.
TYPES = ("diag", "full", "spherical", "tied")

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu

    return gpu


def run(*arguments, **environment):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=variables | {"PYTHONPATH": path},
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so_in_one_line():
    done = run()
    assert done.returncode == 2
    assert done.stderr == "gpu.py: no CUDA device is here; --dry-run tries the script out without one\n"


def test_a_dry_run_needs_the_interpreter():
    done = run("--dry-run")
    assert (done.returncode, done.stderr) == (2, "gpu.py: --dry-run needs TRITON_INTERPRET=1\n")


@pytest.mark.parametrize("covariance_type", TYPES)
def test_the_plain_em_is_em(gpu, covariance_type, monkeypatch):
    monkeypatch.setattr(gpu, "PLAIN_ELEMENTS", 4000)  # more than one block of rows
    blobs = gpu.Blobs.of((600, 5, 3), "cpu", torch.float64, spread=1.0)
    start = blobs.start(covariance_type)
    step = {"full": gpu.plain_full, "tied": gpu.plain_tied}.get(covariance_type, gpu.plain_diagonal)
    *found, bound = step(blobs.x, start.weights, start.means, start.covariances)
    on_rows = OnRows(_array_api, Rows(blobs.x), COVARIANCES[covariance_type], gpu.REGULARIZATION)
    progress = on_rows.em(Parameters(*vars(start).values()), 1)
    for name, value in zip(("weights", "means", "covariances"), found, strict=True):
        torch.testing.assert_close(value, getattr(progress.parameters, name), rtol=1e-9, atol=1e-9)
    # Constants are left out of its log-densities.
    assert float(bound) - 2.5 * torch.log(torch.tensor(2 * torch.pi)) == pytest.approx(progress.lower_bounds[0])


def test_one_path_that_fails_does_not_lose_the_others(gpu, monkeypatch, tmp_path):
    """A kernel that does not compile, a path that comes out wrong, and a part that fails as a whole."""
    monkeypatch.setattr(gpu, "why_not", lambda dry: None)
    monkeypatch.setattr(gpu, "TYPES", ("spherical", "tied", "diag"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--output", str(tmp_path / "found.json")])
    step_errors, ours = gpu.step_errors, gpu.ours

    def broken(blobs, data, covariance_type, kind):
        if covariance_type == "spherical":
            raise RuntimeError("out of resource:\n shared memory")
        errors = step_errors(blobs, data, covariance_type, kind)
        return errors | {"means": float("nan")} if covariance_type == "tied" else errors

    def failing(blobs, covariance_type):
        if blobs.shape[0] == 150:
            raise RuntimeError("no kernel image")
        return ours(blobs, covariance_type)

    monkeypatch.setattr(gpu, "step_errors", broken)
    monkeypatch.setattr(gpu, "ours", failing)
    monkeypatch.setattr(gpu, "prepass", lambda *told: 1 / 0)
    monkeypatch.setattr(gpu, "single_kernels", lambda bench, *told: bench.add("kernels", kernel=told[2]))
    monkeypatch.setattr(gpu, "tables", lambda found: "")
    assert gpu.main() == 1
    found = json.loads((tmp_path / "found.json").read_text())
    wrong = {row["path"].partition(",")[0]: row for row in found["correctness"] if not row["right"]}
    assert set(wrong) == {"spherical", "tied"}
    assert wrong["spherical"]["failed"] == "RuntimeError: out of resource: shared memory"
    assert {row["kernel"] for row in found["kernels"]} == {"diag"}
    skipped = {row["what"]: row["why"] for row in found["skipped"]}
    assert skipped["prepass [150, 5, 3]"].startswith("ZeroDivisionError")
    assert skipped["iterations [150, 5, 3] diag"] == "RuntimeError: no kernel image"
    assert skipped["peers of [150, 5, 3] diag"] == "RuntimeError: no kernel image"
    assert not (tmp_path / "found.partial").exists()


def test_the_tables(gpu):
    snapshot = {
        "machine": dict(
            device="A",
            driver="1",
            cuda="13.0",
            python="3.12",
            versions={"torch": "2"},
            date="",
            commit="",
            changed=False,
        ),
        "correctness": [dict(path="diag", right=True)],
        "iterations": [dict(shape=[9, 8, 7], type="full", ms=2.0, target_ms=6.0, predicted_ms=1.0, share=0.5)],
        "kernels": [dict(kernel="measure", shape=[9, 8], ms=0.1234, gflop=0, mb=2000.4)],
        "host": [
            dict(shape=[9, 8, 7], type="tied", ms=50, copies_ms=40, passing_ms=44, there_ms=2, share=0.8, memory_mb=600)
        ],
        "peers": [
            {"shape": [9, 8, 7], "type": "full", "gaussmix": 2.0, "torch, float32": 8.0},
            {"shape": [9, 8, 7], "type": "diag", "gaussmix": 1.0},
        ],
        "skipped": [dict(what="a peer", why="estimated at 30 s")],
    }
    printed = gpu.tables(snapshot)
    assert "| [9, 8, 7] | full | 2 | 6 | 1 |  | 50% |  |  |" in printed
    assert "| measure | [9, 8] | 0.123 | 0 | 2000 |  |  |" in printed
    assert "| [9, 8, 7] | tied | 50 | 40 | 44 | 2 | 80% | 600 |" in printed
    assert "| [9, 8, 7] | full | 2 | 8 |\n| [9, 8, 7] | diag | 1 |  |" in printed
    assert "- a peer: estimated at 30 s" in printed


def test_targets_and_the_estimate_name_the_same_types(gpu):
    assert all(set(targets) == set(TYPES) == set(gpu.TYPES) for targets in gpu.TARGETS.values())
