"""benchmarks/gpu_report.py: steps that fail, hang or are not there leave a line, and the rest goes on."""

import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_report.py"


@pytest.fixture
def gpu_report(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu_report

    return gpu_report


def python(name, code, limit=30.0):
    """Arguments of a step that runs Python."""
    return name, limit, (sys.executable, "-c", code)


def test_a_step_that_does_not_end_well_does_not_stop_the_rest(gpu_report, monkeypatch, tmp_path, capsys):
    hang = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    write = f"open({str(tmp_path / 'benchmark.json')!r}, 'w').write('{{\"iterations\": []}}')"
    steps = [
        python("broken", "raise SystemExit('no kernel image')"),
        python("hanging", f"print('begun', flush=True); {hang}; time.sleep(60)", limit=2.0),
        ("absent", 1.0, ("no-such-profiler",)),
        python("benchmark", f"import sys; print(sys.path); {write}"),
    ]
    monkeypatch.setattr(gpu_report, "steps", lambda folder, dry: [gpu_report.Step(*step) for step in steps])
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--folder", str(tmp_path)])
    assert gpu_report.main() == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: step["ended"] for name, step in report["steps"].items()} == {
        "broken": "with code 1",
        "hanging": "stopped after 2 s",
        "absent": "no-such-profiler is not installed",
        "benchmark": "well",
    }
    assert report["benchmark"] == {"iterations": []}
    assert report["versions"]["numpy"]
    text = (tmp_path / "report.txt").read_text()
    assert "no kernel image" in text
    assert "begun" in text
    assert str(SCRIPT.parent) in text  # steps import the benchmarks
    assert "benchmark: ended well" in capsys.readouterr().out


def test_what_is_missing_is_said(gpu_report, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_report, "NEEDED", ("numpy", "no-such-package"))
    monkeypatch.setattr(gpu_report, "steps", lambda folder, dry: ())
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--folder", str(tmp_path)])
    assert gpu_report.main() == 0
    assert "Not installed: no-such-package." in capsys.readouterr().out


def test_all_steps_fit_in_nine_minutes(gpu_report, tmp_path):
    steps = gpu_report.steps(tmp_path, dry=False)
    assert [step.name for step in steps] == ["benchmark", "tests", "profiler", "sanitizer"]
    assert sum(step.limit for step in steps) < 540
