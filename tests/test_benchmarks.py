"""The scripts in benchmarks/: all can be imported, and run.py goes through tiny cases."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
TASKS = ("iteration", "20 iterations", "default", "score_samples", "predict")


def python(*arguments):
    """What a Python of its own prints: the tests have another module called `cases`."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=FOLDER,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scripts_import_and_the_data_overlaps():
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert {"cases", "machine", "run", "tables", "worker"} <= names
    code = f"import {', '.join(sorted(names))}; x, means = cases.overlapping(2000, 16, 8, 'float32'); "
    code += "print(len(x), x.dtype, cases.nearest_distances(means).mean())"
    rows, dtype, distance = python("-c", code).split()
    assert (rows, dtype) == ("2000", "float32")
    assert 1.2 < float(distance) < 1.7  # these means are near those of the components, which are 1.45 apart


def test_a_dry_run(tmp_path):
    printed = python(FOLDER / "run.py", "--dry-run", "--threads", "1", "--output", tmp_path / "snapshot.json")
    snapshot = json.loads((tmp_path / "snapshot.json").read_text())
    assert [cell["group"] for cell in snapshot["cells"].values()] == ["overlapping", "small work", "large d"]
    first = snapshot["cells"]["overlapping [500, 3, 2] full float32"]
    for task in TASKS:
        assert {"gaussmix", "scikit-learn"} <= first["times"][task].keys()
    assert abs(first["default_lower_bound"]["gaussmix"] - first["default_lower_bound"]["scikit-learn"]) < 1e-3
    tables = python(FOLDER / "run.py", "--table", tmp_path / "snapshot.json")
    assert tables in printed
    assert tables.index("### Overlapping data") < tables.index("### Small work") < tables.index("### Summary")


@pytest.mark.skipif(not find_spec("daal4py"), reason="oneDAL is not installed")
def test_onedal_is_a_peer(tmp_path):
    python(FOLDER / "run.py", "--dry-run", "--only", "overlapping", "--output", tmp_path / "snapshot.json")
    (cell,) = json.loads((tmp_path / "snapshot.json").read_text())["cells"].values()
    assert "oneDAL" in cell["times"]["iteration"].keys() | cell["left_out"].keys()
