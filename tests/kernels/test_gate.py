"""The compile gate: a sample of it, and that it finds what it is there for."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import triton

from gaussmix_kernels import gate
from gaussmix_kernels._instructions import Code

SAMPLE = """
import json, sys
from gaussmix_kernels import gate
exact = {"squares", "centred"}
cases = [case for case in gate.cases() if (case.d, case.k) == (8, 3) and (not case.exact or case.kind in exact)]
reports = gate.compile_cases(int(sys.argv[1]), cases)
print(json.dumps([[report.kernel, report.exact, report.settings, report.violations] for report in reports]))
"""


@pytest.mark.skipif(not hasattr(triton.backends, "nvidia"), reason="this Triton has no compiler for NVIDIA GPUs")
def test_a_sample_compiles_without_violations():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", SAMPLE, "90"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout.splitlines()[-1])
    assert [report for report in reports if report[3]] == []
    # Every kernel with a product of tiles is there in both tiers.
    assert {(name, exact) for name in gate.PRODUCTS for exact in (False, True)} <= {
        (name, exact) for name, exact, *_ in reports
    }


def test_every_case_is_there_once():
    cases = list(gate.cases())
    assert len(set(cases)) == len(cases)
    assert {case.type for case in cases} == set(gate.TYPES)
    assert {case.kind for case in cases} == {"none", "norm", "squares", "products", "centred"}
    assert {(case.d, case.k) for case in cases if case.type == "diag"} == {
        (d, k) for d in gate.FEATURES for k in gate.COMPONENTS
    }


CARRIED = "%first_moments = ttng.warp_group_dot %33, %x_hi, %arg19 {isAsync = true}"
CLEAN = "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16"


def checked(
    monkeypatch,
    *,
    ptx=CLEAN,
    ttgir="",
    stack=0,
    spilled=0,
    shared=1024,
    architecture=90,
    exact=False,
    kernel="_accumulate_kernel",
):
    monkeypatch.setattr(gate, "resources", lambda cubin: (64, stack))
    monkeypatch.setattr(gate, "count", lambda cubin: Code((100, 60), tensor=0, spilled=spilled, barriers=0))
    compiled = SimpleNamespace(asm={"ptx": ptx, "ttgir": ttgir, "cubin": b""}, metadata=SimpleNamespace(shared=shared))
    meta = dict(D=16, Q=16, BLOCK_K=16, BLOCK_D=16, BLOCK_N=32, EXACT=exact, KIND="norm", num_warps=4)
    return gate.check(kernel, architecture, meta, compiled)


def test_a_clean_kernel_has_no_violations(monkeypatch):
    report = checked(monkeypatch, stack=gate.STACK, shared=gate.SHARED[90])
    assert report.violations == ()
    assert (report.registers, report.stack, report.shared) == (64, gate.STACK, gate.SHARED[90])
    assert checked(monkeypatch, stack=gate.STACK + 8, spilled=10).violations == ()
    assert checked(monkeypatch, ptx="ld.global", kernel="_convert_kernel").violations == ()
    assert checked(monkeypatch, ptx="mma.sync .tf32", exact=True).violations == ()
    assert checked(monkeypatch, ptx=CLEAN + " atom.global.add.u32").violations == ()
    assert checked(monkeypatch, ttgir=CARRIED, exact=True, ptx="mma.sync").violations == ()
    assert checked(monkeypatch, ttgir=CARRIED.replace("%arg19", "%product_209#0")).violations == ()


@pytest.mark.parametrize(
    ("changes", "violation"),
    [
        (dict(stack=gate.STACK + 8, spilled=11), f"stack of {gate.STACK + 8} bytes, which 11 instructions"),
        (dict(shared=gate.SHARED[90] + 1), f"{gate.SHARED[90] + 1} bytes of shared memory"),
        (dict(shared=gate.SHARED[120] + 1, architecture=120, ptx="mma.sync"), "bytes of shared memory"),
        (dict(ptx="fma.rn.f32"), "none of"),
        (dict(ptx="fma.rn.f64", exact=True), "none of"),
        (dict(ptx=CLEAN, architecture=80), "none of"),
        (dict(ptx=CLEAN + " wgmma.mma_async.m64n64k8.f32.tf32.tf32"), "TF32"),
        (dict(ttgir=CARRIED), "a sum that stays in the tensor cores"),
        (dict(ttgir="%scatter = tt.dot %scatter_173, %23, %arg16, inputPrecision = tf32"), "a sum that stays"),
        (dict(ptx=CLEAN + "\n red.global.add.f32 [%rd1], %f1;"), "an atomic addition"),
        (dict(ptx=CLEAN + "\n atom.global.gpu.add.f64 %fd1, [%rd1], %fd2;"), "an atomic addition"),
    ],
)
def test_each_violation_is_found(changes, violation, monkeypatch):
    (found,) = checked(monkeypatch, **changes).violations
    assert violation in found


def test_main_returns_the_number_of_violations(monkeypatch, capsys):
    good, bad = checked(monkeypatch), checked(monkeypatch, ptx="fma.rn.f32")

    class Pool:
        def __init__(self, n):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def map(self, function, *arguments):
            return [[good, bad]]

    monkeypatch.setattr(gate, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(sys, "argv", ["gate", "90"])
    assert gate.main() == 1
    printed = capsys.readouterr().out
    assert "VIOLATION: none of" in printed
    assert "2 kernels, 1 violations" in printed
