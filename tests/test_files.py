"""Files that were damaged, crafted, or written by version 0.1.0: refused in clear words, or what was saved."""

import contextlib
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cases import blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix._arrays import to_numpy
from gaussmix._files import read_arrays, with_arrays, with_digest
from gaussmix.sklearn import GaussianMixture as SklearnMixture
from gaussmix.storage._checkpoint import Checkpoint

K, D = 2, 3
X = blobs(n=60, d=D, k=K)
OLD = Path(__file__).parent / "data" / "version_0.1.0"
ESTIMATORS = {"pycave": GaussianMixture, "sklearn": SklearnMixture, "kmeans": KMeans}
IDENTITY = {"num_components": K, "covariance_type": "diag", "shape": [60, D]}


def fitted(cls, x=X, **params):
    return cls(K, random_state=0, **params).fit(x)


def plain(value):
    """Something that compares equal where the bits are equal."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if hasattr(value, "dtype"):
        value = to_numpy(value)
        return value.dtype.str, value.shape, value.tolist() if value.dtype == object else value.tobytes()
    return repr(value)


def state(estimator):
    return type(estimator), plain(estimator.get_params()), plain(dict(vars(estimator)))


def module_of(name, dtype="float32"):
    torch = pytest.importorskip("torch")
    import gaussmix.torch as gt

    if name == "module":
        model = fitted(GaussianMixture, covariance_type="full").model_
    else:
        model = gt.KMeansModel.of(fitted(KMeans).centroids_)
    return model.to(getattr(torch, dtype))


def module_state(model):
    return model.config, {name: (str(b.dtype), b.tolist()) for name, b in model.named_buffers()}


def write(kind, folder):
    """A file that is read back by the function that comes with it."""
    if kind in ESTIMATORS:
        fitted(ESTIMATORS[kind]).save(folder)
        return folder / "model.safetensors", lambda: state(ESTIMATORS[kind].load(folder))
    if kind == "unfitted":
        GaussianMixture(K, init_means=X[:K], trainer_params={"max_epochs": 3}).save(folder)
        return folder / "params.json", lambda: state(GaussianMixture.load(folder))
    if kind == "checkpoint":
        fitted_to = folder / "fit"
        GaussianMixture(K, random_state=0).fit(X, checkpoint=fitted_to)

        def load():
            found = Checkpoint(fitted_to, 1, IDENTITY).load()
            return found.reached.form, found.start, plain(vars(found.reached.parameters)), found.reached.lower_bounds

        return fitted_to, load
    model = module_of(kind)
    model.save(folder)
    return folder / "parameters.safetensors", lambda: module_state(type(model).load(folder))


@pytest.fixture(scope="module", params=[*ESTIMATORS, "unfitted", "checkpoint", "module", "clusters"])
def kept(request, tmp_path_factory):
    path, load = write(request.param, tmp_path_factory.mktemp("saved"))
    return path, path.read_bytes(), load, load()


@pytest.mark.filterwarnings("ignore:.* carries no digest")  # what is flipped may be its name
@given(data=st.data())
def test_flipped_bits_are_noticed_or_change_nothing(kept, data):
    path, content, load, expected = kept
    for bit in data.draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=5, max_size=20)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = load()
        except ValueError:
            continue
        assert found == expected


def test_the_same_estimator_gives_the_same_bytes(tmp_path):
    for name in "ab":
        fitted(GaussianMixture).save(tmp_path / name)
    for name in ("model.safetensors", "params.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# Version 0.1.0


@pytest.mark.parametrize(
    ("folder", "cls"), [("mixture", GaussianMixture), ("sklearn", SklearnMixture), ("kmeans", KMeans)]
)
def test_estimators_of_version_0_1_0(folder, cls):
    with pytest.warns(UserWarning, match=r"model\.safetensors carries no digest of its metadata") as caught:
        loaded = cls.load(OLD / folder)
    assert [warning.filename for warning in caught] == [__file__]
    centres = loaded.centroids_ if cls is KMeans else loaded.means_
    assert sorted(centres[:, 0].round().tolist()) == [-3, 3]
    assert loaded.predict(centres).tolist() == [0, 1]
    assert loaded.converged_ is True


def test_an_unfitted_estimator_of_version_0_1_0():
    with pytest.warns(UserWarning, match=r"params\.json carries no digest"):
        loaded = GaussianMixture.load(OLD / "unfitted")
    assert loaded.num_components == 3
    assert loaded.init_means.shape == (3, 2)
    assert not hasattr(loaded, "means_")


def test_modules_of_version_0_1_0():
    torch = pytest.importorskip("torch")
    import gaussmix.torch as gt

    with pytest.warns(UserWarning, match=r"parameters\.safetensors carries no digest"):
        mixture = gt.GaussianMixtureModel.load(OLD / "mixture_module")
    assert mixture.means.dtype == torch.bfloat16
    assert mixture.config == gt.GaussianMixtureModelConfig(2, 2, "full")
    with pytest.warns(UserWarning, match=r"parameters\.safetensors carries no digest"):
        assert gt.KMeansModel.load(OLD / "kmeans_module").centroids.shape == (2, 2)


def test_damaged_arrays_of_version_0_1_0(tmp_path):
    content = bytearray((OLD / "mixture" / "model.safetensors").read_bytes())
    content[-5] ^= 64
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is not what was saved"):
        GaussianMixture.load(tmp_path)


# Digests that are right, of contents that are not


def param(name, value):
    return lambda arrays, metadata: metadata["params"].__setitem__(name, value)


def attribute(name, value):
    return lambda arrays, metadata: metadata["attributes"].__setitem__(name, value)


def array(name, change):
    def craft(arrays, metadata):
        arrays[name] = np.ascontiguousarray(change(arrays[name]))

    craft.needs = name
    return craft


def without(name):
    def craft(arrays, metadata):
        del arrays[name]

    craft.needs = name
    return craft


def a_list(arrays, metadata):
    for name in ("means_", "centroids_"):
        metadata["attributes"][name] = arrays.pop(name, np.zeros((K, D))).tolist()


def put(value, at=0):
    def change(x):
        x = x.copy()
        x.flat[at] = value
        return x

    return change


ARRAYS = ("weights_", "means_", "covariances_", "precisions_cholesky_", "centroids_")
ARRAYS_OF = {GaussianMixture: ARRAYS[:4], SklearnMixture: ARRAYS[:4], KMeans: ARRAYS[4:]}
CRAFTED = {
    **{f"{name} with {value}": array(name, put(value)) for name in ARRAYS for value in (math.nan, math.inf)},
    **{f"without {name}": without(name) for name in ARRAYS},
    **{f"complex {name}": array(name, lambda x: x.astype(np.complex64)) for name in ARRAYS},
    **{f"{name} of another k": array(name, lambda x: np.concatenate([x, x])) for name in ARRAYS[:2]},
    **{f"{name} of another d": array(name, lambda x: x[..., :1]) for name in ARRAYS[1:4]},
    "negative weights": array("weights_", lambda x: x * [-1, 1] + [0, 2 * x[0]]),
    "weights that are too large": array("weights_", lambda x: 2 * x),
    "negative factors": array("precisions_cholesky_", lambda x: -x),
    "factors of zero": array("precisions_cholesky_", lambda x: 0 * x),
    "negative variances": array("covariances_", lambda x: -x),
    "lower triangular factors": array("precisions_cholesky_", lambda x: x.T if x.ndim != 3 else x + np.tri(D)),
    "flat means": array("means_", np.ravel),
    "flat centroids": array("centroids_", np.ravel),
    "no centroids": array("centroids_", lambda x: x[:0]),
    "a method": attribute("predict", 1),
    "a private name": attribute("_k", 1),
    "another name": attribute("moons_", 1),
    "an array of another name": lambda arrays, metadata: arrays.__setitem__("predict", X),
    "lists for arrays": a_list,
    "no bool": attribute("converged_", "yes"),
    "negative iterations": lambda arrays, metadata: metadata["attributes"].update(n_iter_=-1, num_iter_=-1),
    "half iterations": lambda arrays, metadata: metadata["attributes"].update(n_iter_=0.5, num_iter_=0.5),
    "more features": attribute("n_features_in_", D + 1),
    "names of fewer features": attribute("feature_names_in_", {"array": ["a"], "dtype": "object"}),
    "names that are numbers": attribute("feature_names_in_", {"array": [1, 2, 3], "dtype": "object"}),
    "a bound that is NaN": lambda arrays, metadata: metadata["attributes"].update(
        lower_bounds_=[math.nan], inertia_=math.nan
    ),
    "a bound that is text": lambda arrays, metadata: metadata["attributes"].update(lower_bounds_="1", inertia_="1"),
    "a backend that is a number": attribute("backend_", 1),
    "unknown covariance types": attribute("covariance_type_", "round"),
    "attributes that are a list": lambda arrays, metadata: metadata.update(attributes=[1]),
    "no parameters": lambda arrays, metadata: metadata.pop("params"),
    "parameters that are a list": lambda arrays, metadata: metadata.update(params=[1]),
    "unknown parameters": param("moons", 1),
    "a covariance type that is none": param("covariance_type", "round"),
    "a covariance type that is a list": param("covariance_type", ["full"]),
    "a random state that is text": param("random_state", "many"),
    "a random state that is too large": param("random_state", 2**40),
    "an array of an endless dtype": param("random_state", {"array": [0], "dtype": "f8," * 10**6}),
    "an array of an unknown dtype": param("random_state", {"array": [0], "dtype": "S1000000000"}),
    "an array that is ragged": param("random_state", {"array": [[0], 1], "dtype": "float64"}),
}
FOR_PYCAVE = {
    "init_means that are text": param("init_means", "many"),
    "init_means that are NaN": param("init_means", [[math.nan] * D] * K),
    "init_means that are names": param("init_means", {"array": ["a"], "dtype": "object"}),
    "settings that are a list": param("trainer_params", [1]),
    "a batch size of zero": param("batch_size", 0),
    "a batch size that is text": param("batch_size", "1"),
    "workers that are none": param("num_workers", None),
    "a number of components that is text": param("num_components", "2"),
    "a tolerance that is a list": param("convergence_tolerance", [1]),
    "an unknown start": param("init_strategy", "first"),
}


def craft(folder, change):
    arrays, metadata = read_arrays(folder / "model.safetensors")
    change(arrays, metadata)
    (folder / "model.safetensors").write_bytes(with_arrays(arrays, metadata))


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        pytest.param(cls, change, id=f"{kind}: {name}")
        for kind, cls in ESTIMATORS.items()
        for name, change in CRAFTED.items()
        if getattr(change, "needs", "centroids_" if cls is KMeans else "means_") in ARRAYS_OF[cls]
    ],
)
def test_a_crafted_estimator(tmp_path, cls, change):
    fitted(cls).save(tmp_path)
    craft(tmp_path, change)
    with pytest.raises(ValueError, match="is damaged: .*; save it again") as error:
        cls.load(tmp_path)
    assert len(str(error.value)) < 1000
    estimator = cls(K)
    before = state(estimator)
    with pytest.raises(ValueError, match="is damaged"):
        estimator.load_attributes(tmp_path)
    assert state(estimator) == before


@pytest.mark.parametrize("change", FOR_PYCAVE.values(), ids=FOR_PYCAVE)
def test_crafted_parameters(tmp_path, change):
    fitted(GaussianMixture).save(tmp_path)
    craft(tmp_path, change)
    with pytest.raises(ValueError, match="is damaged"):
        GaussianMixture.load(tmp_path)
    # And the same of an estimator that is not fitted.
    (tmp_path / "model.safetensors").unlink()
    statement = json.loads((tmp_path / "params.json").read_text()) | {"fitted": False}
    del statement["sha256"]
    change({}, statement)
    (tmp_path / "params.json").write_bytes(with_digest(statement))
    with pytest.raises(ValueError, match="is damaged"):
        GaussianMixture.load(tmp_path)


def test_crafted_factors(tmp_path, covariance, dtype):
    fitted(GaussianMixture, X.astype(dtype), covariance_type=covariance.name).save(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    GaussianMixture.load(tmp_path)
    changes = [np.negative, np.zeros_like]
    if covariance.has_matrices:
        changes += [lambda x: np.swapaxes(x, -1, -2)]
    for change in changes:
        (tmp_path / "model.safetensors").write_bytes(content)
        craft(tmp_path, array("precisions_cholesky_", change))
        with pytest.raises(ValueError, match="upper triangular with a positive diagonal"):
            GaussianMixture.load(tmp_path)


@pytest.mark.filterwarnings("ignore:.* carries no digest")
@pytest.mark.parametrize(
    "value",
    ["1" + 400 * "0", *("[" * depth + "]" * depth for depth in (900, 990, 100_000))],
    ids=["an integer", "nested 900 times", "nested 990 times", "nested 100,000 times"],
)
@pytest.mark.parametrize("parameter", ["num_components", "trainer_params"])
@pytest.mark.parametrize("name", ["model.safetensors", "params.json"])
def test_json_without_end(tmp_path, name, parameter, value):
    params = f'{{"{parameter}": {value}}}'
    text = f'{{"format": 2, "class": "gaussmix._mixture.GaussianMixture", "params": {params}}}'
    if name == "params.json":
        (tmp_path / name).write_text(text)
    else:
        save_file({"means_": X}, tmp_path / name, {"gaussmix": text})
    with pytest.raises(ValueError, match="is damaged"):
        GaussianMixture.load(tmp_path)


def test_float32_covariances_that_are_singular_where_their_factors_are_not(tmp_path, library):
    """What decides is the factor: it was taken before rounding."""
    x = np.random.RandomState(0).normal(size=(200, 3)) @ [[1, 1, 1], [0, 1e-4, 1e-4], [0, 0, 1e-4]]
    x = library.asarray(x, "float32")
    mixture = GaussianMixture(1, covariance_type="full", covariance_regularization=0).fit(x)
    rounded = to_numpy(mixture.covariances_).astype(np.float32)
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(rounded)
    mixture.covariances_ = library.asarray(rounded)
    mixture.save(tmp_path)
    assert np.array_equal(GaussianMixture.load(tmp_path).covariances_, rounded)


@pytest.mark.parametrize("cls", ESTIMATORS.values(), ids=ESTIMATORS)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, cls):
    bad = fitted(cls)
    bad.moons_ = 1
    with pytest.raises(TypeError, match=r"\['moons_'\] are no fitted attributes of"):
        bad.save(tmp_path / "model")
    bad = fitted(cls)
    (bad.centroids_ if cls is KMeans else bad.means_)[0, 0] = math.nan
    with pytest.raises(ValueError, match="contains NaN"):
        bad.save(tmp_path / "model")
    with pytest.raises(ValueError, match="must be|should be|has to be"):
        cls(0).save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_attributes_that_a_subclass_annotates(tmp_path):
    class Noted(GaussianMixture):
        note_: str

    noted = fitted(Noted)
    noted.note_ = "good"
    noted.save(tmp_path)
    assert Noted.load(tmp_path).note_ == "good"


def test_a_fit_that_failed_leaves_an_unfitted_estimator(tmp_path):
    mixture = GaussianMixture(2, covariance_regularization=0)
    with pytest.raises(np.linalg.LinAlgError):
        mixture.fit(np.repeat([[1.0, 2.0], [3.0, 4.0]], 5, axis=0))
    mixture.save(tmp_path)
    assert os.listdir(tmp_path) == ["params.json"]
    assert GaussianMixture.load(tmp_path).num_components == 2


def test_arrays_of_the_other_byte_order(tmp_path):
    mixture = fitted(GaussianMixture)
    mixture.means_ = mixture.means_.astype(mixture.means_.dtype.newbyteorder())
    mixture.save(tmp_path)
    assert np.array_equal(GaussianMixture.load(tmp_path).means_, mixture.means_)


def test_loaded_attributes_take_the_place_of_all(tmp_path):
    fitted(GaussianMixture).save(tmp_path)
    other = GaussianMixture(K)
    other.feature_names_in_ = np.array(["a", "b"], dtype=object)
    other.load_attributes(tmp_path)
    assert not hasattr(other, "feature_names_in_")


def test_attributes_of_another_covariance_type(tmp_path):
    other = GaussianMixture(K, covariance_type="tied")
    with (
        pytest.warns(UserWarning, match="no digest"),
        pytest.raises(ValueError, match="of covariance_type='full', and the estimator has 'tied'; set the parameter"),
    ):
        other.load_attributes(OLD / "mixture")
    assert other.persistent_attributes == []
    fitted(GaussianMixture, covariance_type="full").save(tmp_path)
    other.load_attributes(tmp_path)
    assert other.predict(X).tolist() == fitted(GaussianMixture, covariance_type="full").predict(X).tolist()


def test_settings_whose_keys_are_numbers(tmp_path):
    GaussianMixture(2, trainer_params={"logger": {10: 1, 9: 2}}).save(tmp_path)
    assert GaussianMixture.load(tmp_path).trainer_params == {"logger": {"10": 1, "9": 2}}


# Two files that are one estimator


@pytest.mark.parametrize("before", ["unfitted", "fitted"])
@pytest.mark.parametrize("after", ["unfitted", "fitted"])
def test_wherever_a_save_is_interrupted(tmp_path, monkeypatch, before, after):
    old = fitted(GaussianMixture) if before == "fitted" else GaussianMixture(5)
    new = GaussianMixture(4, random_state=1).fit(X) if after == "fitted" else GaussianMixture(6)
    allowed = (state(old), state(new))
    seen = []
    for steps in range(6):
        folder = tmp_path / str(steps)
        old.save(folder)
        with monkeypatch.context() as patch:
            left = [steps]

            def counted(function, left=left):
                def call(*args, **kwargs):
                    if not left[0]:
                        raise KeyboardInterrupt
                    left[0] -= 1
                    return function(*args, **kwargs)

                return call

            for module, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
                patch.setattr(module, name, counted(getattr(module, name)))
            with contextlib.suppress(KeyboardInterrupt):
                new.save(folder)
        found = state(GaussianMixture.load(folder))
        assert found in allowed
        seen.append(allowed.index(found))
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


@pytest.mark.parametrize("cls", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_model_that_is_missing(tmp_path, cls):
    fitted(cls).save(tmp_path)
    model = tmp_path / "model.safetensors"
    model.unlink()
    with pytest.raises(ValueError, match=r"params\.json says that the estimator was fitted, but model\.safetensors"):
        cls.load(tmp_path)
    assert cls.load_parameters(tmp_path).get_params() == cls(K, random_state=0).get_params()
    with pytest.raises(FileNotFoundError, match="holds no fitted attributes"):
        cls(K).load_attributes(tmp_path)
    model.symlink_to(tmp_path / "nowhere")
    for call in (cls.load, cls.load_parameters, cls(K).load_attributes):
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged: it is no file, or a link to nothing"):
            call(tmp_path)
    model.unlink()
    model.mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: it is no file"):
        cls.load(tmp_path)


def test_parts_of_a_save_say_whether_there_is_a_model(tmp_path):
    mixture = fitted(GaussianMixture)
    mixture.save_parameters(tmp_path)
    assert not hasattr(GaussianMixture.load(tmp_path), "means_")
    mixture.save_attributes(tmp_path)
    mixture.save_parameters(tmp_path)
    assert state(GaussianMixture.load(tmp_path)) == state(mixture)
    for _ in range(2):
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="but model.safetensors is not there"):
            GaussianMixture.load(tmp_path)
        GaussianMixture(3).save_parameters(tmp_path)
        mixture.save_attributes(tmp_path)


# Permissions and paths


@pytest.mark.skipif(os.name == "nt", reason="permissions are Unix's")
class TestPermissions:
    @pytest.fixture
    def umask(self):
        before = os.umask(0o027)
        yield
        os.umask(before)

    def test_new_files_have_those_of_the_process(self, tmp_path, umask):
        fitted(GaussianMixture).save(tmp_path / "model")
        for name in ("model.safetensors", "params.json"):
            assert stat.S_IMODE((tmp_path / "model" / name).stat().st_mode) == 0o640

    @pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
    def test_files_that_are_replaced_keep_theirs(self, tmp_path, umask, mode):
        fitted(GaussianMixture).save(tmp_path)
        (tmp_path / "model.safetensors").chmod(mode)
        fitted(GaussianMixture).save(tmp_path)
        assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode

    def test_the_mask_is_never_asked_for(self, tmp_path, monkeypatch):
        monkeypatch.delattr(os, "umask")
        fitted(GaussianMixture).save(tmp_path)


@pytest.mark.parametrize("cls", ESTIMATORS.values(), ids=ESTIMATORS)
def test_paths_of_bytes(tmp_path, cls):
    estimator, path = fitted(cls), os.fsencode(tmp_path / "model")
    estimator.save_parameters(path)
    estimator.save_attributes(path)
    estimator.save(path)
    assert os.listdir(tmp_path) == ["model"]
    assert state(cls.load(path)) == state(estimator)
    assert cls.load_parameters(path).get_params() == estimator.get_params()
    other = cls(K)
    other.load_attributes(path)
    assert state(other)[2].keys() == state(estimator)[2].keys()


@pytest.mark.parametrize("kind", ["module", "clusters"])
def test_paths_of_bytes_for_modules(tmp_path, kind):
    model, path = module_of(kind), os.fsencode(tmp_path / "model")
    model.save(path)
    assert os.listdir(tmp_path) == ["model"]
    assert module_state(type(model).load(path)) == module_state(model)
