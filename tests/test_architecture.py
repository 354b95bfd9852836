"""Promises about the code itself: what an import loads, what is public, where covariance types are told apart."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import gaussmix
from gaussmix._covariance import COVARIANCES
from gaussmix._dispatch import BACKENDS, engine

SOURCE = Path(gaussmix.__file__).parent
HEAVY = ("torch", "triton", "cupy", "dask")


def test_importing_loads_nothing_that_the_user_may_not_need():
    code = f"import sys, gaussmix, gaussmix.sklearn; print([m for m in {HEAVY} if m in sys.modules])"
    path = f"import sys; sys.path[:0] = {sys.path!r}; "
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fitting_numpy_arrays_loads_no_other_library():
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; import numpy as np; from gaussmix import GaussianMixture; "
        "GaussianMixture(2, random_state=0).fit(np.random.RandomState(0).normal(size=(50, 2)));"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["gaussmix", "gaussmix.sklearn", "gaussmix.torch"])
def test_all_is_what_is_public(module):
    if module == "gaussmix.torch":
        pytest.importorskip("torch")
    loaded = importlib.import_module(module)
    own = {
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith("gaussmix")
        and callable(value)
        and (module == "gaussmix" or value.__module__ == module)
    }
    assert own - set(loaded.__all__) == set()
    for name in loaded.__all__:
        try:
            getattr(loaded, name)
        except ImportError:
            assert not find_spec("torch"), name


@pytest.mark.parametrize("cls", ["gaussmix.GaussianMixture", "gaussmix.KMeans", "gaussmix.sklearn.GaussianMixture"])
def test_public_methods_are_documented(cls):
    module, _, name = cls.rpartition(".")
    estimator = getattr(importlib.import_module(module), name)
    for attribute, value in inspect.getmembers(estimator, inspect.isfunction):
        if not attribute.startswith("_") and value.__module__.startswith("gaussmix"):
            assert inspect.getdoc(value), attribute


def test_covariance_types_are_told_apart_in_one_file():
    names = "|".join(COVARIANCES)
    branch = re.compile(
        rf"(covariance_type|covariance\.name|\.name)\s*(==|!=|in)\s*.?[\"'(\[]|[=!]=\s*[\"']({names})[\"']"
    )
    for path in SOURCE.rglob("*.py"):
        if path.name != "_covariance.py":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not branch.search(line), f"{path.name}:{number}: {line.strip()}"


def test_every_module_can_be_imported():
    have_torch = find_spec("torch")
    have_triton = have_torch and find_spec("triton")
    needs = dict.fromkeys(("gaussmix.torch", "gaussmix._gpu"), have_torch)
    needs |= {"gaussmix._triton": have_triton, "gaussmix._dask": find_spec("dask")}
    for name in ("gaussmix", *(["gaussmix_kernels"] if have_triton else [])):
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__, f"{name}."):
            if needs.get(module.name, True):
                importlib.import_module(module.name)


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("GAUSSMIX_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"GAUSSMIX_BACKEND='abacus'.*set one of"):
        gaussmix.GaussianMixture().fit([[0.0], [1.0]])
    assert "auto" in BACKENDS
    assert callable(engine)


def test_the_report(capsys, monkeypatch):
    monkeypatch.delenv("GAUSSMIX_BACKEND", raising=False)
    from gaussmix.__main__ import main

    assert main() == 0
    printed = capsys.readouterr().out
    assert f"gaussmix {gaussmix.__version__}" in printed
    assert "All checks passed." in printed
    for name in COVARIANCES:
        assert f"  {name}: numpy, expanded-float64" in printed
    assert "numpy on cpu: numpy because the data is in host memory" in printed


def test_set_logging_level(caplog):
    import logging

    logger = logging.getLogger("gaussmix")
    before = logger.level
    try:
        gaussmix.set_logging_level(logging.WARNING)
        assert logger.level == logging.WARNING
    finally:
        logger.setLevel(before)
