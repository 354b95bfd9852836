"""The instructions that the issue floor counts, and that kernels did not get longer than the document says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from gaussmix_kernels._instructions import parsed

ROOT = Path(__file__).parent.parent.parent
needs_nvidia = pytest.mark.skipif(
    not hasattr(triton.backends, "nvidia"), reason="this Triton has no compiler for NVIDIA GPUs"
)


def listing(*lines):
    """What the disassembler prints: labels as they are, instructions with an address."""
    return "\n".join(line if line.startswith(".") else f"    /*{at:04x}*/   {line} ;" for at, line in enumerate(lines))


def test_loops_are_counted_by_depth():
    code = parsed(
        listing(
            "S2R R0, SR_TID.X",
            ".L_x_0:",
            "LDL R1, [R1]",
            "HGMMA.64x64x16.F32 R24, gdesc[UR4], R24",
            ".L_x_1:",
            "FADD R2, R2, R3",
            "FADD R2, R2, R3",
            "@!UP0 BAR.SYNC.DEFER_BLOCKING 0x0",
            "@P0 BRA `(.L_x_1)",
            "STL [R1], R2",
            "@P1 BRA `(.L_x_0)",
            "EXIT",
            ".L_x_9:",
            "BRA `(.L_x_9)",
            "NOP",
        )
    )
    # One before and one after the loops; three and the branch; three and the branch.
    assert code.counts == (2, 4, 4)
    assert (code.tensor, code.spilled, code.barriers) == (1, 2, 1)


def test_a_call_of_a_label_leaves_a_loop():
    code = parsed(
        listing(
            ".L_x_3:",
            "FADD R2, R2, R3",
            "FADD R2, R2, R3",
            "@!P3 CALL.REL.NOINC `(.L_x_2)",
            "BRA `(.L_x_3)",
            ".L_x_2:",
            "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div)",
            "EXIT",
        )
    )
    assert code.counts == (2, 4)


def test_a_way_back_from_code_beyond_the_end_is_no_loop():
    code = parsed(
        listing(
            "MUFU.RCP R2, R2",
            "@P0 BRA `(.L_x_5)",
            ".L_x_4:",
            "FADD R2, R2, R3",
            "FADD R2, R2, R4",
            "FADD R2, R2, R5",
            "EXIT",
            ".L_x_5:",
            "FMUL R2, R2, R2",
            "BRA `(.L_x_4)",
        )
    )
    assert code.counts == (8,)


def test_a_wait_is_no_loop():
    code = parsed(
        listing(".L_x_2:", "SYNCS.PHASECHK.TRYWAIT P0, [UR4], R2", "@!P0 BRA `(.L_x_2)", "FADD R1, R1, R1", "EXIT")
    )
    assert code.counts == (4,)


CELL = "[1M, 64, 64]"
FLOORS = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import floor
print(json.dumps([floor.sums({CELL!r}, name, floor.CELLS[{CELL!r}], ["H200"]) for name in floor.TYPES]))
"""


@needs_nvidia
def test_the_document_has_the_floors():
    document = (ROOT / "kernels" / "README.md").read_text()
    header = next(line for line in document.splitlines() if "H200: issue, ms" in line)
    at = [column.strip() for column in header.split("|")].index("H200: issue, ms")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", FLOORS], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout.splitlines()[-1]):
        _, cell, name, issue, *_ = (column.strip() for column in row.split("|"))
        said = next(line for line in document.splitlines() if line.startswith(f"| {cell} | {name} |"))
        # Another version of the compiler may need some more or fewer.
        assert float(issue) == pytest.approx(float(said.split("|")[at]), rel=0.15), (cell, name)
