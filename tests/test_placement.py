"""Where rows are computed: the environment variable, who it counts for, and where results are."""

import numpy as np
import pytest

from cases import assert_close, blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix.rows import _placement
from gaussmix.sklearn import GaussianMixture as SklearnMixture
from test_distributed import groups_of, in_each

pytestmark = pytest.mark.usefixtures("unconverged")

X = blobs(n=120, d=2, k=2)
ESTIMATORS = pytest.mark.parametrize(
    "estimator",
    [
        GaussianMixture(2, random_state=0, trainer_params={"max_epochs": 3}),
        SklearnMixture(2, random_state=0, max_iter=3),
        KMeans(2, random_state=0, trainer_params={"max_epochs": 3}),
    ],
    ids=["gaussmix", "sklearn", "kmeans"],
)


@pytest.fixture
def torch_as_gpu(monkeypatch):
    """A GPU whose memory is the host's: rows become tensors there."""
    torch = pytest.importorskip("torch")
    from gaussmix.rows import _gpu

    monkeypatch.setattr(_placement, "_n_gpus", lambda: 1)
    monkeypatch.setattr(_placement, "_moved", lambda x, where: x if where == "cpu" else torch.asarray(x))
    monkeypatch.setattr(_gpu, "block_rows", lambda x, where: None)


@ESTIMATORS
@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:one", "CPU", "mps", "0"])
def test_what_is_no_device_is_refused(estimator, device, monkeypatch):
    fitted = estimator.clone().fit(X)
    monkeypatch.setenv("GAUSSMIX_DEVICE", device)
    for method in (estimator.clone().fit, fitted.predict, fitted.score_samples):
        with pytest.raises(ValueError, match=rf"GAUSSMIX_DEVICE='{device}' is no device; set cpu, cuda"):
            method(X)


@ESTIMATORS
@pytest.mark.parametrize(
    ("n", "device", "found"),
    [(0, "cuda", "none"), (1, "cuda:1", "one, cuda:0"), (3, "cuda:7", "3, cuda:0 to cuda:2")],
)
def test_a_gpu_that_is_not_there(estimator, n, device, found, monkeypatch):
    fitted = estimator.clone().fit(X)
    monkeypatch.setattr(_placement, "_n_gpus", lambda: n)
    monkeypatch.setenv("GAUSSMIX_DEVICE", device)
    refused = rf"GAUSSMIX_DEVICE asks for a GPU, {device}.*, and torch finds {found}; .* set GAUSSMIX_DEVICE=cpu"
    unfitted = estimator.clone()
    for method in (unfitted.fit, fitted.predict):
        with pytest.raises(ValueError, match=refused):
            method(X)
    assert unfitted.persistent_attributes == []


@ESTIMATORS
@pytest.mark.parametrize("device", ["", "cpu", "cuda", "cuda:0"])
def test_results_are_where_the_rows_were(estimator, device, monkeypatch, torch_as_gpu):
    expected = estimator.clone().fit(X)
    monkeypatch.setenv("GAUSSMIX_DEVICE", device)
    found = estimator.clone().fit(X)
    for name in found.persistent_attributes:
        value = getattr(found, name)
        if isinstance(getattr(expected, name), np.ndarray):
            assert type(value) is np.ndarray
            assert_close(value, getattr(expected, name), 1e-9, name)
    assert np.array_equal(found.predict(X), expected.predict(X))
    assert type(found.score_samples(X)) is np.ndarray


def test_trainer_params_come_first(monkeypatch):
    monkeypatch.setattr(_placement, "_n_gpus", lambda: 0)
    monkeypatch.setenv("GAUSSMIX_DEVICE", "cuda")
    params = {"max_epochs": 3, "accelerator": "cpu"}
    assert GaussianMixture(2, random_state=0, trainer_params=params).fit(X).predict(X).shape == (120,)
    with pytest.raises(ValueError, match="asks for a GPU"):
        GaussianMixture(2, trainer_params={"accelerator": "auto"}).fit(X)


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture], ids=["gaussmix", "sklearn"])
def test_results_of_several_processes_are_where_the_rows_were(cls, monkeypatch, torch_as_gpu):
    monkeypatch.setattr("gaussmix._methods.process_group", lambda distributed, X, device: distributed)
    monkeypatch.setenv("GAUSSMIX_DEVICE", "cuda")
    fits = in_each(groups_of(2), lambda group: cls(2, random_state=0).fit(X[group.rank :: 2], distributed=group))
    monkeypatch.delenv("GAUSSMIX_DEVICE")
    for fitted in fits:
        assert type(fitted.means_) is np.ndarray
        assert type(fitted.covariances_) is np.ndarray
        assert_close(np.sort(fitted.weights_), np.sort(cls(2, random_state=0).fit(X).weights_), 1e-2)
