"""Scripts written for other libraries, run on gaussmix."""

import json
import subprocess
import sys

import numpy as np
import pytest
import sklearn.mixture

import gaussmix
import gaussmix.sklearn
from cases import blobs
from gaussmix import accel

TYPES = ("full", "tied", "diag", "spherical")


@pytest.fixture
def installed(capsys):
    accel.install()
    yield
    accel.uninstall()


def run(tmp_path, text, *arguments, accelerated=True):
    """What a script prints on stdout and stderr."""
    script = tmp_path / "script.py"
    script.write_text(text)
    path = "import sys; sys.path[:0] = " + repr(sys.path)
    (tmp_path / "sitecustomize.py").write_text(path)
    command = [sys.executable, *(["-m", "gaussmix.accel"] if accelerated else []), str(script), *arguments]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# PyCave's documented usage, from its README and API pages, in one script.
PYCAVE = """
import sys
import numpy as np
import torch
import pycave
from pycave.bayes import GaussianMixture
from pycave.bayes.core import cholesky_precision, covariance, covariance_shape, log_normal, sample_normal
from pycave.bayes.gmm import GaussianMixtureModel, GaussianMixtureModelConfig
from pycave.clustering import KMeans
from pycave.clustering.kmeans import KMeansModel

pycave.set_logging_level(30)
torch.manual_seed(0)
X = torch.cat([torch.randn(10000, 8) - 5, torch.randn(10000, 8), torch.randn(10000, 8) + 5])
gmm = GaussianMixture(3, covariance_type="full", init_strategy="kmeans++", batch_size=7000,
                      trainer_params=dict(max_epochs=50, enable_progress_bar=False, accelerator="cpu", devices=1))
gmm.fit(X)
assert gmm.converged_ and gmm.num_iter_ > 0 and gmm.nll_ > 0
assert gmm.model_.means.shape == (3, 8) and isinstance(gmm.model_, GaussianMixtureModel)
assert gmm.model_.covariances.shape == covariance_shape(3, 8, "full")
labels = gmm.predict(X)
assert labels.dtype == torch.int64 and len(labels.unique()) == 3
assert torch.equal(labels, gmm.predict_proba(X).argmax(-1))
assert isinstance(gmm.predict(X.numpy()), torch.Tensor)
assert abs(gmm.score(X) - gmm.score_samples(X).mean().item()) < 1e-4
assert gmm.sample(100).shape == (100, 8)
log_responsibilities, log_prob = gmm.model_(X[:5])
assert torch.allclose(-log_prob, gmm.score_samples(X[:5]), atol=1e-3)
gmm.save(sys.argv[1])
loaded = GaussianMixture.load(sys.argv[1])
assert torch.equal(loaded.predict(X), labels)
copy = loaded.clone()
assert copy.get_params() == gmm.get_params()
copy.set_params({"num_components": 2})
assert copy.num_components == 2
kmeans = KMeans(3, trainer_params=dict(max_epochs=100)).fit(X)
assert isinstance(kmeans.model_, KMeansModel) and kmeans.model_.centroids.shape == (3, 8)
assert kmeans.transform(X).shape == (30000, 3) and kmeans.inertia_ > 0
assert abs(kmeans.score(X) - kmeans.score_samples(X).mean().item()) < 1e-3
print(gmm.fit_predict(data=X).shape[0])
"""


@pytest.mark.parametrize("family", ["pycave", "torchgmm"])
def test_a_script_for_pycave_runs_where_pycave_is_not_installed(tmp_path, family):
    pytest.importorskip("torch")
    out, err = run(tmp_path, PYCAVE.replace("pycave", family), str(tmp_path / "model"))
    assert out.strip() == "30000"
    assert err.count("gaussmix.accel: gaussmix") == 1
    assert "pycave.bayes" in err
    assert "sklearn.mixture.GaussianMixture" in err


SKLEARN = """
import json, sys
import numpy as np
from sklearn.mixture import GaussianMixture
X = np.load(sys.argv[1])
found = {}
for name in ("full", "tied", "diag", "spherical"):
    mixture = GaussianMixture(n_components=3, covariance_type=name, means_init=X[:3], random_state=0, tol=1e-9,
                              max_iter=500).fit(X)
    found[name] = [mixture.predict(X).tolist(), mixture.score(X), GaussianMixture.__module__]
print(json.dumps(found))
"""


def test_a_script_for_scikit_learn_gives_the_same_with_and_without(tmp_path):
    x = blobs(n=301, d=3, k=3, seed=4)
    np.save(tmp_path / "x.npy", x)
    found, expected = (
        json.loads(run(tmp_path, SKLEARN, str(tmp_path / "x.npy"), accelerated=on)[0]) for on in (True, False)
    )
    for name in TYPES:
        assert found[name][0] == expected[name][0]
        assert found[name][1] == pytest.approx(expected[name][1], abs=1e-7)
        assert found[name][2] == "gaussmix.sklearn"
        assert expected[name][2] == "sklearn.mixture._gaussian_mixture"


def test_arguments_modules_and_a_missing_script(tmp_path, capsys):
    (tmp_path / "tool.py").write_text("import sys; print(sys.argv[1:], __name__, sys.path[0])")
    out, _ = run(tmp_path, "import sys; print(sys.argv[1:], __name__); import tool", "-a", "b")
    assert out.splitlines()[0] == "['-a', 'b'] __main__"
    assert str(tmp_path) in out.splitlines()[1]
    with pytest.raises(SystemExit):
        accel.main(["no-such-script.py"])
    assert "there is no file 'no-such-script.py'; pass the path" in capsys.readouterr().err


def test_a_module_is_run_by_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "a_tool.py").write_text("import sys; print(sys.argv[1:], __name__)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    try:
        accel.main(["-m", "a_tool", "x"])
    finally:
        accel.uninstall()
    assert capsys.readouterr().out.strip() == "['x'] __main__"


def test_uninstall_restores_everything(capsys):
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in accel.FAMILIES}
    theirs = sklearn.mixture.GaussianMixture
    accel.install()
    accel.install()
    assert sklearn.mixture.GaussianMixture is gaussmix.sklearn.GaussianMixture
    accel.uninstall()
    accel.uninstall()
    assert sklearn.mixture.GaussianMixture is theirs
    assert before == {name: module for name, module in sys.modules.items() if name.split(".")[0] in accel.FAMILIES}
    assert capsys.readouterr().err.count("gaussmix.accel") == 1


def test_what_is_not_replaced_is_found_where_the_real_package_lies(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    (tmp_path / "torchgmm" / "base").mkdir(parents=True)
    (tmp_path / "torchgmm" / "__init__.py").write_text("raise ImportError('never imported')")
    (tmp_path / "torchgmm" / "base" / "__init__.py").write_text("NAME = 'the real one'")
    monkeypatch.syspath_prepend(tmp_path)
    accel.install()
    try:
        from torchgmm.base import NAME
        from torchgmm.bayes import GaussianMixture

        assert NAME == "the real one"
        assert GaussianMixture is accel.GaussianMixture
    finally:
        accel.uninstall()
        sys.modules.pop("torchgmm.base", None)


def test_conversions_know_scikit_learns_own_class(installed):
    x = blobs(n=60, d=2, k=2)
    converted = gaussmix.sklearn.GaussianMixture(2, random_state=0).fit(x).to_sklearn()
    assert type(converted).__module__.startswith("sklearn.")
    assert isinstance(gaussmix.sklearn.GaussianMixture.from_sklearn(converted), gaussmix.sklearn.GaussianMixture)


@pytest.mark.parametrize("covariance_type", TYPES)
def test_pycaves_array_convention(covariance_type, library, dtype):
    torch = pytest.importorskip("torch")
    x = library.asarray(blobs(n=90, d=3, k=2), dtype)
    mixture = accel.GaussianMixture(2, covariance_type=covariance_type, random_state=0).fit(x)
    kmeans = accel.KMeans(2, random_state=0).fit(x)
    outputs = [
        mixture.predict(x), mixture.fit_predict(x), mixture.predict_proba(x), mixture.score_samples(x),
        mixture.sample(3), mixture.model_.means, kmeans.predict(x), kmeans.fit_predict(x), kmeans.transform(x),
        kmeans.fit_transform(x), kmeans.score_samples(x), kmeans.model_.centroids,
    ]  # fmt: skip
    for out in outputs:
        assert isinstance(out, torch.Tensor)
        assert out.device.type == "cpu"
        assert str(out.dtype) in ("torch.int64", f"torch.{dtype}")


@pytest.mark.parametrize("name", ["GaussianMixture", "KMeans"])
def test_files_are_those_of_the_class_it_stands_for(tmp_path, name):
    pytest.importorskip("torch")
    ours, theirs = getattr(gaussmix, name), getattr(accel, name)
    fitted = theirs(2, random_state=0).fit(blobs(n=60, d=2, k=2))
    fitted.save(tmp_path)
    x = blobs(n=7, d=2, k=2, seed=1)
    for cls in (ours, theirs):
        assert np.array_equal(cls.load(tmp_path).predict(x), np.asarray(fitted.predict(x)))
    ours.load(tmp_path).save(tmp_path)
    assert isinstance(theirs.load(tmp_path), theirs)
