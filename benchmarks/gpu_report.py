"""All that a GPU can tell about the kernels, in one command of less than nine minutes.

    make gpu-report ARGS="--folder report"

leaves report.json and report.txt in the folder: versions, the tests, the benchmark with its split by kernels, what the
profiler says of the large kernels, and what the sanitizer finds on small data. Each step is a process of its own with a
limit: what fails, hangs or is not installed becomes a line of the report, which is written after every step, and the
rest goes on. `--wheels` names a folder of wheels for a machine without a network; which of them it needs, the first
lines say.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# What the steps import, and the packages they come from.
NEEDED = ("torch", "triton", "numpy", "array-api-compat", "scikit-learn", "safetensors", "threadpoolctl")
NEEDED += ("pytest", "pytest-xdist", "hypothesis")
ITERATIONS = (
    "import gpu; blobs = gpu.Blobs.of(({rows}, 64, 64), 'cuda'); [gpu.ours(blobs, name)({often}) for name in gpu.TYPES]"
)


@dataclass(frozen=True)
class Step:
    """A process, and the seconds that it may take."""

    name: str
    limit: float
    command: tuple[str, ...]


def steps(folder: Path, dry: bool) -> tuple[Step, ...]:
    """The steps, the most wanted first; a dry run takes the first two, on tiny data."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short")
    benchmark = (sys.executable, "benchmarks/gpu.py", "--output", str(folder / "benchmark.json"))
    if dry:
        return (
            Step("benchmark", 250, (*benchmark, "--dry-run")),
            Step("tests", 165, (*pytest, "tests/kernels/test_prepass.py")),
        )
    jobs = str(min(os.cpu_count() or 1, 12))
    tests = (*pytest, "-n", jobs, "--maxfail=99", "tests/kernels", "tests/test_gpu.py")
    profiler = ("ncu", "--clock-control", "none", "--kernel-name", "regex:accumulate|normalize|logits|scatter")
    profiler += ("--section", "SpeedOfLight", "--section", "Occupancy", "--section", "WarpStateStats")
    sanitizer = ("compute-sanitizer", "--report-api-errors", "no")
    return (
        Step("benchmark", 250, (*benchmark, "--seconds", "235")),
        Step("tests", 165, tests),
        Step("profiler", 60, (*profiler, sys.executable, "-c", ITERATIONS.format(rows=10**6, often=1))),
        Step("sanitizer", 50, (*sanitizer, sys.executable, "-c", ITERATIONS.format(rows=999, often=1))),
    )


def run(step: Step, environment: dict[str, str]) -> tuple[dict[str, Any], str]:
    """How a step ended, and what it printed."""
    began = time.perf_counter()
    if shutil.which(step.command[0]) is None:
        return {"seconds": 0.0, "ended": f"{step.command[0]} is not installed"}, ""
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(step.limit)
            ended = "well" if code == 0 else f"with code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {step.limit:.0f} s"
            os.killpg(process.pid, 9)  # its workers as well
            process.wait()
        printed.seek(0)
        return {"seconds": round(time.perf_counter() - began, 1), "ended": ended}, printed.read()


def write(folder: Path, report: dict[str, Any], texts: list[str]) -> None:
    """Write the report as far as it goes."""
    benchmark = folder / "benchmark.json"
    if benchmark.exists():
        report["benchmark"] = json.loads(benchmark.read_text())
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.txt").write_text("\n".join(texts))


def versions() -> tuple[dict[str, str], list[str]]:
    """Versions of the packages that are there, and those that are not."""
    found, missing = {}, []
    for name in (*NEEDED, "cupy-cuda12x", "cupy-cuda13x"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            missing += [name] if name in NEEDED else []
    return found, missing


def main() -> int:
    """Run all steps; the exit status is 0 where each ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("gpu-report"), help="where the report goes")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install beside the packages that are there")
    parser.add_argument("--dry-run", action="store_true", help="try this script out in Triton's interpreter")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as site:
        if arguments.wheels:
            pip = (sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site)
            subprocess.run([*pip, *map(str, sorted(arguments.wheels.glob("*.whl")))], check=False)
        sys.path.insert(0, site)
        found, missing = versions()
        path = [site, str(ROOT / "src"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
        if arguments.dry_run:
            environment["TRITON_INTERPRET"] = "1"
        report: dict[str, Any] = {"python": platform.python_version(), "versions": found, "missing": missing}
        report["steps"] = {}
        texts = [json.dumps(report)]
        if missing:
            texts.append(
                f"Not installed: {', '.join(missing)}. Fetch them with `pip download --no-deps`, for --wheels."
            )
        print("\n".join(texts), flush=True)
        for step in steps(folder, arguments.dry_run):
            outcome, text = run(step, environment)
            report["steps"][step.name] = outcome
            line = f"{step.name}: ended {outcome['ended']}, {outcome['seconds']} s"
            print(line, flush=True)
            texts += [f"==== {line}", text]
            write(folder, report, texts)
    print(f"written to {folder}/report.json and report.txt")
    return int(any(outcome["ended"] != "well" for outcome in report["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
