"""Saving and loading: the same bits, no code, no half-written directory, clear words for damage."""

import copy
import json
import os
import pickle
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.base import clone

from cases import blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix._arrays import to_numpy
from gaussmix.sklearn import GaussianMixture as SklearnMixture
from gaussmix.storage import _persistence

X = blobs(n=200, d=3, k=2)


def fitted_state(estimator):
    return {name: value for name, value in vars(estimator).items() if name.endswith("_")}


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture])
def test_a_loaded_mixture_predicts_the_same_bits(tmp_path, library, covariance, dtype, cls):
    x = library.asarray(X, dtype)
    mixture = cls(2, covariance_type=covariance.name, random_state=0).fit(x)
    mixture.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model")
    assert loaded.get_params() == mixture.get_params()
    for method in ("predict", "predict_proba", "score_samples"):
        found, expected = getattr(loaded, method)(x), getattr(mixture, method)(x)
        assert library.owns(found)
        assert np.array_equal(to_numpy(found), to_numpy(expected))
    assert fitted_state(loaded).keys() == fitted_state(mixture).keys()
    for name, value in fitted_state(mixture).items():
        restored = getattr(loaded, name)
        assert np.array_equal(to_numpy(restored), to_numpy(value)), name
    assert sorted(os.listdir(tmp_path / "model")) == ["model.safetensors", "params.json"]


def test_kmeans_and_feature_names(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=["a", "b", "c"])
    clustering = KMeans(2, random_state=0).fit(frame)
    clustering.save(tmp_path)
    loaded = KMeans.load(tmp_path)
    assert loaded.feature_names_in_.tolist() == ["a", "b", "c"]
    assert np.array_equal(loaded.predict(frame), clustering.predict(frame))
    assert loaded.inertia_ == clustering.inertia_


def test_parameters_that_are_arrays(tmp_path, library):
    means = X[:2].astype(np.float32)
    mixture = GaussianMixture(2, init_means=library.asarray(means), trainer_params={"max_epochs": 5})
    mixture.save(tmp_path)
    assert os.listdir(tmp_path) == ["params.json"]
    loaded = GaussianMixture.load(tmp_path)
    assert loaded.init_means.dtype == np.float32
    assert np.array_equal(loaded.init_means, means)
    assert loaded.trainer_params == {"max_epochs": 5}
    assert not fitted_state(loaded)


def test_an_unfitted_estimator_replaces_a_fitted_one(tmp_path):
    GaussianMixture(2, random_state=0).fit(X).save(tmp_path)
    GaussianMixture(3).save(tmp_path)
    assert GaussianMixture.load(tmp_path).num_components == 3
    assert os.listdir(tmp_path) == ["params.json"]


def test_a_generator_is_not_saved_and_that_is_said(tmp_path):
    mixture = GaussianMixture(2, random_state=np.random.RandomState(0)).fit(X)
    with pytest.warns(UserWarning, match="random_state is a generator, which is not saved"):
        mixture.save(tmp_path)
    assert GaussianMixture.load(tmp_path).random_state is None


@pytest.mark.parametrize("step", ["model.safetensors", "params.json"])
def test_an_interrupted_save_leaves_a_whole_estimator(tmp_path, monkeypatch, step):
    old = GaussianMixture(2, random_state=0).fit(X)
    old.save(tmp_path)
    new = GaussianMixture(3, random_state=0).fit(X)
    replace = os.replace

    def fail(source, target):
        if os.path.basename(target) == step:
            raise OSError("the disk is full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        new.save(tmp_path)
    loaded = GaussianMixture.load(tmp_path)
    expected = old if step == "model.safetensors" else new
    assert loaded.num_components == expected.num_components
    assert np.array_equal(loaded.means_, expected.means_)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "params.json"]


def test_what_killed_writes_left_is_removed_once_it_is_old(tmp_path):
    (tmp_path / "settings.json").touch()
    for name in ("model.safetensors", "params.json"):
        for age in ("old", "new"):
            path = tmp_path / f".{name}.{age}45678.aside"
            path.touch()
            os.utime(path, (0, time.time() - (7200 if age == "old" else 60)))
    GaussianMixture(2, random_state=0).fit(X).save(tmp_path)
    there = [".model.safetensors.new45678.aside", ".params.json.new45678.aside"]
    assert sorted(os.listdir(tmp_path)) == [*there, "model.safetensors", "params.json", "settings.json"]


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved estimator"):
        GaussianMixture.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        GaussianMixture().save(tmp_path / "file")


@pytest.fixture
def saved(tmp_path):
    GaussianMixture(2, random_state=0).fit(X).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -300])
def test_a_truncated_file(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is damaged"):
        GaussianMixture.load(saved)


def test_a_flipped_bit(saved):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)
    with pytest.raises(ValueError, match="it is not what was saved"):
        GaussianMixture.load(saved)


def test_files_of_others(saved):
    arrays = load_file(saved / "model.safetensors")
    save_file(arrays, saved / "model.safetensors")
    with pytest.raises(ValueError, match="was not written by gaussmix"):
        GaussianMixture.load(saved)
    (saved / "model.safetensors").unlink()
    for content, message in (("{", "is damaged"), ("[1, 2]", "not written by gaussmix"), ("{}", "not written by")):
        (saved / "params.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            GaussianMixture.load(saved)


def test_another_class_or_version(saved, monkeypatch):
    with pytest.raises(ValueError, match=r"holds a gaussmix._mixture.GaussianMixture, not a gaussmix.sklearn"):
        SklearnMixture.load(saved)
    monkeypatch.setattr(_persistence, "FORMAT", 1)
    with pytest.raises(ValueError, match="has format 2, this version reads formats up to 1; update gaussmix"):
        GaussianMixture.load(saved)


def test_unknown_parameters(tmp_path):
    GaussianMixture(2).save(tmp_path)
    params = json.loads((tmp_path / "params.json").read_text())
    params["params"]["num_moons"] = 3
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match=r"is not what was saved; .* remove its sha256 if you have edited it"):
        GaussianMixture.load(tmp_path)
    del params["sha256"]
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match="num_moons"), pytest.warns(UserWarning, match="carries no digest"):
        GaussianMixture.load(tmp_path)


def test_what_json_can_not_hold(tmp_path):
    with pytest.raises(TypeError, match=r"trainer_params=.* can not be saved"):
        GaussianMixture(2, trainer_params={"logger": object()}).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_pickle_copy_and_clone(library, covariance):
    x = library.asarray(X)
    mixture = GaussianMixture(2, covariance_type=covariance.name, random_state=0).fit(x)
    for same in (pickle.loads(pickle.dumps(mixture)), copy.deepcopy(mixture), copy.copy(mixture)):
        assert np.array_equal(to_numpy(same.predict_proba(x)), to_numpy(mixture.predict_proba(x)))
    for fresh in (mixture.clone(), clone(mixture)):
        assert fresh.get_params() == mixture.get_params()
        assert not fitted_state(fresh)
