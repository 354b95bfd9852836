"""The edge: every bad parameter and input gets an error that names cause, value and remedy."""

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from cases import blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix.sklearn import GaussianMixture as SklearnMixture

X = blobs(n=30, d=2, k=2)
IDENTITIES = np.stack([np.eye(2)] * 2)


@pytest.mark.parametrize(
    ("estimator", "error", "message"),
    [
        (GaussianMixture(0), ValueError, "num_components must be at least 1, got 0"),
        (GaussianMixture(2.0), TypeError, "num_components must be an integer, got 2.0"),
        (GaussianMixture(True), TypeError, "num_components must be an integer"),
        (GaussianMixture(31), ValueError, "got num_components = 31, n_samples = 30; use fewer"),
        (GaussianMixture(covariance_type="fill"), ValueError, r"covariance_type must be one of \['diag'.*got 'fill'"),
        (GaussianMixture(init_strategy="k-means"), ValueError, "init_strategy must be one of"),
        (
            GaussianMixture(convergence_tolerance=-1),
            ValueError,
            "convergence_tolerance must be finite and not negative",
        ),
        (GaussianMixture(convergence_tolerance="small"), TypeError, "convergence_tolerance must be a number"),
        (GaussianMixture(covariance_regularization=np.nan), ValueError, "covariance_regularization must be finite"),
        (GaussianMixture(batch_size=0), ValueError, "batch_size must be at least 1"),
        (GaussianMixture(batch_size=1.5), TypeError, "batch_size must be an integer"),
        (GaussianMixture(random_state="seed"), ValueError, "seed"),
        (
            GaussianMixture(2, init_means=[[0.0, 0.0]]),
            ValueError,
            r"'init_means' should have the shape of \(2, 2\), but got \(1, 2\)",
        ),
        (GaussianMixture(init_means=[[0.0, np.nan]]), ValueError, "Input contains NaN in the parameter 'init_means'"),
        (GaussianMixture(init_means=[["a", "b"]]), ValueError, "'init_means' has dtype"),
        (GaussianMixture(trainer_params={"max_epochs": -1}), ValueError, "max_epochs.* must be at least 0"),
        (GaussianMixture(trainer_params={"max_epoch": 5}), TypeError, r"unknown settings \['max_epoch'\]"),
        (GaussianMixture(trainer_params={"precision": 16}), ValueError, r"precision'\] must be 32 or 64, got 16"),
        (GaussianMixture(trainer_params={"accelerator": "tpu"}), ValueError, r"accelerator'\] must be one of"),
        (SklearnMixture(0), ValueError, r"'n_components' parameter .* must be an int in the range \[1, inf\). Got 0"),
        (SklearnMixture(31), ValueError, "got n_components = 31, n_samples = 30; use fewer"),
        (SklearnMixture(tol=-1), ValueError, r"'tol' parameter .* must be a float in the range \[0.0, inf\). Got -1"),
        (
            SklearnMixture(reg_covar=-1e-9),
            ValueError,
            "'reg_covar' parameter .* must be a float in the range .* Got -1e-09",
        ),
        (SklearnMixture(max_iter=-1), ValueError, "'max_iter' parameter .* must be an int in the range .* Got -1"),
        (SklearnMixture(n_init=0), ValueError, "'n_init' parameter .* must be an int in the range .* Got 0"),
        (
            SklearnMixture(init_params="kmeans++"),
            ValueError,
            r"'init_params' .* must be a str among \{.*Got 'kmeans\+\+'",
        ),
        (
            SklearnMixture(verbose_interval=0),
            ValueError,
            "'verbose_interval' parameter .* must be an int in the range .* Got 0",
        ),
        (
            SklearnMixture(2, weights_init=[0.7, 0.7]),
            ValueError,
            r"'weights' should be normalized, but got sum\(weights\) = 1.4.*divide",
        ),
        (
            SklearnMixture(2, weights_init=[-0.5, 1.5]),
            ValueError,
            r"'weights' should be in the range \[0, 1\], but got max value 1.5.*min value -0.5",
        ),
        (
            SklearnMixture(2, weights_init=[1.0]),
            ValueError,
            r"'weights' should have the shape of \(2,\), but got \(1,\)",
        ),
        (
            SklearnMixture(2, means_init=np.zeros((2, 3))),
            ValueError,
            r"'means' should have the shape of \(2, 2\), but got \(2, 3\)",
        ),
        (
            SklearnMixture(2, precisions_init=np.eye(2)),
            ValueError,
            r"'full precision' should have the shape of \(2, 2, 2\), but got \(2, 2\)",
        ),
        (
            SklearnMixture(2, precisions_init=-IDENTITIES),
            ValueError,
            "'full precision' should be symmetric, positive-definite: .* of component 0 should",
        ),
        (
            SklearnMixture(2, precisions_init=IDENTITIES + np.triu(np.ones((2, 2)), 1)),
            ValueError,
            "'full precision' should be symmetric, positive-definite: .* differs from its transpose by up to 1",
        ),
        (KMeans(0), ValueError, "num_clusters must be at least 1"),
        (KMeans(31), ValueError, "got num_clusters = 31, n_samples = 30; use fewer"),
        (KMeans(init_strategy="kmeans"), ValueError, "init_strategy must be one of"),
        (KMeans(convergence_tolerance=-1.0), ValueError, "convergence_tolerance must be finite"),
    ],
)
def test_bad_parameters(library, estimator, error, message):
    with pytest.raises(error, match=message):
        estimator.fit(library.asarray(X))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.ones(29), r"sample_weight has shape \(29,\); pass one weight for each of the 30 rows"),
        (np.ones((30, 1)), r"sample_weight has shape \(30, 1\)"),
        (np.full(30, -1.0), "sample_weight contains a negative value, -1"),
        (np.zeros(30), "sample_weight is zero for every row"),
        (np.full(30, np.nan), "sample_weight contains NaN"),
        (np.eye(1, 30)[0], "= 2, n_samples = 1; use fewer"),
    ],
)
@pytest.mark.parametrize("estimator", [GaussianMixture(2), SklearnMixture(2), KMeans(2)])
def test_bad_weights(library, estimator, weight, message):
    with pytest.raises(ValueError, match=message):
        estimator.fit(library.asarray(X), sample_weight=library.asarray(weight))


def test_bad_weights_of_other_types():
    with pytest.raises(ValueError, match="sample_weight has dtype"):
        GaussianMixture(2).fit(X, sample_weight=["heavy"] * 30)


@pytest.mark.parametrize("estimator", [GaussianMixture(1, random_state=0), SklearnMixture(1), KMeans(1)])
def test_bad_shapes_and_dtypes(library, estimator):
    for bad, message in (
        (np.zeros(5), "Expected 2D array, got 1D array"),
        (np.zeros((2, 3, 4)), "(Expected 2D array, got 3D|Found array with dim 3)"),
        (np.zeros((0, 2)), r"Found array with 0 sample\(s\)"),
        (np.zeros((5, 0)), r"0 feature\(s\)"),
        (np.zeros((5, 2), dtype=complex), "Complex data not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.fit(library.asarray(bad))
    estimator.fit(library.asarray(X))
    with pytest.raises(ValueError, match="X has 3 features, but .* is expecting 2 features"):
        estimator.predict(library.asarray(np.zeros((4, 3))))


@pytest.mark.parametrize("estimator", [GaussianMixture(1), SklearnMixture(1)])
def test_one_row_is_too_few(library, estimator):
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        estimator.fit(library.asarray([[2.0]]))


def test_sparse_and_text_are_refused():
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        GaussianMixture().fit(sparse.csr_matrix(X))
    with pytest.raises(ValueError, match="could not convert string"):
        GaussianMixture().fit([["a", "b"], ["c", "d"]])


@pytest.mark.parametrize("estimator", [GaussianMixture(), SklearnMixture(), KMeans()])
@pytest.mark.parametrize("method", ["predict", "score", "score_samples"])
def test_before_fit(estimator, method):
    with pytest.raises(NotFittedError):
        getattr(estimator, method)(X)


@pytest.mark.parametrize(
    ("estimator", "message"), [(GaussianMixture(), "number of rows to sample"), (SklearnMixture(), "n_samples")]
)
@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-3, ValueError), (1.5, TypeError)])
def test_bad_sample_sizes(estimator, message, n, error):
    with pytest.raises(NotFittedError):
        estimator.sample(3)
    with pytest.raises(error, match=message):
        type(estimator)(random_state=0).fit(X).sample(n)


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "message"),
    [
        ([1.0], [0.0], [1.0], r"means has shape \(1,\); expected \(number of components"),
        ([0.5], [[0.0]], [1.0], "'weights' should be normalized"),
        ([0.5, 0.5], [[0.0]], [1.0], r"'weights' should have the shape of \(1,\), but got \(2,\)"),
        ([1.0], [[0.0]], [[1.0]], r"'covariances' should have the shape of \(1,\), but got \(1, 1\)"),
        ([1.0], [[0.0]], [-1.0], "covariances of component 0 should be positive definite"),
        ([0.5, 0.5], [[0.0], [1.0]], [1.0, 0.0], "covariances of component 1 should be positive definite"),
        ([1.0], [[np.inf]], [1.0], "Input contains infinity in the parameter 'means'"),
        ([1.0], [["x"]], [1.0], "'means' has dtype"),
    ],
)
@pytest.mark.parametrize("estimator", [GaussianMixture, SklearnMixture])
def test_bad_known_parameters(estimator, weights, means, covariances, message):
    with pytest.raises(ValueError, match=message):
        estimator.from_parameters(weights, means, covariances, covariance_type="spherical")


def test_unknown_type_of_known_parameters():
    with pytest.raises(ValueError, match="covariance_type must be one of"):
        GaussianMixture.from_parameters([1.0], [[0.0]], [1.0], covariance_type="round")


def test_harmless_settings_of_lightning_are_accepted():
    params = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "devices": 1, "max_epochs": 50}
    mixture = GaussianMixture(2, trainer_params=params, random_state=0).fit(X)
    assert mixture.get_params()["trainer_params"] is params
