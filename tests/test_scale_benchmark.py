"""benchmarks/scale.py on a tiny file, and what its model of many GPUs says."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scale.py"


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import scale

    return scale


def dry_run(folder, *parts):
    """The snapshot of these parts, and what was printed."""
    output = folder / "snapshot.json"
    files = folder / "files"
    files.mkdir()
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry-run", "--folder", files, "--output", output, "--only", *parts],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(files.iterdir())
    return json.loads(output.read_text()), done.stdout


def test_a_dry_run(tmp_path, scale):
    snapshot, printed = dry_run(tmp_path, "sizes", "memory", "kills")
    assert set(snapshot) == {"sizes", "memory", "kills"}
    assert snapshot["memory"]["found"][0]["share_of_limit"] > 0
    fits = snapshot["kills"]["found"]  # more than one where the first ended before it was to be killed
    assert sum(fit["killed"] for fit in fits) == 1
    assert all(fit["reached"][-1] == 10 for fit in fits)
    assert scale.tables(snapshot) in printed


@pytest.mark.parametrize(("part", "package"), [("ranks", "torch"), ("dask", "distributed")])
def test_a_dry_run_in_several_processes(tmp_path, part, package):
    snapshot, printed = dry_run(tmp_path, part)
    if find_spec(package):
        assert snapshot[part]["found"][0]["rows_per_second"] > 0
    else:
        assert f"{part}: skipped, " in printed


def test_the_model(scale):
    one, eight, many = (scale.iteration(10**8, 64, 64, "full", gpus) for gpus in (1, 8, 512))
    assert one.exchange == 0
    assert eight.volume == 8 * (64 + 64 * 64 + 64 * 64 * 64 + 1)
    assert one.efficiency > eight.efficiency > many.efficiency
    assert one.fits
    assert not scale.iteration(10**9, 64, 64, "full", 1).fits
    rows = scale.rows_for(0.9, 64, 64, "full", 512)
    assert scale.iteration(512 * rows, 64, 64, "full", 512).efficiency == pytest.approx(0.9, abs=0.01)


def test_the_document_has_the_models_tables(scale):
    document = (SCRIPT.parent.parent / "docs" / "scaling.md").read_text()
    lines = [line for line in scale.model().splitlines() if line]
    assert [line for line in lines if line not in document] == []
