"""The engine, and the estimators on it: against the textbook, `_array_api` and the NumPy path."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracle
from cases import LOG_PROB_TOLERANCE, PARAMETER_TOLERANCE, OnRows, assert_close, blobs, start_for
from gaussmix import GaussianMixture as PyCaveMixture
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._guard import CENTRED
from gaussmix._parameters import Parameters, SingularCovarianceError
from gaussmix.backends import _array_api, _triton
from gaussmix.backends._dispatch import choose, why_not_triton
from gaussmix.rows._data import Rows
from gaussmix.sklearn import GaussianMixture
from kernels.common import DEVICE, INTERPRETED, LAYOUTS, mixture, rows, tensor
from strategies import cases

pytestmark = pytest.mark.usefixtures("unconverged")

PARAMETERS = ("weights_", "means_", "covariances_", "precisions_cholesky_")


def is_valid(on_rows, parameters):
    """Whether the form is exact enough for these parameters."""
    left = on_rows.engine.choose((on_rows.form, CENTRED), on_rows.objective.density(parameters))
    return left[0] == on_rows.form


@settings(max_examples=25)
@given(
    case=cases(max_n=20, max_d=4, max_k=3, min_extra=3, covariance_types=("diag", "full", "spherical", "tied")),
    layout=st.sampled_from(LAYOUTS),
    data=st.data(),
)
def test_every_form_takes_the_step_of_the_textbook(case, layout, data):
    covariance = COVARIANCES[case.covariance_type]
    form = data.draw(st.sampled_from(_triton.forms(covariance, case.x.shape[1], np.dtype(case.dtype))))
    covariances = np.asarray(case.covariances, dtype=np.float64)
    parameters = Parameters(
        *(np.asarray(a, dtype=np.float64) for a in (case.weights, case.means)),
        covariances,
        covariance.precision_cholesky(covariances),
    )
    weight = None if case.sample_weight is None else tensor(case.sample_weight)
    there = Rows(tensor(case.x, layout), weight)
    engine = OnRows(_triton, there, covariance, 1e-3, form)
    there_parameters = parameters.mapped(tensor)
    assume(is_valid(engine, parameters))
    expected = oracle.em_step(
        case.x, case.weights, case.means, case.covariances, case.covariance_type, 1e-3, case.sample_weight
    )
    dtype = "float64" if form.exact else "float32"
    statistics = engine.expect(there_parameters)
    assume(float(statistics.counts.min()) > 1e-5)
    # A step that leaves a component less than the form's least weight does not count.
    assume(float(statistics.counts.min() / statistics.counts.sum()) > 2 * form.least_weight)
    found = engine.objective.maximize(statistics, there_parameters.means)
    assume(is_valid(engine, found.mapped(to_numpy)))
    for name, value in zip(("weights", "means", "covariances"), expected, strict=True):
        assert_close(to_numpy(getattr(found, name)), value, PARAMETER_TOLERANCE[dtype], name)

    progress = engine.advance(there_parameters, 1) if form.has_kernels else engine.em(there_parameters, 1)
    for name, value in zip(("weights", "means", "covariances"), expected, strict=True):
        assert_close(to_numpy(getattr(progress.parameters, name)), value, PARAMETER_TOLERANCE[dtype], name)
    matrices = oracle.matrices(case.covariances, case.covariance_type, len(case.weights), case.x.shape[1])
    _, evidence = oracle.evidence(case.x, case.weights, case.means, matrices)
    bound = np.average(evidence, weights=case.sample_weight)
    assert abs(progress.lower_bounds[0] - bound) < LOG_PROB_TOLERANCE[dtype]

    engine = OnRows(_triton, Rows(there.array), covariance)
    found = to_numpy(engine.log_evidence(there_parameters))
    assert np.abs(found - evidence).max() < LOG_PROB_TOLERANCE[case.dtype]
    r = oracle.responsibilities(case.x, case.weights, case.means, matrices)
    assert np.abs(to_numpy(engine.responsibilities(there_parameters)) - r).max() < LOG_PROB_TOLERANCE[case.dtype]


@pytest.mark.parametrize(("dtype", "weighted"), [("float32", False), ("float64", True)])
def test_inference_and_statistics_equal_the_array_api(covariance, dtype, weighted):
    x, weight = rows(45, 3, weighted=weighted)
    parameters = mixture(x, 3, covariance.name)
    there = Rows(tensor(x.astype(dtype)), None if weight is None else tensor(weight))
    found, exact = OnRows(_triton, there, covariance, 0.1), OnRows(_array_api, Rows(x, weight), covariance, 0.1)
    there = parameters.mapped(tensor)
    expected = exact.expect(parameters)
    statistics = found.expect(there)
    tolerance = PARAMETER_TOLERANCE[dtype]
    assert_close(to_numpy(statistics.counts), expected.counts, tolerance)
    assert statistics.lower_bound() == pytest.approx(expected.lower_bound(), abs=LOG_PROB_TOLERANCE[dtype])
    new, reference = found.step(there), exact.step(parameters)
    for name in ("weights", "means", "covariances"):
        assert_close(to_numpy(getattr(new, name)), getattr(reference, name), tolerance, name)
    start, reference = found.start(there.means), exact.start(parameters.means)
    for name in ("weights", "means", "covariances", "precision_cholesky"):
        assert_close(to_numpy(getattr(start, name)), getattr(reference, name), tolerance, name)


def fitted(x, covariance_type, sample_weight=None, k=3, **settings_):
    start = start_for(to_numpy(x), k, covariance_type)
    mixture_ = GaussianMixture(
        k, covariance_type=covariance_type, tol=0, max_iter=3, reg_covar=1e-3, **start, **settings_
    )
    return mixture_.fit(x, sample_weight=sample_weight)


@pytest.mark.parametrize(("dtype", "weighted"), [("float32", True), ("float64", False)])
def test_fits_and_predictions_equal_those_of_numpy(covariance, dtype, weighted, monkeypatch):
    x = blobs(n=31, d=3, k=3).astype(dtype)
    weight = np.random.RandomState(0).uniform(0, 2, size=31) * (np.arange(31) % 4 > 0) if weighted else None
    expected = fitted(x.astype(np.float64), covariance.name, weight)
    expected_predictions = [
        getattr(expected, name)(x.astype(np.float64)) for name in ("predict", "predict_proba", "score_samples", "score")
    ]
    monkeypatch.setenv("GAUSSMIX_BACKEND", "triton")
    there = tensor(x)
    found = fitted(there, covariance.name, None if weight is None else tensor(weight))
    assert found.backend_ == "triton"
    assert found.precision_.startswith("expanded-float" + ("16x3" if dtype == "float32" else "64"))
    for name in PARAMETERS:
        value = getattr(found, name)
        assert isinstance(value, torch.Tensor)
        assert value.dtype == there.dtype
        assert value.device == there.device
        assert_close(to_numpy(value), getattr(expected, name), PARAMETER_TOLERANCE[dtype], name)
    tolerance = LOG_PROB_TOLERANCE[dtype]
    assert_close(found.lower_bounds_, expected.lower_bounds_, tolerance)
    labels, proba, scores, score = (
        getattr(found, name)(there) for name in ("predict", "predict_proba", "score_samples", "score")
    )
    assert labels.dtype == torch.int64
    assert proba.dtype == scores.dtype == there.dtype
    assert {value.device for value in (labels, proba, scores)} == {there.device}
    assert np.array_equal(to_numpy(labels), expected_predictions[0])
    for value, reference in zip((proba, scores, score), expected_predictions[1:], strict=True):
        assert_close(to_numpy(value), reference, 10 * tolerance)


@pytest.mark.parametrize(
    ("strategy", "covariance"),
    [("kmeans", name) for name in ("full", "tied", "diag", "spherical")]
    + [("kmeans++", "tied"), ("random", "diag"), ("random", "full")],
)
def test_every_start_equals_that_of_numpy(strategy, covariance, monkeypatch):
    x = blobs(n=31, d=2, k=3, seed=1)
    settings_ = dict(
        covariance_type=covariance, init_strategy=strategy, random_state=0, trainer_params={"max_epochs": 2}
    )
    expected = PyCaveMixture(3, **settings_).fit(x)
    monkeypatch.setenv("GAUSSMIX_BACKEND", "triton")
    found = PyCaveMixture(3, **settings_).fit(tensor(x))
    assert found.backend_ == "triton"
    for name in PARAMETERS:
        assert_close(to_numpy(getattr(found, name)), getattr(expected, name), 1e-9, name)


@pytest.mark.parametrize("dtype_", [torch.int32, torch.float16], ids=["int32", "float16"])
def test_data_of_other_dtypes(dtype_, monkeypatch):
    x = np.round(4 * blobs(n=31, d=2, k=2))
    expected = fitted(x, "full", k=2)
    monkeypatch.setenv("GAUSSMIX_BACKEND", "triton")
    found = fitted(tensor(x, dtype=dtype_), "full", k=2)
    half = dtype_ == torch.float16
    assert found.means_.dtype == (torch.float32 if half else torch.float64)
    assert_close(
        to_numpy(found.covariances_), expected.covariances_, PARAMETER_TOLERANCE["float32" if half else "float64"]
    )


# What NumPy says in the interpreter of infinity and NaN.
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:All-NaN slice")
def test_a_singular_covariance_is_an_error_that_names_the_component(covariance, dtype, monkeypatch):
    monkeypatch.setenv("GAUSSMIX_BACKEND", "triton")
    x = two_far_clusters(50.0)
    if covariance.name == "tied":
        x[:, 1] = x[:, 0]
    else:
        x[16:] = 50.25
    start = start_for(x, 2, covariance.name) | {"means_init": [[0.0, 0.0], [50.0, 50.0]]}
    mixture_ = GaussianMixture(2, covariance_type=covariance.name, reg_covar=0.0, tol=0, max_iter=4, **start)
    name = "the covariance that all components share" if covariance.name == "tied" else "the covariance of component 1"
    with pytest.raises(SingularCovarianceError, match=f"{name} is not .*increase the regularisation") as info:
        mixture_.fit(tensor(x.astype(dtype)))
    assert isinstance(info.value, torch.linalg.LinAlgError)


def two_far_clusters(distance, d=2):
    rng = np.random.RandomState(0)
    return np.concatenate([rng.normal(size=(16, d)), distance + rng.normal(size=(16, d))])


def broad_fit(x, covariance, distance, d=2, iterations=6):
    wide = float(np.asarray(to_numpy(x), dtype=np.float64).var())
    shape = covariance.shape(2, d)
    precisions = np.broadcast_to(np.eye(d) / wide if covariance.name in ("full", "tied") else 1 / wide, shape)
    start = dict(weights_init=[0.5, 0.5], means_init=[[0.0] * d, [distance] * d], precisions_init=precisions.copy())
    return GaussianMixture(2, covariance_type=covariance.name, tol=0, max_iter=iterations, **start).fit(x)


def test_clusters_far_apart_from_a_broad_start_leave_the_form(covariance, dtype, monkeypatch, caplog):
    x = two_far_clusters(1e4).astype(dtype)
    expected = broad_fit(x.astype(np.float64), covariance, 1e4)
    monkeypatch.setenv("GAUSSMIX_BACKEND", "triton")
    with caplog.at_level(logging.INFO, logger="gaussmix"):
        found = broad_fit(tensor(x), covariance, 1e4)
    assert "float16x3" not in found.precision_
    assert f"left for {found.precision_}: " in caplog.text
    if dtype == "float64":
        assert found.precision_ == "centred-float64"
    assert_close(to_numpy(found.covariances_), expected.covariances_, 1e-3)
    assert found.n_iter_ == 6
    assert_close(found.lower_bounds_, expected.lower_bounds_, 1e-3)


def test_clusters_near_each_other_keep_the_form(covariance, monkeypatch):
    monkeypatch.setenv("GAUSSMIX_BACKEND", "triton")
    found = broad_fit(tensor(two_far_clusters(6.0).astype(np.float32)), covariance, 6.0, iterations=2)
    assert found.precision_ == "expanded-float16x3"


def test_full_covariances_in_float32_go_over_centred_rows(monkeypatch, caplog):
    monkeypatch.setenv("GAUSSMIX_BACKEND", "triton")
    x = two_far_clusters(200.0).astype(np.float32)
    found = broad_fit(tensor(x), COVARIANCES["full"], 200.0)
    assert found.precision_ == "centred-float16x3"
    exact = x.astype(np.float64).reshape(2, 16, 2)
    expected = np.stack([np.cov(cluster.T, bias=True) for cluster in exact]) + 1e-6 * np.eye(2)
    assert_close(to_numpy(found.covariances_), expected, 1e-4)


def test_predictions_fall_back_as_well(covariance, monkeypatch):
    x = two_far_clusters(1e5).astype(np.float32)
    weights, means = np.array([0.5, 0.5]), np.array([[0.0, 0.0], [1e5, 1e5]])
    shape = covariance.shape(2, 2)
    covariances = np.broadcast_to(np.eye(2) if covariance.name in ("full", "tied") else 1.0, shape).copy()
    known = (weights, means, covariances)
    expected = PyCaveMixture.from_parameters(*known, covariance_type=covariance.name).score_samples(
        x.astype(np.float64)
    )
    monkeypatch.setenv("GAUSSMIX_BACKEND", "triton")
    found = PyCaveMixture.from_parameters(*map(tensor, known), covariance_type=covariance.name)
    assert_close(to_numpy(found.score_samples(tensor(x))), expected, 1e-4)
    assert to_numpy(found.predict(tensor(x))).tolist() == [0] * 16 + [1] * 16


def test_a_forced_backend_that_can_not_run_says_why(monkeypatch):
    monkeypatch.setenv("GAUSSMIX_BACKEND", "triton")
    with pytest.raises(
        ValueError, match="GAUSSMIX_BACKEND=triton can not run: numpy.ndarray is neither a torch tensor"
    ):
        PyCaveMixture(1).fit(np.zeros((3, 1)))


def test_dispatch_says_why(monkeypatch):
    host = torch.zeros((3, 1))
    assert choose(host) == ("numpy", "the data is in host memory")
    assert choose(np.zeros((3, 1)))[0] == "numpy"
    if DEVICE == "cuda":
        assert choose(host.cuda()) == ("triton", "the data is on a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "in host memory, where the kernels run with TRITON_INTERPRET=1 only" in why_not_triton(host)
    assert "is on meta, not on a CUDA or ROCm device" in why_not_triton(torch.zeros((3, 1), device="meta"))
    assert "numpy.ndarray is neither a torch tensor nor a CuPy array" in why_not_triton(np.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not_triton(host) is None
    assert why_not_triton(torch.zeros((3, 256)), COVARIANCES["full"]) is None
    assert why_not_triton(torch.zeros((3, 257)), COVARIANCES["full"]) == (
        "there are no kernels for 257 features, only for up to 256"
    )
    monkeypatch.setattr("gaussmix.backends._dispatch.find_spec", lambda name: None if name == "triton" else name)
    assert why_not_triton(host) == "triton is not installed; install gaussmix[triton]"
    monkeypatch.setenv("GAUSSMIX_BACKEND", "triton")
    with pytest.raises(ValueError, match="can not run: triton is not installed; install"):
        choose(host)


def test_cupys_default_stream_is_that_of_torch(monkeypatch):
    """Its pointer is 0, from which torch makes a stream of its own pool."""
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: ("external", pointer, device))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: ("default", device))
    assert _triton._stream_at(0, 3) == ("default", 3)
    assert _triton._stream_at(77, 3) == ("external", 77, 3)


def test_tensors_on_the_host_load_no_kernels():
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; import torch; from gaussmix import GaussianMixture; "
        "GaussianMixture(2, random_state=0).fit(torch.arange(50.0)[:, None] ** 2);"
        "print([m for m in ('gaussmix.backends._triton', 'gaussmix_kernels._public') if m in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"


def test_tests_without_a_gpu_are_interpreted():
    assert INTERPRETED or torch.cuda.is_available()
