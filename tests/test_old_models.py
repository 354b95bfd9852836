"""Directories of PyCave and torchgmm: read as they are, never run."""

import builtins
import json
import os
import pickle
import shutil
import sys
import types
import warnings

import numpy as np
import pytest

import oracle
from cases import LOG_PROB_TOLERANCE, PARAMETER_TOLERANCE, assert_close
from gaussmix import GaussianMixture, KMeans
from gaussmix._covariance import COVARIANCES
from gaussmix.sklearn import GaussianMixture as SklearnMixture
from gaussmix.storage._persistence import PARAMS

torch = pytest.importorskip("torch")

K, D = 3, 5
# What both libraries made of trainer_params=SETTINGS.
SETTINGS = {"max_epochs": 50, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
TRAINER_PARAMS = {
    "logger": False,
    "log_every_n_steps": 1,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    **SETTINGS,
}
MIXTURE = {
    "num_components": K,
    "covariance_type": "diag",
    "init_strategy": "kmeans",
    "init_means": None,
    "convergence_tolerance": 0.001,
    "covariance_regularization": 1e-06,
    "batch_size": None,
    "trainer_params": TRAINER_PARAMS,
}
CLUSTERING = {
    "num_clusters": K,
    "init_strategy": "kmeans++",
    "convergence_tolerance": 0.0001,
    "batch_size": None,
    "trainer_params": TRAINER_PARAMS,
}


def mixture_state(covariance_type, dtype="float32"):
    """Covariances in float64, and the buffers of a fitted PyCave model."""
    rng = np.random.RandomState(0)
    shape = COVARIANCES[covariance_type].shape(K, D)
    if covariance_type in ("full", "tied"):
        factor = rng.normal(size=shape) + 2 * np.eye(D)
        covariances = factor @ np.swapaxes(factor, -1, -2)
        upper = np.swapaxes(np.linalg.inv(np.linalg.cholesky(covariances)), -1, -2)
    else:
        covariances = rng.uniform(0.5, 3, size=shape)
        upper = covariances**-0.5
    arrays = {
        "component_probs": rng.dirichlet(np.ones(K)),
        "means": 3 * rng.normal(size=(K, D)),
        "precisions_cholesky": upper,
    }
    return covariances, {name: torch.tensor(value, dtype=getattr(torch, dtype)) for name, value in arrays.items()}


def write(folder, params, config, state, attributes, layout):
    """A directory of PyCave ("model_", everything fitted pickled) or torchgmm ("model", JSON)."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params, indent=4))
    if layout == "torchgmm":
        (folder / "attributes.json").write_text(json.dumps(attributes, indent=4))
    else:
        (folder / "attributes.pickle").write_bytes(pickle.dumps(attributes))
    model = folder / {"torchgmm": "model", "pycave": "model_"}[layout]
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(config, indent=4))
    torch.save(state, model / "parameters.pt")
    return folder


def write_mixture(folder, covariance_type="diag", dtype="float32", layout="torchgmm", **params):
    return write(
        folder,
        MIXTURE | {"covariance_type": covariance_type} | params,
        {"num_components": K, "num_features": D, "covariance_type": covariance_type},
        mixture_state(covariance_type, dtype)[1],
        {"converged_": True, "num_iter_": 17, "nll_": 4.25},
        layout,
    )


def write_clustering(folder, layout="torchgmm", **params):
    return write(
        folder,
        CLUSTERING | params,
        {"num_clusters": K, "num_features": D},
        {"centroids": 3 * torch.from_numpy(np.random.RandomState(0).normal(size=(K, D))).float()},
        {"converged_": False, "num_iter_": 300, "inertia_": 0.5},
        layout,
    )


@pytest.mark.parametrize("layout", ["pycave", "torchgmm"])
class TestFitted:
    def test_a_mixture_predicts_what_the_textbook_says(self, tmp_path, covariance, dtype, layout):
        write_mixture(tmp_path, covariance.name, dtype, layout)
        mixture = GaussianMixture.load(str(tmp_path), allow_pickle=True)
        covariances, state = mixture_state(covariance.name, dtype)
        assert torch.equal(mixture.weights_, state["component_probs"])
        assert torch.equal(mixture.means_, state["means"])
        assert torch.equal(mixture.precisions_cholesky_, state["precisions_cholesky"])
        assert mixture.covariances_.dtype == state["means"].dtype
        assert_close(mixture.covariances_, covariances, PARAMETER_TOLERANCE[dtype], "covariances")
        assert (mixture.converged_, mixture.num_iter_, mixture.nll_) == (True, 17, 4.25)
        assert mixture.n_features_in_ == D
        assert mixture.get_params()["trainer_params"] == SETTINGS

        x = 3 * np.random.RandomState(1).normal(size=(11, D)).astype(dtype)
        sigmas = oracle.matrices(covariances, covariance.name, K, D)
        joint, evidence = oracle.evidence(x, state["component_probs"].numpy(), state["means"], sigmas)
        for data in (x, torch.from_numpy(x)):
            assert type(mixture.predict(data)) is type(data)
            assert np.array_equal(mixture.predict(data), joint.argmax(axis=1))
            assert_close(mixture.score_samples(data), -evidence, LOG_PROB_TOLERANCE[dtype], "score_samples")
        assert mixture.sample(4).shape == (4, D)

    @pytest.mark.parametrize("name", ["full", "tied"])
    def test_covariances_that_float32_has_no_room_for(self, tmp_path, layout, name):
        write_mixture(tmp_path, name, layout=layout)
        # A spread of 1e4 that all features share, and one of 1 of their own.
        lower = np.linalg.cholesky(1e8 + np.eye(D))
        factor = np.broadcast_to(np.linalg.inv(lower).T, COVARIANCES[name].shape(K, D))
        state = mixture_state(name)[1] | {
            "means": torch.zeros(K, D),
            "precisions_cholesky": torch.tensor(factor.astype(np.float32)),
        }
        for file in tmp_path.rglob("parameters.pt"):
            torch.save(state, file)
        mixture = GaussianMixture.load(tmp_path, allow_pickle=True)
        x = torch.zeros(1, D)
        again = GaussianMixture.from_parameters(
            mixture.weights_, mixture.means_, mixture.covariances_, covariance_type=name
        )
        assert abs(again.score(x) - mixture.score(x)) < 1e-2
        rows = mixture.set_params(random_state=0).sample(4000).double().numpy()
        assert abs(np.std(rows[:, 0] - rows[:, 1]) / 2**0.5 - 1) < 0.05

    def test_a_clustering(self, tmp_path, layout):
        clustering = KMeans.load(write_clustering(tmp_path, layout), allow_pickle=True)
        assert (clustering.converged_, clustering.num_iter_, clustering.inertia_) == (False, 300, 0.5)
        assert clustering.centroids_.dtype == torch.float32
        x = torch.from_numpy(3 * np.random.RandomState(1).normal(size=(11, D))).float()
        distances = np.sqrt(((x.numpy()[:, None] - clustering.centroids_.numpy()) ** 2).sum(axis=2))
        assert_close(clustering.transform(x), distances, 1e-5)
        assert clustering.predict(x).tolist() == distances.argmin(axis=1).tolist()

    def test_saved_again_it_is_one_of_ours(self, tmp_path, layout):
        mixture = GaussianMixture.load(write_mixture(tmp_path, layout=layout), allow_pickle=True)
        mixture.save(tmp_path)
        again = GaussianMixture.load(tmp_path)
        assert isinstance(again.means_, np.ndarray)
        assert np.array_equal(again.means_, mixture.means_)
        GaussianMixture(7).save(tmp_path)
        assert GaussianMixture.load(tmp_path).num_components == 7

    def test_another_class(self, tmp_path, layout):
        write_mixture(tmp_path / "mixture", layout=layout)
        write_clustering(tmp_path / "clustering", layout)
        for cls in (SklearnMixture, KMeans):
            with pytest.raises(ValueError, match=r"holds a GaussianMixture of.*load it with gaussmix\.GaussianMixture"):
                cls.load(tmp_path / "mixture")
        with pytest.raises(ValueError, match=r"holds a KMeans of.*load it with gaussmix\.KMeans"):
            GaussianMixture.load(tmp_path / "clustering")

    def test_without_torch(self, tmp_path, layout, monkeypatch):
        write_mixture(tmp_path, layout=layout)
        real = builtins.__import__

        def no_torch(name, *args):
            if name == "torch":
                raise ImportError("No module named 'torch'")
            return real(name, *args)

        monkeypatch.setattr(builtins, "__import__", no_torch)
        with pytest.raises(ImportError, match=r"holds torch tensors; run pip install gaussmix\[torch\]"):
            GaussianMixture.load(tmp_path)


def test_an_unfitted_estimator(tmp_path):
    (tmp_path / PARAMS).write_text(json.dumps(MIXTURE))
    mixture = GaussianMixture.load(tmp_path)
    assert mixture.num_components == K
    assert not hasattr(mixture, "means_")


def test_settings_that_pycave_once_had(tmp_path):
    assert KMeans.load(write_clustering(tmp_path / "clustering", num_workers=4)).num_clusters == K
    assert GaussianMixture.load(write_mixture(tmp_path / "mixture", num_workers=4)).num_workers == 4


class Payload:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestPickles:
    def test_are_not_read(self, tmp_path):
        write_mixture(tmp_path / "saved", layout="pycave")
        payload = pickle.dumps(Payload(tmp_path / "made"))
        for name in ("attributes.pickle", "params.pickle"):
            (tmp_path / "saved" / name).write_bytes(payload)
        with pytest.warns(
            UserWarning, match=r"num_iter_ .*not loaded.*attributes\.pickle.*allow_pickle=True"
        ) as caught:
            mixture = GaussianMixture.load(tmp_path / "saved")
        assert caught[0].filename == __file__
        assert torch.equal(mixture.means_, mixture_state("diag")[1]["means"])
        assert not hasattr(mixture, "converged_")

        (tmp_path / "saved" / PARAMS).unlink()
        with pytest.raises(ValueError, match=r"params\.pickle is a pickle.*pass allow_pickle=True"):
            GaussianMixture.load(tmp_path / "saved")

        # The tensors of a model are read without running anything, allowed or not.
        write_clustering(tmp_path / "clustering")
        torch.save({"centroids": Payload(tmp_path / "made")}, tmp_path / "clustering" / "model" / "parameters.pt")
        for allow_pickle in (False, True):
            with pytest.raises(ValueError, match=r"parameters\.pt is damaged"):
                KMeans.load(tmp_path / "clustering", allow_pickle=allow_pickle)
        assert not (tmp_path / "made").exists()

    def test_are_read_where_allowed(self, tmp_path):
        write_mixture(tmp_path, layout="pycave")
        (tmp_path / PARAMS).unlink()
        init_means = torch.zeros(K, D)
        (tmp_path / "params.pickle").write_bytes(pickle.dumps(MIXTURE | {"init_means": init_means}))
        mixture = GaussianMixture.load(tmp_path, allow_pickle=True)
        assert torch.equal(mixture.init_means, init_means)
        assert mixture.num_iter_ == 17

    def test_of_classes_that_are_not_installed(self, tmp_path, monkeypatch):
        """PyCave pickles its module beside the scalars, and can not be installed beside a current torch."""
        module = types.ModuleType("pycave_of_old")
        monkeypatch.setitem(sys.modules, "pycave_of_old", module)

        class Model(torch.nn.Module):
            pass

        def rebuild(*args):
            return Model()

        for value in (Model, rebuild):
            value.__module__, value.__qualname__ = module.__name__, value.__name__
            setattr(module, value.__name__, value)

        class Rebuilt:
            def __reduce__(self):
                return rebuild, (1, 2)

        model = Model()
        model.register_buffer("means", torch.zeros(K, D))
        write_mixture(tmp_path, layout="pycave")
        content = {"model_": model, "other": Rebuilt(), "num_iter_": 3, "converged_": False, "nll_": 1.5}
        (tmp_path / "attributes.pickle").write_bytes(pickle.dumps(content))
        monkeypatch.delitem(sys.modules, "pycave_of_old")
        mixture = GaussianMixture.load(tmp_path, allow_pickle=True)
        assert (mixture.num_iter_, mixture.converged_, mixture.nll_) == (3, False, 1.5)
        assert not hasattr(mixture, "other")

    @pytest.mark.parametrize("name", ["params.pickle", "attributes.pickle"])
    @pytest.mark.parametrize("content", [b"", b"\x80", b"nonsense", pickle.dumps([1]), pickle.dumps(MIXTURE)[:-9]])
    def test_damaged(self, tmp_path, name, content):
        write_mixture(tmp_path, layout="pycave")
        if name == "params.pickle":
            (tmp_path / PARAMS).unlink()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            GaussianMixture.load(tmp_path, allow_pickle=True)


class TestDamage:
    @pytest.mark.parametrize("name", ["params.json", "attributes.json", "model/config.json", "model/parameters.pt"])
    def test_truncated_files(self, tmp_path, name):
        write_mixture(tmp_path)
        whole = (tmp_path / name).read_bytes()
        for keep in (0, 1, 10, len(whole) // 2, len(whole) - 2):
            (tmp_path / name).write_bytes(whole[:keep])
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                GaussianMixture.load(tmp_path)

    @pytest.mark.parametrize("name", ["model/config.json", "model/parameters.pt"])
    def test_missing_files(self, tmp_path, name):
        (write_mixture(tmp_path) / name).unlink()
        with pytest.raises(FileNotFoundError, match=r"model holds no saved model"):
            GaussianMixture.load(tmp_path)

    def test_fitted_without_a_model(self, tmp_path):
        shutil.rmtree(write_mixture(tmp_path) / "model")
        with pytest.raises(ValueError, match=r"is damaged: attributes\.json is there, but no model"):
            GaussianMixture.load(tmp_path)

    def test_shapes_that_do_not_fit(self, tmp_path):
        write_mixture(tmp_path)
        state = mixture_state("diag")[1]
        torch.save(state | {"means": state["means"][:2]}, tmp_path / "model" / "parameters.pt")
        with pytest.raises(ValueError, match=r"model is damaged: .*'means': \(2, 5\)"):
            GaussianMixture.load(tmp_path)

    @pytest.mark.parametrize("params", [{"num_components": 2}, {"covariance_type": "full"}])
    def test_parameters_of_another_model(self, tmp_path, params):
        write_mixture(tmp_path)
        (tmp_path / PARAMS).write_text(json.dumps(MIXTURE | params))
        with pytest.raises(ValueError, match=r"model is damaged: .* are not those of the estimator's parameters"):
            GaussianMixture.load(tmp_path)

    def test_a_fit_that_had_failed(self, tmp_path):
        write_mixture(tmp_path)
        state = mixture_state("diag")[1]
        state["means"][1, 2] = torch.nan
        torch.save(state, tmp_path / "model" / "parameters.pt")
        with pytest.raises(
            ValueError, match="Input contains NaN in the parameter 'means'.*fit again where the fit had failed"
        ):
            GaussianMixture.load(tmp_path)

    def test_unknown_parameters(self, tmp_path):
        write_mixture(tmp_path, num_moons=3)
        with pytest.raises(ValueError, match=r"params\.json has parameters that .* \['num_moons'\]; remove them"):
            GaussianMixture.load(tmp_path)

    @pytest.mark.parametrize(
        "attributes",
        [
            "[1]",
            '{"num_iter_": "many"}',
            '{"num_iter_": -1}',
            '{"num_iter_": 1.5}',
            '{"num_iter_": 1%s}' % ("0" * 400),
            '{"nll_": null}',
            '{"nll_": NaN}',
            '{"converged_": "no"}',
            "[" * 100_000,
        ],
        ids=range(9),
    )
    def test_attributes_of_another_kind(self, tmp_path, attributes):
        (write_mixture(tmp_path) / "attributes.json").write_text(attributes)
        with pytest.raises(ValueError, match=r"attributes\.json is damaged"):
            GaussianMixture.load(tmp_path)

    @pytest.mark.parametrize(
        "params",
        [
            {"num_components": "3"},
            {"num_components": 10**400},
            {"init_strategy": ["kmeans"]},
            {"init_means": "many"},
            {"trainer_params": [1]},
            {"batch_size": 0.5},
            {"covariance_regularization": "small"},
        ],
    )
    def test_parameters_of_another_kind(self, tmp_path, params):
        folder = write_mixture(tmp_path)
        (folder / PARAMS).write_text(json.dumps(MIXTURE | params))
        for _ in ("fitted", "unfitted"):
            with pytest.raises(ValueError, match="is damaged"):
                GaussianMixture.load(folder)
            shutil.rmtree(folder / "model", ignore_errors=True)
            (folder / "attributes.json").unlink(missing_ok=True)

    def test_a_model_without_tensors(self, tmp_path):
        torch.save({}, write_mixture(tmp_path / "mixture") / "model" / "parameters.pt")
        torch.save({}, write_clustering(tmp_path / "clustering") / "model" / "parameters.pt")
        for cls, name in ((GaussianMixture, "mixture"), (KMeans, "clustering")):
            with pytest.raises(ValueError, match=r"model is damaged: it holds no \w+ \(.* are not there\)"):
                cls.load(tmp_path / name)

    def test_a_model_that_is_a_link_to_nothing(self, tmp_path):
        (tmp_path / PARAMS).write_text(json.dumps(MIXTURE))
        (tmp_path / "model").symlink_to("nowhere")
        with pytest.raises(FileNotFoundError, match="holds no saved model"):
            GaussianMixture.load(tmp_path)

    def test_what_no_library_wrote(self, tmp_path):
        (tmp_path / "model").mkdir()
        with pytest.raises(FileNotFoundError, match="holds no saved estimator"):
            GaussianMixture.load(tmp_path)
        (tmp_path / PARAMS).write_text('{"learning_rate": 0.1}')
        with pytest.raises(ValueError, match="was not written by gaussmix"):
            GaussianMixture.load(tmp_path)


def test_no_warning_without_pickles(tmp_path):
    write_mixture(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaussianMixture.load(tmp_path)
