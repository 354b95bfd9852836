"""Promises about the code itself: what an import loads, what is public, where covariance types are told apart."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from sklearn.base import clone

import gaussmix
from cases import blobs
from gaussmix._covariance import COVARIANCES
from gaussmix.backends._dispatch import BACKENDS, engine
from gaussmix.sklearn import GaussianMixture as SklearnMixture

SOURCE = Path(gaussmix.__file__).parent
HEAVY = ("torch", "triton", "cupy", "dask", "jax")


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


# What has a number of dimensions by which covariance types could be told apart.
SHAPED = {
    *("covariance", "covariances", "precisions", "precision_cholesky", "precisions_cholesky", "factor", "factors"),
    *("cholesky", "covariance_cholesky", "second_moments", "moments", "matrices", "scatter", "precisions_init"),
}


def is_dimension_of_covariances(node):
    """Whether it is `covariances.ndim`, `len(covariances.shape)` or the like."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "len" and node.args:
        node = node.args[0]
        of = node.value if isinstance(node, ast.Attribute) and node.attr == "shape" else None
    else:
        of = node.value if isinstance(node, ast.Attribute) and node.attr == "ndim" else None
    name = getattr(of, "attr", getattr(of, "id", ""))
    return name.strip("_") in SHAPED


def told_apart(tree):
    """Where a tree compares with, matches or looks up names of covariance types, or counts their dimensions."""
    names = set(COVARIANCES)
    for node in ast.walk(tree):
        if is_dimension_of_covariances(node):
            yield node.lineno
        values = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            values = [each for side in sides for each in getattr(side, "elts", [side])]
        elif isinstance(node, ast.Dict):
            values = node.keys
        elif isinstance(node, ast.MatchValue):
            values = [node.value]
        if any(isinstance(value, ast.Constant) and value.value in names for value in values):
            yield node.lineno


@pytest.mark.parametrize("folder", [SOURCE, SOURCE.parents[1] / "kernels"], ids=["src", "kernels"])
def test_covariance_types_are_told_apart_in_one_file(folder):
    found = {path.name: list(told_apart(ast.parse(path.read_text()))) for path in folder.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines and name != "_covariance.py"} == {}


@pytest.mark.parametrize(
    "code",
    [
        'c == "full"',
        'c.name in ("tied", "full")',
        '{"diag": 1}',
        'match c:\n    case "full":\n        pass',
        "len(covariances.shape) == 3",
        "if self.covariances_.ndim == 2:\n    pass",
        "len(m.precision_cholesky.shape)",
    ],
)
def test_that_would_be_noticed(code):
    assert list(told_apart(ast.parse(code)))


@pytest.mark.parametrize("code", ["x.ndim == 2", "len(x.shape) != 2", "len(covariances)", 'f(c, "full")', "y = 'diag'"])
def test_what_tells_nothing_apart_is_left_alone(code):
    assert not list(told_apart(ast.parse(code)))


def test_the_way_of_a_fit_is_the_one_that_is_described(monkeypatch):
    for package in ("torch", "triton", "dask"):
        pytest.importorskip(package)
    monkeypatch.delenv("GAUSSMIX_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, here / "way.py"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    described = (here.parent / "CONTRIBUTING.md").read_text().splitlines()
    assert [line for line in lines if line not in described] == []
    lengths = {line.split(" | ")[0].strip("| "): int(line.split(" | ")[2]) for line in lines}
    longest = {"memory": 9, "blocks": 10, "Dask": 10, "processes": 11, "kernels": 16}
    assert {place for place, length in lengths.items() if not 5 < length <= longest[place]} == set()
    assert lengths.keys() == longest.keys()


def test_every_module_can_be_imported():
    have_torch = find_spec("torch")
    have_triton = have_torch and find_spec("triton")
    needs = dict.fromkeys(("gaussmix.torch", "gaussmix.rows._gpu"), have_torch)
    needs |= {"gaussmix.backends._triton": have_triton, "gaussmix.rows._dask": find_spec("dask")}
    needs["gaussmix.backends._compiled"] = find_spec("numba")
    for name in ("gaussmix", *(["gaussmix_kernels"] if have_triton else [])):
        for module in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
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


class Blocks:
    """X, a block at a time."""

    def __iter__(self):
        return iter([X[:20], X[20:40], X[40:]])


X = blobs(n=60, d=2, k=2)
BASE = dict(random_state=0, trainer_params={"enable_progress_bar": False})


@pytest.mark.parametrize("data", [X, Blocks()], ids=["array", "blocks"])
@pytest.mark.parametrize("backend", ["auto", "array_api"])
@pytest.mark.parametrize(
    ("estimator", "what"),
    [
        (gaussmix.GaussianMixture(2, **BASE), "diag covariance"),
        (SklearnMixture(2, random_state=0, n_init=3, init_params="random", tol=0.1), "full covariance"),
        (gaussmix.KMeans(2, **BASE), "k-means"),
    ],
)
def test_a_fit_says_once_which_implementation_runs_and_why(estimator, what, data, backend, caplog, monkeypatch):
    monkeypatch.setenv("GAUSSMIX_BACKEND", backend)
    reason = "numpy: the data is in host memory" if backend == "auto" else "array_api: GAUSSMIX_BACKEND asks for it"
    caplog.set_level("INFO", logger="gaussmix")
    clone(estimator).fit(data)
    assert [message for message in caplog.messages if " runs on " in message] == [f"{what} runs on {reason}"]
    fitted = clone(estimator).fit(X)
    caplog.clear()
    for method in ("predict", "score", "score_samples", "transform", "predict_proba"):
        if hasattr(fitted, method):
            getattr(fitted, method)(data)
    assert not [message for message in caplog.messages if " runs on " in message]
    if hasattr(estimator, "partial_fit"):
        clone(estimator).partial_fit(data).partial_fit(data)
        assert [message for message in caplog.messages if " runs on " in message] == [f"{what} runs on {reason}"]
