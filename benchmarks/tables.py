"""A snapshot as Markdown, and compared with another one."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Cells that differ less than this from the snapshot, as a factor, are noise on a shared machine.
NOISE = 1.5
# Load average of a core before the start, beyond which others were at work.
BUSY = 0.5
PEERS = ("oneDAL", "scikit-learn", "torchgmm", "tgmm")
TASKS = ("20 iterations", "default", "score_samples", "predict")
SMALL = ("fit", "predict", "score_samples")
GROUPS = {
    "overlapping": "Overlapping data",
    "separated": "Separated blobs",
    "small work": "Small work: a fit of 60 x 2 with k=2, calls for one row",
    "large d": "Many features: two iterations of 5000 rows",
}


def ratio(cell: dict[str, Any], task: str, peer: str = "scikit-learn") -> float | None:
    """The peer's least time divided by ours."""
    times = cell["times"].get(task, {})
    return times[peer][0] / times["gaussmix"][0] if peer in times else None


def ratios(cell: dict[str, Any]) -> dict[str, float]:
    """All of them, by what is divided by what."""
    found = {f"{task}, {peer}": ratio(cell, task, peer) for task in cell["times"] for peer in PEERS}
    return {name: value for name, value in found.items() if value is not None}


def markdown(snapshot: dict[str, Any]) -> str:
    """What ran, a table for each group, what was left out, and a summary."""
    lines = [*conditions(snapshot)]
    for group, title in GROUPS.items():
        cells = {label: cell for label, cell in snapshot["cells"].items() if cell["group"] == group}
        if not cells:
            continue
        rows = {"small work": small_work, "large d": large_d}.get(group, iterations)(cells)
        header, *others = (f"| {' | '.join(row)} |" for row in rows)
        lines += ["", f"### {title}", "", header, "|" + "---|" * (header.count("|") - 1), *others]
    left_out = [
        f"- {label}: {name}: {reason}"
        for label, cell in snapshot["cells"].items()
        for name, reason in cell["left_out"].items()
    ]
    if left_out:
        lines += ["", "Left out:", "", *left_out]
    return "\n".join([*lines, "", *summary(snapshot)])


def conditions(snapshot: dict[str, Any]) -> Iterator[str]:
    """The machine, and when and how busy it was."""
    machine, rates = snapshot["machine"], snapshot["gemm_gflops"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    yield (
        f"{machine['cpu']}, {machine['threads']} threads, Python {machine['python']}, {versions}, "
        f"BLAS {machine['blas']}; GEMM {rates['float32']:.0f} GFLOP/s (float32), {rates['float64']:.0f} (float64)."
    )
    for run in snapshot["runs"]:
        part = f" of the cells with {run['only']!r}" if run["only"] else ""
        yield f"Run{part} of {run['date']}, commit {run['commit']}"
        if run["load_before"] is not None:
            after = run.get("load_after", run["load_before"])
            busy = "; **busy machine**" if run["load_before"] > BUSY else ""
            yield f"(load average of a core {run['load_before']:.2f} before, {after:.2f} after{busy})."


def iterations(cells: dict[str, Any]) -> Iterator[list[str]]:
    """Rows of the table of a group of data sets."""
    yield [
        *("case", "ms per iteration, least", "median", "oneDAL / ours", "scikit-learn / ours"),
        *("20 iterations", "default fit", "score_samples", "predict", "GEMM share", "peak MB"),
        *("torchgmm / ours", "tgmm / ours", "rounds", "form"),
    ]
    for label, cell in cells.items():
        least, median = cell["times"]["iteration"]["gaussmix"]
        fewer = cell["peer_rows"] < int(label.partition("[")[2].partition(",")[0])
        peers = [factor(ratio(cell, "iteration", peer)) for peer in PEERS]
        yield [
            label + ("*" if fewer else ""),
            f"{least:.3g}",
            f"{median:.3g}",
            *peers[:2],
            *(factor(ratio(cell, task)) for task in TASKS),
            f"{cell['gemm_share']:.0%}",
            f"{cell['peak_mb']:.0f}" if "peak_mb" in cell else "",
            *peers[2:],
            "/".join(map(str, dict.fromkeys(cell["rounds"].values()))),
            cell["form"],
        ]


def small_work(cells: dict[str, Any]) -> Iterator[list[str]]:
    """Rows of the table of small work."""
    yield ["case", *(title for task in SMALL for title in (f"{task}, ms, least", "median", "scikit-learn / ours"))]
    for label, cell in cells.items():
        row = [label]
        for task in SMALL:
            row += [*(f"{time:.3g}" for time in cell["times"][task]["gaussmix"]), factor(ratio(cell, task))]
        yield row


def large_d(cells: dict[str, Any]) -> Iterator[list[str]]:
    """Rows of the table of many features."""
    yield ["case", "s, least", "median", "scikit-learn / ours", "peak MB of the process", "of scikit-learn's"]
    for label, cell in cells.items():
        seconds = (f"{1e-3 * time:.3g}" for time in cell["times"]["fit"]["gaussmix"])
        peaks = (f"{cell['peak_mb'].get(library, float('nan')):.0f}" for library in ("gaussmix", "scikit-learn"))
        yield [label, *seconds, factor(ratio(cell, "fit")), *peaks]


def factor(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def summary(snapshot: dict[str, Any]) -> Iterator[str]:
    """Geometric means and minima of each ratio in each group."""
    yield from ("### Summary", "", "Least times of a peer divided by ours.", "")
    yield from ("| group | time, peer | cells | geometric mean | lowest | where |", "|---|---|---|---|---|---|")
    for group in GROUPS:
        cells = {label: ratios(cell) for label, cell in snapshot["cells"].items() if cell["group"] == group}
        for name in dict.fromkeys(name for found in cells.values() for name in found):
            values = {label: found[name] for label, found in cells.items() if name in found}
            lowest = min(values, key=values.__getitem__)
            mean = statistics.geometric_mean(values.values())
            row = (group, name, str(len(values)), factor(mean), f"{values[lowest]:.2f}", lowest)
            yield f"| {' | '.join(row)} |"


def compared(snapshot: dict[str, Any], path: Path) -> str:
    """The ratios to scikit-learn that moved by more than noise since the snapshot in this file."""
    if not path.exists():
        return f"No snapshot to compare with: {path} is missing."
    committed = json.loads(path.read_text())["cells"]
    lines, number = [], 0
    for label in snapshot["cells"].keys() & committed.keys():
        before, now = (ratios(cells[label]) for cells in (committed, snapshot["cells"]))
        for name in before.keys() & now.keys():
            number += 1
            if not 1 / NOISE < now[name] / before[name] < NOISE:
                word = "slower" if now[name] < before[name] else "faster"
                lines.append(f"  {label}, {name}: {before[name]:.1f} -> {now[name]:.1f} ({word})")
    moved = f"{len(lines)} of {number} ratios moved by more than a factor of {NOISE} against the committed snapshot."
    return "\n".join([*sorted(lines), moved])
