"""PyCave's `trainer_params` without Lightning, setting by setting, and `trainer()` with it."""

import logging
import sys

import numpy as np
import pytest
import sklearn.base

import gaussmix
from cases import PARAMETER_TOLERANCE, assert_close, blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix._arrays import to_numpy

X = blobs(n=300, d=2, k=3, seed=1)
ESTIMATORS = pytest.mark.parametrize("cls", [GaussianMixture, KMeans])


def fit(cls=GaussianMixture, x=X, k=3, batch_size=None, **trainer_params):
    return cls(k, random_state=0, batch_size=batch_size, trainer_params=trainer_params).fit(x)


def has_gpu():
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


no_gpu = pytest.mark.skipif(has_gpu(), reason="there is a GPU, which these settings would take")


# max_epochs


@ESTIMATORS
@pytest.mark.parametrize("max_epochs", [0, 1, np.int64(2)])
@pytest.mark.usefixtures("unconverged")
def test_max_epochs_is_the_largest_number_of_iterations(cls, max_epochs):
    params = dict(convergence_tolerance=0, init_strategy="random", random_state=0)
    found = cls(3, **params, trainer_params={"max_epochs": max_epochs}).fit(X)
    assert found.num_iter_ == max_epochs
    assert not found.converged_


@pytest.mark.filterwarnings("error")
def test_no_epochs_show_the_start_silently():
    assert_close(
        fit(KMeans, max_epochs=0).inertia_,
        KMeans(3, random_state=0, trainer_params={"max_epochs": 0}).fit(X).score(X),
        1e-12,
    )
    assert fit(max_epochs=0).nll_ == float("inf")


@ESTIMATORS
@pytest.mark.parametrize(
    ("max_epochs", "error"), [(-1, ValueError), (2.5, TypeError), ("5", TypeError), (True, TypeError)]
)
def test_max_epochs_is_a_count(cls, max_epochs, error):
    with pytest.raises(error, match=r"trainer_params\['max_epochs'\] must be"):
        fit(cls, max_epochs=max_epochs)


@pytest.mark.parametrize(("cls", "default"), [(GaussianMixture, 100), (KMeans, 300)])
@pytest.mark.usefixtures("unconverged")
def test_the_default_of_max_epochs(cls, default):
    x = np.random.RandomState(0).normal(size=(12, 1))
    for params in (None, {}, {"max_epochs": None}):
        assert cls(2, convergence_tolerance=0, trainer_params=params)._settings().max_epochs == default
    if cls is GaussianMixture:
        assert cls(2, convergence_tolerance=0, random_state=0).fit(x).num_iter_ == default


# accelerator, devices


@ESTIMATORS
@pytest.mark.parametrize(
    "params",
    [
        *({"accelerator": accelerator} for accelerator in ("cpu", "auto", None)),
        *({"devices": devices} for devices in (1, "1", "auto", None)),
        {"accelerator": "cpu", "devices": [0]},
        {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"},
        {"strategy": None, "plugins": None, "num_nodes": None},
    ],
)
def test_one_process_on_the_cpu_where_the_rows_are(library, cls, params):
    x = library.asarray(X)
    name = "means_" if cls is GaussianMixture else "centroids_"
    found, expected = (getattr(fit(cls, x, **settings), name) for settings in (params, {}))
    assert library.owns(found)
    assert np.array_equal(to_numpy(found), to_numpy(expected))


@no_gpu
@ESTIMATORS
@pytest.mark.parametrize(
    "params", [{"accelerator": "gpu"}, {"accelerator": "cuda", "devices": [3]}, {"accelerator": "gpu", "devices": 1}]
)
def test_a_gpu_that_is_not_there(library, cls, params):
    message = r"asks for a GPU, cuda:\d, and torch finds none; pass accelerator='cpu', .*, or leave it out"
    with pytest.raises(ValueError, match=message):
        fit(cls, library.asarray(X), **params)
    fitted = fit(cls).set_params(trainer_params=params)
    with pytest.raises(ValueError, match=message):
        fitted.predict(library.asarray(X))


@ESTIMATORS
def test_a_gpu_without_torch(cls, monkeypatch):
    monkeypatch.setattr("gaussmix.rows._placement.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="GAUSSMIX_DEVICE asks for a GPU, cuda:0, and torch finds none"):
        fit(cls, accelerator="gpu")


@ESTIMATORS
@pytest.mark.parametrize("accelerator", ["tpu", "mps", "CPU", 1])
def test_accelerators_that_gaussmix_does_not_have(cls, accelerator):
    with pytest.raises(ValueError, match=r"trainer_params\['accelerator'\] must be one of .*'cpu'.*, got "):
        fit(cls, accelerator=accelerator)


# precision


def all_forms(x):
    """The rows as an array, in batches and from an iterable: (rows, batch_size)."""

    class Blocks:
        def __iter__(self):
            return iter((x[:100, :], x[100:, :]))

    return [(x, None), (x, 70), (Blocks(), None)]


@ESTIMATORS
@pytest.mark.parametrize(
    ("precision", "expected"), [(32, "float32"), ("32-true", "float32"), (64, "float64"), ("64", "float64")]
)
def test_precision_is_the_dtype_of_the_fit(library, dtype, cls, precision, expected):
    for x, batch_size in all_forms(library.asarray(X, dtype)):
        found = fit(cls, x, batch_size=batch_size, precision=precision)
        reference = fit(cls, library.asarray(X.astype(dtype), expected))
        for name in ("means_", "covariances_", "weights_") if cls is GaussianMixture else ("centroids_",):
            assert library.owns(getattr(found, name))
            assert str(getattr(found, name).dtype).endswith(expected)
            assert_close(
                to_numpy(getattr(found, name)), to_numpy(getattr(reference, name)), PARAMETER_TOLERANCE["float32"], name
            )
        if cls is GaussianMixture:
            assert found.precision_ == reference.precision_
        # Predictions are in the dtype of what they are made for.
        assert str(found.score_samples(x).dtype).endswith(dtype)


def test_precision_of_a_loader():
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.as_tensor(X)), batch_size=128)
    found = fit(x=loader, precision=32)
    assert found.means_.dtype == torch.float32
    assert_close(found.means_, fit(x=torch.as_tensor(X)).means_, 1e-4)


@ESTIMATORS
def test_integers_have_a_precision(cls):
    whole = np.round(X).astype(np.int16)
    name = "means_" if cls is GaussianMixture else "centroids_"
    assert getattr(fit(cls, whole, precision=32), name).dtype == np.float32
    assert getattr(fit(cls, whole), name).dtype == np.float64


@ESTIMATORS
@pytest.mark.parametrize("precision", [16, "16", "bf16", "16-mixed", "bf16-true", "double", 8])
def test_half_precision_is_refused(cls, precision):
    with pytest.raises(ValueError, match=r"trainer_params\['precision'\] must be 32 or 64, got .*at least float32"):
        fit(cls, precision=precision)


# Progress bars


@ESTIMATORS
def test_a_progress_bar(cls, capfd):
    fitted = fit(cls, enable_progress_bar=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    last = shown.err.replace("\r", "\n").strip().splitlines()[-1]
    value = "log-likelihood" if cls is GaussianMixture else "movement"
    assert f"iteration {fitted.num_iter_}, " in last
    assert f"{value} " in last
    assert "change " in last
    if cls is GaussianMixture:
        bounds = fitted.lower_bounds_
        assert f"log-likelihood {bounds[-1]:.6g}, change {bounds[-1] - bounds[-2]:.3g}" in last


@ESTIMATORS
@pytest.mark.parametrize("params", [{}, {"enable_progress_bar": False}, {"enable_progress_bar": None}])
def test_no_progress_bar(cls, params, capfd):
    fit(cls, **params).predict(X)
    assert capfd.readouterr() == ("", "")


@ESTIMATORS
def test_a_progress_bar_by_level_of_logging(cls, capfd):
    logger = logging.getLogger("gaussmix")
    before = logger.level
    try:
        gaussmix.set_logging_level(logging.INFO)
        fit(cls)
        assert "iteration" in capfd.readouterr().err
        fit(cls, enable_progress_bar=False)
        assert capfd.readouterr().err == ""
    finally:
        logger.setLevel(before)


@ESTIMATORS
def test_a_progress_bar_changes_nothing(cls):
    name = "means_" if cls is GaussianMixture else "centroids_"
    assert np.array_equal(getattr(fit(cls, enable_progress_bar=True), name), getattr(fit(cls), name))


# What Lightning has and gaussmix has not

IGNORED = ("logger", "callbacks", "default_root_dir", "enable_checkpointing", "enable_model_summary", "profiler")


@ESTIMATORS
@pytest.mark.parametrize("value", [False, None])
def test_what_is_switched_off_is_ignored_silently(cls, value):
    fit(cls, **dict.fromkeys((*IGNORED, "deterministic", "inference_mode", "detect_anomaly"), value))


@ESTIMATORS
def test_what_is_ignored_otherwise_is_said_once(cls):
    params = dict(logger=True, log_every_n_steps=10, num_sanity_val_steps=0, default_root_dir="runs", profiler=None)
    with pytest.warns(UserWarning, match="leave them out") as caught:
        fit(cls, **params)
    (warning,) = caught
    assert "['default_root_dir', 'log_every_n_steps', 'logger'] are ignored" in str(warning.message)
    assert warning.filename == __file__


@ESTIMATORS
def test_unknown_settings_are_named(cls):
    with pytest.raises(TypeError, match=r"unknown settings \['max_epoch', 'percision'\]; known are accelerator, "):
        fit(cls, max_epoch=5, percision=None)
    assert cls(trainer_params={"max_epoch": 5}).get_params()["trainer_params"] == {
        "max_epoch": 5
    }  # no error before fit


@ESTIMATORS
@pytest.mark.parametrize("params", [5, "cpu", ["cpu"], [("max_epochs", 5)]])
def test_settings_are_a_dict(cls, params):
    with pytest.raises(TypeError, match="trainer_params must be a dict of Lightning's settings, got "):
        cls(2, trainer_params=params).fit(X)


# What Lightning 1.x had


@ESTIMATORS
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"gpus": 0}, "pass accelerator='cpu'"),
        ({"gpus": None}, "pass accelerator='cpu'"),
        ({"gpus": []}, "pass accelerator='cpu'"),
        ({"progress_bar_refresh_rate": 0}, "pass enable_progress_bar=False"),
    ],
)
def test_old_names_are_translated(cls, old, new, capfd):
    with pytest.warns(DeprecationWarning, match="is Lightning 1.x") as caught:
        fit(cls, **old)
    (warning,) = caught
    assert f"trainer_params[{next(iter(old))!r}] is Lightning 1.x; {new}" in str(warning.message)
    assert warning.filename == __file__
    assert capfd.readouterr() == ("", "")


@no_gpu
@ESTIMATORS
@pytest.mark.parametrize("gpus", [1, [0]])
def test_old_names_for_a_gpu_that_is_not_there(cls, gpus):
    with (
        pytest.warns(DeprecationWarning, match=r"pass accelerator='gpu', devices="),
        pytest.raises(ValueError, match="asks for a GPU"),
    ):
        fit(cls, gpus=gpus)


def test_old_names_for_a_progress_bar(capfd):
    with pytest.warns(DeprecationWarning, match="pass enable_progress_bar=True"):
        fit(progress_bar_refresh_rate=10)
    assert "iteration" in capfd.readouterr().err


def test_new_names_take_precedence():
    with pytest.warns(DeprecationWarning, match="pass accelerator='gpu', devices=1"):
        fit(gpus=1, accelerator="cpu")


@ESTIMATORS
def test_warnings_name_the_callers_line_and_only_fits_warn(cls):
    params = {"gpus": 0, "logger": True}
    estimator = cls(2, random_state=0, trainer_params=params)
    # Python shows deprecations where they are written in the user's script, and nowhere else.
    for call in (estimator.fit, estimator.fit_predict):
        with pytest.warns((DeprecationWarning, UserWarning), match="trainer_params") as caught:
            call(data=X)
        assert [warning.category for warning in caught] == [DeprecationWarning, UserWarning]
        assert {warning.filename for warning in caught} == {__file__}
    estimator.predict(X)
    estimator.score(X)


# The dict


@ESTIMATORS
def test_the_dict_is_stored_and_left_as_it_is(cls):
    params = {"max_epochs": 7, "gpus": 0, "logger": False, "enable_progress_bar": None}
    before = dict(params)
    estimator = cls(2, trainer_params=params)
    with pytest.warns(DeprecationWarning, match="gpus"):
        estimator.fit(X)
    assert estimator.trainer_params is params
    assert estimator.trainer_params_user is params
    assert estimator.get_params()["trainer_params"] is params
    assert params == before
    for copy in (estimator.clone(), sklearn.base.clone(estimator)):
        assert copy.trainer_params == params
        assert copy.trainer_params is not params
    assert cls().trainer_params_user is None


# Lightning's Trainer


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # Lightning's own
@pytest.mark.parametrize(("cls", "default"), [(GaussianMixture, 100), (KMeans, 300)])
def test_a_trainer_with_all_settings(cls, default):
    lightning = pytest.importorskip("pytorch_lightning")
    trainer = cls(trainer_params={"accelerator": "cpu"}).trainer()
    assert isinstance(trainer, lightning.Trainer)
    assert trainer.max_epochs == default
    assert trainer.logger is None
    assert trainer.checkpoint_callback is None
    assert trainer.progress_bar_callback is None
    estimator = cls(
        trainer_params={"accelerator": "cpu", "max_epochs": 7, "precision": 64, "enable_progress_bar": True}
    )
    assert estimator.trainer().max_epochs == 7
    assert estimator.trainer().precision == "64-true"
    assert estimator.trainer().progress_bar_callback is not None
    assert estimator.trainer(max_epochs=3).max_epochs == 3
    with pytest.raises(TypeError, match="max_epoch"):
        cls(trainer_params={"max_epoch": 3}).trainer()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trainer_takes_old_names():
    pytest.importorskip("pytorch_lightning")
    with pytest.warns(DeprecationWarning, match="gpus.* is Lightning 1.x") as caught:
        trainer = GaussianMixture(trainer_params={"gpus": 0}).trainer()
    assert type(trainer.accelerator).__name__ == "CPUAccelerator"
    assert __file__ in {warning.filename for warning in caught}


@ESTIMATORS
def test_a_trainer_without_lightning(cls, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(
        ImportError, match=r"trainer\(\) makes a pytorch_lightning.Trainer.*install gaussmix\[lightning\]"
    ):
        cls().trainer()
