"""The edge: every bad parameter and input gets an error that names cause, value and remedy."""

import array
import datetime
from collections import deque
from decimal import Decimal

import numpy as np
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from cases import blobs
from gaussmix import GaussianMixture, KMeans, estimate
from gaussmix._arrays import to_numpy
from gaussmix.sklearn import GaussianMixture as SklearnMixture

X = blobs(n=30, d=2, k=2)
IDENTITIES = np.stack([np.eye(2)] * 2)


def masked(x, **settings):
    """The array with one masked place."""
    x = np.ma.array(x, **settings)
    x[(-1,) * x.ndim] = np.ma.masked
    return x


def torch_tensor(x, **settings):
    return pytest.importorskip("torch").tensor(np.asarray(x), **settings)


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
        (GaussianMixture(random_state="seed"), ValueError, "random_state takes an integer .*, got 'seed'"),
        (GaussianMixture(random_state=-1), ValueError, "random_state takes an integer .*, got -1"),
        (
            KMeans(random_state=np.random.default_rng(0)),
            ValueError,
            "random_state takes .*RandomState or None, got Gen",
        ),
        (GaussianMixture(covariance_regularization=10**400), ValueError, "covariance_regularization must be finite"),
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


@pytest.mark.parametrize("estimator", [GaussianMixture(2), SklearnMixture(2)])
def test_bad_callback(library, estimator):
    with pytest.raises(TypeError, match="callback must be a function of .*, got 'print'"):
        estimator.fit(library.asarray(X), callback="print")
    assert not hasattr(estimator, "n_features_in_")


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture, KMeans])
def test_numpys_integers(cls, kind):
    found, expected = (cls(number, random_state=0).fit(X) for number in (kind(2), 2))
    np.testing.assert_array_equal(found.predict(X), expected.predict(X))
    assert estimate(kind(100), kind(3), kind(2), "full") == estimate(100, 3, 2, "full")


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


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: ["heavy"] * 30, ValueError, "sample_weight has dtype"),
        (lambda w: w + 1j, ValueError, "sample_weight has dtype complex128; pass real numbers"),
        (lambda w: w + 0j, ValueError, "sample_weight has dtype complex128; pass real numbers"),
        (lambda w: torch_tensor(w + 1j), ValueError, "sample_weight has dtype complex128; pass real numbers"),
        (lambda w: w.astype("M8[s]"), TypeError, r"sample_weight has dtype datetime64\[s\]: .* divide"),
        (lambda w: w.astype("m8[s]"), TypeError, r"sample_weight has dtype timedelta64\[s\]: .* divide"),
        (lambda w: np.array([(v,) for v in w], [("w", float)]), TypeError, "sample_weight has a structured dtype"),
        (lambda w: scipy.sparse.coo_array(w), TypeError, "Sparse data was passed for sample_weight"),
        (lambda w: torch_tensor(w).to_sparse(), TypeError, "Sparse data was passed for sample_weight"),
        (lambda w: torch_tensor(w).to("meta"), ValueError, "sample_weight is on torch's meta device"),
        (lambda w: [[1.0, 2.0], [3.0]] * 15, ValueError, "setting an array element .*; pass"),
        (lambda w: [10**400] * 30, ValueError, "sample_weight has dtype object; pass numbers"),
        (lambda w: np.ma.array(w, mask=True), ValueError, "sample_weight is zero for every row"),
    ],
)
@pytest.mark.parametrize("estimator", [GaussianMixture(2), SklearnMixture(2), KMeans(2)])
def test_bad_weights_of_other_types(library, estimator, make, error, message):
    weight = make(np.arange(1.0, 31))
    for method in ("fit", "partial_fit"):
        if hasattr(estimator, method):
            with pytest.raises(error, match=message):
                getattr(clone(estimator), method)(library.asarray(X), sample_weight=weight)


# Weights of the same rows as `WEIGHTS` has them, of which the last is 0.
WEIGHTS = np.arange(29.0, -1, -1)


@pytest.mark.parametrize(
    "make",
    [
        lambda w: masked(np.where(w > 0, w, 7)),
        lambda w: masked(np.where(w > 0, w, 7).astype(int)),
        np.ma.array,
        lambda w: masked(np.where(w > 0, w, np.nan)),
        lambda w: torch_tensor(w).bfloat16(),
        lambda w: torch_tensor(w).half(),
        lambda w: torch_tensor(-1j * w).conj().imag,
        lambda w: torch_tensor(w, requires_grad=True),
        memoryview,
        deque,
    ],
)
@pytest.mark.parametrize("estimator", [GaussianMixture(1), SklearnMixture(1), KMeans(1)])
def test_weights_in_other_clothes(library, estimator, make):
    expected = np.average(X, axis=0, weights=WEIGHTS)
    blocks = [library.asarray(X[:7]), library.asarray(X[7:])]
    for data in (library.asarray(X), deque(blocks)):
        fitted = clone(estimator).fit(data, sample_weight=make(WEIGHTS))
        centre = fitted.centroids_ if isinstance(estimator, KMeans) else fitted.means_
        np.testing.assert_allclose(to_numpy(centre)[0], expected, rtol=1e-9)


def test_masks_of_dask_arrays():
    da = pytest.importorskip("dask.array")
    rows, weight = da.from_array(X, chunks=(10, 2)), masked(np.where(WEIGHTS > 0, WEIGHTS, 7))
    fitted = GaussianMixture(1).fit(rows, sample_weight=da.from_array(weight, chunks=10))
    np.testing.assert_allclose(fitted.means_[0], np.average(X, axis=0, weights=WEIGHTS), rtol=1e-9)
    for call in (GaussianMixture(1).fit, fitted.score, lambda x: fitted.predict(x).compute()):
        with pytest.raises(ValueError, match="X has 1 masked values"):
            call(da.from_array(masked(X), chunks=(10, 2)))


NOT_GIVEN = {
    "masked": (masked, ValueError, "has 1 masked values"),
    "complex": (lambda x: x + 0j, ValueError, "has dtype complex128; pass real numbers"),
    "complex list": (lambda x: (x + 0j).tolist(), ValueError, "has dtype complex128; pass real numbers"),
    "dates": (lambda x: x.astype("M8[s]"), TypeError, r"has dtype datetime64\[s\]"),
    "durations": (lambda x: x.astype("m8[s]"), TypeError, r"has dtype timedelta64\[s\]"),
    "ragged": (lambda x: [[1.0], [2.0, 3.0]], ValueError, "setting an array element .*; pass rows"),
    "objects": (lambda x: np.full(x.shape, "a", dtype=object), ValueError, "could not convert string"),
    "torch's COO": (lambda x: torch_tensor(x).to_sparse(), TypeError, "Sparse data was passed for"),
    "meta": (lambda x: torch_tensor(x).to("meta"), ValueError, "is on torch's meta device"),
}
# The same arrays as lists, and so on.
GIVEN = {
    "objects": lambda x: x.astype(object),
    "matrix": lambda x: np.matrix(x) if x.ndim == 2 else x,
    "mask of nothing": np.ma.array,
    "conjugate": lambda x: torch_tensor(-1j * x).conj().imag,
}


def given(convert):
    """Fits and mixtures that take `convert` of means, weights, precisions or covariances, one at a time."""
    means, weights, eye = X[[0, -1]], np.array([0.25, 0.75]), np.stack([np.eye(2)] * 2)
    known = dict(weights=weights, means=means, covariances=eye)
    yield lambda: GaussianMixture(2, init_means=convert(means), random_state=0).fit(X)
    for name, value in (("means_init", means), ("weights_init", weights), ("precisions_init", eye)):
        yield lambda name=name, value=value: SklearnMixture(2, **{name: convert(value)}, random_state=0).fit(X)
    for cls in (GaussianMixture, SklearnMixture):
        for name in known:
            changed = known | {name: convert(known[name])}
            yield lambda cls=cls, changed=changed: cls.from_parameters(**changed, covariance_type="full")


@pytest.mark.parametrize("case", NOT_GIVEN)
def test_parameters_that_hold_no_numbers(case):
    convert, error, message = NOT_GIVEN[case]
    for call in given(convert):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("case", GIVEN)
def test_parameters_in_other_clothes(case):
    for call, same in zip(given(GIVEN[case]), given(np.asarray), strict=True):
        found = call()
        assert not isinstance(found.means_, np.matrix)
        np.testing.assert_allclose(to_numpy(found.means_), same().means_, rtol=1e-9)


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


def nested(x, **settings):
    tensor = torch_tensor(x)
    return pytest.importorskip("torch").nested.nested_tensor([tensor[:3], tensor[3:]], **settings)


def frame(library, **columns):
    """A data frame with two columns of numbers and these."""
    return pytest.importorskip(library).DataFrame({"a": X[:, 0], "b": X[:, 1], **columns})


DAYS = [datetime.date(2020, 1, 1) + datetime.timedelta(int(i)) for i in range(len(X))]
# What has no number in some place, or none yet: made where it is asked for, since libraries may be missing.
NO_NUMBERS = {
    "masked": (lambda: masked(X), ValueError, r"X has 1 masked values; .*compress_rows.*filled\(value\)"),
    "masked integers": (lambda: masked(X.astype(int)), ValueError, "X has 1 masked values"),
    "masked rows": (lambda: [masked(row) for row in X], ValueError, "X has 30 masked values"),
    "masked tensor": (
        lambda: pytest.importorskip("torch").masked.masked_tensor(torch_tensor(X), torch_tensor(X) > 0),
        TypeError,
        r"X is a masked tensor; .*to_tensor\(value\)",
    ),
    "dates": (lambda: X.astype("M8[s]"), TypeError, r"X has dtype datetime64\[s\]: .* divide .*timedelta64"),
    "durations": (lambda: X.astype("m8[s]"), TypeError, r"X has dtype timedelta64\[s\]: .* divide .*timedelta64"),
    "list of dates": (lambda: X.astype("M8[s]").tolist(), TypeError, "argument must be .*; pass real numbers"),
    "list of NumPy's dates": (lambda: list(X.astype("M8[s]")), TypeError, r"X has dtype datetime64\[s\]"),
    "frame of dates": (lambda: frame("pandas", t=np.array(DAYS, "M8[s]")), TypeError, r"datetime64.*column 't'"),
    "frame of durations": (lambda: frame("pandas", t=np.arange(30).astype("m8[s]")), TypeError, "timedelta64.*column"),
    "Polars' dates": (lambda: frame("polars", t=DAYS), TypeError, "X has dtype Date, in column 't'"),
    "lazy": (lambda: frame("polars").lazy(), TypeError, r"X is a polars LazyFrame.*\.collect\(\)"),
    "sparse frame": (
        lambda: frame("pandas").astype(pytest.importorskip("pandas").SparseDtype(float)),
        TypeError,
        r"Sparse data was passed for X.*\.sparse\.to_dense\(\)",
    ),
    "fields": (
        lambda: np.array([tuple(row) for row in X], dtype=[("a", float), ("b", float)]),
        TypeError,
        r"structured dtype, of fields \('a', 'b'\); .*structured_to_unstructured",
    ),
    "masked fields": (
        lambda: np.ma.array([tuple(row) for row in X], dtype=[("a", float), ("b", float)]),
        TypeError,
        r"structured dtype, of fields \('a', 'b'\); .*structured_to_unstructured",
    ),
    "text": (lambda: X.astype(str)[:, :1].repeat(2, 1) + "m", ValueError, "could not convert string .*; encode text"),
    "objects": (lambda: np.array([["a", 1.0]] * 30, dtype=object), ValueError, "could not convert string .*; encode"),
    "strings": (lambda: [["a", "b"], ["c", "d"]], ValueError, "could not convert string .*; encode text"),
    "frame of strings": (lambda: frame("pandas", t=["a"] * 30), ValueError, "could not convert string .*; encode"),
    "integers beyond float": (lambda: [[10**400, 1], [2, 3]], ValueError, "int too large .*; rescale"),
    "ragged": (lambda: [[1.0, 2.0], [3.0]], ValueError, "setting an array element .*; pass rows of the same length"),
    "class": (lambda: dict, TypeError, "argument must be .*'type'; pass real numbers"),
    "CSR": (lambda: scipy.sparse.csr_matrix(X), TypeError, r"Sparse data was passed for X.*\.toarray\(\).* 1 MiB"),
    "COO": (
        lambda: scipy.sparse.coo_array((10**7, 50)),
        TypeError,
        r"Sparse data was passed for X.*\.toarray\(\), which takes 3.73 GiB",
    ),
    "torch's COO": (lambda: torch_tensor(X).to_sparse(), TypeError, r"Sparse data was passed.*\.to_dense\(\)"),
    "torch's CSR": (lambda: torch_tensor(X).to_sparse_csr(), TypeError, r"Sparse data was passed.*\.to_dense\(\)"),
    "torch's BSR": (lambda: torch_tensor(X).to_sparse_bsr((1, 1)), TypeError, r"Sparse data .*\.to_dense\(\)"),
    "meta": (lambda: torch_tensor(X).to("meta"), ValueError, "X is on torch's meta device.*pass a tensor that has"),
    "quantized": (
        lambda: pytest.importorskip("torch").quantize_per_tensor(
            torch_tensor(X.astype(np.float32)), 0.1, 0, pytest.importorskip("torch").qint8
        ),
        TypeError,
        r"X has dtype torch.qint8, of quantized numbers; pass its \.dequantize\(\)",
    ),
    "nested": (lambda: nested(X), TypeError, r"X is a nested tensor.*torch\.cat of its \.unbind\(\)"),
    "image": (lambda: np.zeros((4, 5, 2)), ValueError, r"Found array with dim 3.*X\.reshape\(-1, c\)"),
    "image of bytes": (lambda: np.zeros((4, 5, 2), np.uint8), ValueError, r"Found array with dim 3.*reshape\(-1, c\)"),
    "list of an image": (lambda: np.zeros((4, 5, 2)).tolist(), ValueError, r"Found array with dim 3.*reshape\(-1, c\)"),
    "torch's image": (lambda: torch_tensor(np.zeros((4, 5, 2))), ValueError, r"got 3D array .*reshape\(-1, c\)"),
}


@pytest.mark.filterwarnings("ignore:.*(prototype|beta|deprecated|feature names):UserWarning")
@pytest.mark.parametrize("estimator", [GaussianMixture(1), SklearnMixture(1), KMeans(1)])
@pytest.mark.parametrize("case", NO_NUMBERS)
def test_what_holds_no_numbers(estimator, case):
    make, error, message = NO_NUMBERS[case]
    data = make()
    fitted = clone(estimator).fit(X)
    methods = ("predict", "score", "score_samples", "transform", "predict_proba", "partial_fit", "bic")
    for call in (
        clone(estimator).fit,
        clone(estimator).fit_predict,
        *(getattr(fitted, method) for method in methods if hasattr(fitted, method)),
    ):
        with pytest.raises(error, match=message):
            call(data)


# The same numbers in other clothes, as what the expected ones are.
SAME_NUMBERS = {
    "mask of nothing": lambda x: np.ma.array(x, mask=np.zeros(x.shape, bool)),
    "no mask": np.ma.array,
    "memoryview": lambda x: memoryview(np.ascontiguousarray(x)),
    "deque": lambda x: deque(x.tolist()),
    "deque of arrays": deque,
    "deque of tuples": lambda x: deque(map(tuple, x.tolist())),
    "deque of blocks": lambda x: deque([x[:7], x[7:]]),
    "list of buffers": lambda x: [array.array("d", row) for row in x],
    "other byte order": lambda x: x.astype(">f8"),
    "backwards": lambda x: x[::-1][::-1],
    "decimals": lambda x: [[Decimal(value) for value in row] for row in x.tolist()],
    "negative bit": lambda x: torch_tensor(-1j * x).conj().imag.neg().neg(),
    "view of a conjugate": lambda x: torch_tensor(-1j * x).conj().imag,
    "gradient": lambda x: torch_tensor(x, requires_grad=True),
}


@pytest.mark.parametrize(
    "estimator", [GaussianMixture(2, random_state=0), SklearnMixture(2, random_state=0), KMeans(2)]
)
@pytest.mark.parametrize("case", SAME_NUMBERS)
def test_the_same_numbers_in_other_clothes(estimator, case, implementation):
    data = SAME_NUMBERS[case](X)
    estimator = clone(estimator).set_params(random_state=0)
    expected, found = clone(estimator).fit(X), clone(estimator).fit(data)
    for name in ("means_", "centroids_"):
        if hasattr(expected, name):
            np.testing.assert_allclose(to_numpy(getattr(found, name)), getattr(expected, name), rtol=1e-9)
    np.testing.assert_array_equal(to_numpy(expected.predict(data)), expected.predict(X))
    np.testing.assert_allclose(to_numpy(expected.score_samples(data)), expected.score_samples(X), rtol=1e-9)
    if hasattr(expected, "partial_fit"):
        step = clone(estimator).partial_fit(data)
        np.testing.assert_allclose(to_numpy(step.means_), clone(estimator).partial_fit(X).means_, rtol=1e-9)


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
