"""What runs, on what, and how busy it is."""

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("gaussmix", "numpy", "scipy", "scikit-learn", "scikit-learn-intelex", "torch", "torchgmm", "tgmm")


def machine() -> dict[str, Any]:
    """What ran, and on what."""
    from threadpoolctl import threadpool_info

    from gaussmix import _threads

    with _threads.one_blas_thread() as threads:
        pass
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": threads,
        "blas": " ".join(str(blas[0].get(key, "")) for key in ("internal_api", "version", "architecture"))
        if blas
        else "",
        "versions": versions,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def commit() -> str:
    """The commit of this file's repository, with a + where files differ from it; empty where there is none."""
    try:
        found, changed = (
            subprocess.run(
                ["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
            ).stdout
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.strip() + ("+" if changed.strip() else "")


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Processes that wanted to run in the last minute, for each core."""
    return os.getloadavg()[0] / cores() if hasattr(os, "getloadavg") else None


def gemm_rates(sizes: Sequence[int]) -> dict[str, float]:
    """Largest rate of a square product of these sizes, in GFLOP/s, with all threads."""
    rates = {}
    for dtype in ("float32", "float64"):
        best = 0.0
        for n in sizes:
            a = np.random.RandomState(0).normal(size=(n, n)).astype(dtype)
            out = np.empty_like(a)
            for _ in range(4):
                began = time.perf_counter()
                np.matmul(a, a, out)
                best = max(best, 2 * n**3 / (time.perf_counter() - began) / 1e9)
        rates[dtype] = best
    return rates
