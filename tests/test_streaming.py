"""Rows that come in blocks, from any object that gives them anew in each pass: loaders, data sets, files."""

import itertools
import logging
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from cases import PARAMETER_TOLERANCE, assert_close, blobs
from gaussmix import GaussianMixture, KMeans
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._parameters import SufficientStatistics
from gaussmix.sklearn import GaussianMixture as SklearnMixture
from strategies import floats

pytestmark = pytest.mark.usefixtures("unconverged")

TYPES = st.sampled_from(sorted(COVARIANCES))
STRATEGIES = ("kmeans", "kmeans++", "random", "init_means")
ARRAYS = ("weights_", "means_", "covariances_", "precisions_cholesky_")
# Forms of the E-step on the CPU, the least exact first.
FORMS = ("expanded-float32", "expanded-float64", "centred-float64")


class Blocks:
    """An object that gives the same blocks each time it is iterated over."""

    def __init__(self, blocks):
        self.blocks = blocks

    def __iter__(self):
        return iter(self.blocks)


def in_blocks(x, cuts=(40, 41, 130), library=None):
    """The rows of x, cut before these rows."""
    blocks = np.split(x, sorted(cuts))
    return Blocks(blocks if library is None else [library.asarray(block) for block in blocks])


def fitted(x, k=3, sample_weight=None, cls=GaussianMixture, **params):
    params = {"random_state": 0, "convergence_tolerance": 0, "trainer_params": {"max_epochs": 8}} | params
    return cls(k, **params).fit(x, sample_weight=sample_weight)


def assert_same_fit(found, expected, tolerance):
    for name in ARRAYS:
        assert_close(to_numpy(getattr(found, name)), to_numpy(getattr(expected, name)), tolerance, name)
    assert_close(found.lower_bounds_, expected.lower_bounds_, tolerance, "lower bounds")
    assert found.backend_ == expected.backend_
    assert FORMS.index(found.precision_) >= FORMS.index(expected.precision_)


# Statistics about another origin


@st.composite
def moments(draw):
    """Rows with responsibilities, the textbook's moments of them, and two origins."""
    n, d, k = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    x, r = draw(floats((n, d), -5, 5)), draw(floats((n, k), 0.0625, 1))
    # One for all components, as a shift of the data set, or one for each.
    origins = [draw(floats((k, d) if draw(st.booleans()) else (d,), -5, 5)) for _ in range(2)]
    return oracle.statistics(x, r), origins


def about(origin, counts, means, scatters, covariance):
    """Statistics about `origin` as the textbook has them."""
    offsets = means - origin
    second = scatters + counts[:, None, None] * offsets[:, :, None] * offsets[:, None, :]
    diagonals = np.diagonal(second, axis1=1, axis2=2)
    stored = {"full": second, "tied": second.sum(axis=0), "diag": diagonals, "spherical": diagonals.sum(axis=1)}
    stored["tied_diag"] = diagonals.sum(axis=0)
    return SufficientStatistics(origin, counts, counts[:, None] * offsets, stored[covariance.name], np.asarray(-7.5))


@given(moments())
def test_statistics_move_to_another_origin_and_back(covariance, case):
    textbook, (here, there) = case
    statistics = about(here, *textbook, covariance)
    moved = statistics.about(there, covariance)
    expected = about(there, *textbook, covariance)
    back = moved.about(here, covariance)
    for name in ("counts", "first_moments", "second_moments", "log_likelihood"):
        assert_close(getattr(moved, name), getattr(expected, name), 1e-12, name)
        assert_close(getattr(back, name), getattr(statistics, name), 1e-12, name)
    assert moved.origin is there
    assert statistics.about(here, covariance) is statistics


def test_a_component_without_rows_has_none_about_another_origin(covariance):
    nothing = about(np.zeros(2), np.zeros(1), np.ones((1, 2)), np.zeros((1, 2, 2)), covariance)
    moved = nothing.about(np.full(2, 3.0), covariance)
    assert not moved.counts.any()
    assert not moved.first_moments.any()
    assert not moved.second_moments.any()


# EM


@st.composite
def splits(draw, n):
    """Where to cut n rows, possibly twice in a place, and weights: none, or some rows' and one block's of 0."""
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=12)))
    if draw(st.booleans()):
        return cuts, None
    weight = np.random.RandomState(draw(st.integers(0, 99))).uniform(0.5, 2, size=n)
    weight[:: draw(st.integers(2, 7))] = 0
    bounds = [0, *cuts, n]
    block = draw(st.integers(0, len(cuts)))
    if bounds[block + 1] - bounds[block] < n // 2:
        weight[bounds[block] : bounds[block + 1]] = 0
    return cuts, weight


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=10)
@given(split=splits(211), covariance_type=TYPES)
def test_blocks_give_the_fit_of_the_whole(library, strategy, split, covariance_type):
    # Sorted by cluster: blocks differ as much as they can.
    x = blobs(n=211, d=2, k=3, seed=5, sort=True)
    cuts, weight = split
    params = {"init_means": x[[0, 100, 210]]} if strategy == "init_means" else {"init_strategy": strategy}
    params |= {"covariance_type": covariance_type, "sample_weight": weight}
    found = fitted(in_blocks(x, cuts, library), **params)
    assert_same_fit(found, fitted(library.asarray(x), **params), 1e-10)
    for name in ARRAYS:
        assert library.owns(getattr(found, name))


@settings(max_examples=10)
@given(split=splits(211))
def test_blocks_of_float32(library, covariance, split):
    x = blobs(n=211, d=3, k=3, seed=6, sort=True).astype(np.float32)
    cuts, weight = split
    params = {"covariance_type": covariance.name, "sample_weight": weight}
    found = fitted(in_blocks(x, cuts, library), **params)
    assert_same_fit(found, fitted(library.asarray(x), **params), PARAMETER_TOLERANCE["float32"])
    assert str(found.means_.dtype).endswith("float32")


def test_fitting_blocks_until_convergence(covariance):
    x = blobs(n=501, d=2, k=3, seed=7)
    params = dict(covariance_type=covariance.name, convergence_tolerance=1e-4, trainer_params=None)
    found, expected = fitted(in_blocks(x), **params), fitted(x, **params)
    assert_same_fit(found, expected, 1e-10)
    assert found.num_iter_ == expected.num_iter_
    assert found.converged_
    assert found.nll_ == pytest.approx(expected.nll_, rel=1e-10)
    assert found.n_features_in_ == 2


def test_the_form_of_the_e_step_changes_on_the_way(covariance, dtype, caplog):
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.normal(size=(150, 3)) * [1, 2, 0.5] + centre for centre in (0, 1e4, 3e4)]).astype(dtype)
    # Components start as wide as the data is, where its features are exact enough, and end 1e4 times narrower.
    params = dict(covariance_type=covariance.name, init_means=x[:3] + 1e4, trainer_params={"max_epochs": 30})
    with caplog.at_level(logging.INFO, logger="gaussmix"):
        found = fitted(in_blocks(x, (40, 150, 151, 400)), **params)
    assert any(" left for " in message for message in caplog.messages) or found.backend_ != "numpy"
    expected = fitted(x, **params)
    assert FORMS.index(found.precision_) >= FORMS.index(expected.precision_) > 0
    for name in (*ARRAYS, "nll_"):
        assert_close(getattr(found, name), getattr(expected, name), PARAMETER_TOLERANCE[dtype], name)


def test_blocks_of_separated_components_are_pruned():
    x = blobs(n=2000, d=48, k=8, seed=1, spread=60)
    params = {"covariance_type": "full", "k": 8}
    found = fitted(in_blocks(x, (300, 1000)), **params)
    assert_same_fit(found, fitted(x, **params), 1e-10)
    assert found.precision_ == "centred-float64"


def test_blocks_for_the_estimator_of_scikit_learn(covariance):
    x = blobs(n=333, d=3, k=3, seed=2)
    unfitted = SklearnMixture(3, covariance_type=covariance.name, random_state=0)
    found, expected = (unfitted.clone().fit(data) for data in (in_blocks(x), x))
    for name in (*ARRAYS, "precisions_"):
        assert_close(getattr(found, name), getattr(expected, name), 1e-10, name)
    for method in ("predict", "predict_proba", "score_samples", "score", "aic", "bic"):
        assert_close(getattr(found, method)(in_blocks(x)), getattr(expected, method)(x), 1e-9, method)


def test_predictions_come_in_the_order_of_the_rows(library, covariance, dtype):
    x = blobs(n=301, d=3, k=3, seed=3)
    mixture = fitted(x, covariance_type=covariance.name)
    sigmas = oracle.matrices(mixture.covariances_, covariance.name, 3, 3)
    rows = x.astype(dtype)
    joint, evidence = oracle.evidence(rows, mixture.weights_, mixture.means_, sigmas)
    blocks = in_blocks(rows, (1, 1, 90, 300), library)
    tolerance = 1e-9 if dtype == "float64" else 1e-4
    proba = np.exp(joint - evidence[:, None])
    for method, expected in (("predict_proba", proba), ("score_samples", -evidence)):
        found = getattr(mixture, method)(blocks)
        assert library.owns(found)
        assert str(found.dtype).endswith(dtype)
        assert_close(to_numpy(found), expected, tolerance, method)
    labels = mixture.predict(blocks)
    assert library.owns(labels)
    assert np.array_equal(to_numpy(labels), joint.argmax(axis=1))
    assert mixture.score(blocks) == pytest.approx(-evidence.mean(), abs=tolerance)
    assert np.array_equal(to_numpy(mixture.fit_predict(blocks)), to_numpy(mixture.predict(library.asarray(rows))))


# k-means


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("init_strategy", ["kmeans++", "random"])
@settings(max_examples=10)
@given(split=splits(211))
def test_kmeans_on_blocks(library, init_strategy, split):
    x = blobs(n=211, d=2, k=4, seed=8, sort=True)
    cuts, weight = split
    blocks, whole = in_blocks(x, cuts, library), library.asarray(x)
    found, expected = (
        KMeans(4, init_strategy=init_strategy, random_state=0).fit(data, sample_weight=weight)
        for data in (blocks, whole)
    )
    assert_close(to_numpy(found.centroids_), to_numpy(expected.centroids_), 1e-12)
    assert_close(found.inertia_, expected.inertia_, 1e-12)
    assert (found.num_iter_, found.converged_) == (expected.num_iter_, expected.converged_)
    for method in ("predict", "transform", "score_samples"):
        values = getattr(found, method)(blocks)
        assert library.owns(values)
        assert_close(to_numpy(values), to_numpy(getattr(expected, method)(whole)), 1e-12, method)
    assert found.score(blocks) == pytest.approx(expected.score(whole), rel=1e-12)


def test_a_score_keeps_no_number_for_each_row():
    class Many:
        def __iter__(self):
            return itertools.repeat(np.random.RandomState(0).normal(size=(20_000, 1)), 300)

    mixture = GaussianMixture(1).fit(np.random.RandomState(1).normal(size=(50, 1)))
    mixture.score(np.zeros((2, 1)))
    tracemalloc.start()
    try:
        found = mixture.score(Many())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == pytest.approx(mixture.score(next(iter(Many()))), rel=1e-12)
    assert peak < 300 * 20_000 * 4


def test_kmeans_of_equal_rows_in_blocks(library):
    # There is no row that an empty cluster could move to.
    clustering = KMeans(3, random_state=0).fit(in_blocks(np.ones((10, 2)), (4,), library))
    assert clustering.inertia_ == 0
    assert np.all(to_numpy(clustering.centroids_) == 1)


def test_an_empty_cluster_moves_to_the_farthest_row_of_all_blocks(library):
    x = np.concatenate([np.zeros((20, 1)), [[100.0]], np.zeros((20, 1)), [[70.0]]])
    clustering = KMeans(3, random_state=0, init_strategy="random", convergence_tolerance=0)
    clustering.fit(in_blocks(x, (5, 21), library))
    assert_close(np.sort(to_numpy(clustering.centroids_)[:, 0]), [0, 70, 100], 1e-12)


# torch


def tensor_blocks(x, size=50):
    """Everything that torch offers to read rows with, by name."""
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

    class RowDataset(Dataset):
        def __getitem__(self, index):
            return x[index]

        def __len__(self):
            return len(x)

    class RowsAndLabels(RowDataset):
        def __getitem__(self, index):
            return x[index].numpy(), index

    class RowStream(IterableDataset):
        def __iter__(self):
            return iter(x)

    class BlockStream(IterableDataset):
        def __iter__(self):
            return iter(torch.split(x, size))

    y = torch.arange(len(x))
    return {
        "loader of tensors": DataLoader(TensorDataset(x), batch_size=size),
        "loader of tensors and labels": DataLoader(TensorDataset(x, y), batch_size=size),
        "loader of rows": DataLoader(RowDataset(), batch_size=size),
        "loader of rows and labels": DataLoader(RowsAndLabels(), batch_size=size),
        "loader of a stream": DataLoader(RowStream(), batch_size=size),
        "loader of blocks": DataLoader(BlockStream(), batch_size=None),
        "tensors": TensorDataset(x, y),
        "rows": RowDataset(),
        "rows and labels": RowsAndLabels(),
        "stream": RowStream(),
        "subset": torch.utils.data.Subset(RowDataset(), range(len(x))),
    }


KINDS = (
    *("loader of tensors", "loader of tensors and labels", "loader of rows", "loader of rows and labels"),
    *("loader of a stream", "loader of blocks", "tensors", "rows", "rows and labels", "stream", "subset"),
)


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture, KMeans])
@pytest.mark.parametrize("kind", KINDS)
def test_loaders_and_data_sets(kind, cls):
    torch = pytest.importorskip("torch")
    x = torch.as_tensor(blobs(n=219, d=3, k=3, seed=4), dtype=torch.float32)  # the last batch is shorter
    data = tensor_blocks(x)[kind]
    found, expected = cls(3, random_state=0).fit(data), cls(3, random_state=0).fit(x)
    for name in ("centroids_",) if cls is KMeans else ARRAYS:
        assert type(getattr(found, name)) is torch.Tensor
        assert getattr(found, name).dtype == torch.float32
        assert_close(getattr(found, name), getattr(expected, name), PARAMETER_TOLERANCE["float32"], name)
    for method in ("predict", "score_samples", "transform" if cls is KMeans else "predict_proba"):
        values = getattr(found, method)(data)
        assert type(values) is torch.Tensor
        assert_close(values, getattr(expected, method)(x), 1e-4, method)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [None, 40])
# Of a machine with one core, and of Python 3.12 where other threads run.
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning", "ignore:.*fork:DeprecationWarning")
def test_workers_and_batches_of_a_data_set(num_workers, batch_size):
    torch = pytest.importorskip("torch")
    x = torch.as_tensor(blobs(n=101, d=2, k=2, seed=4))
    params = dict(num_workers=num_workers, batch_size=batch_size, trainer_params={"max_epochs": 2})
    found = fitted(tensor_blocks(x)["rows"], k=2, **params)
    assert_same_fit(found, fitted(x, k=2, trainer_params={"max_epochs": 2}), 1e-10)
    assert_close(found.predict_proba(tensor_blocks(x)["rows"]), found.predict_proba(x), 1e-9)


def test_weights_of_a_loaders_rows(covariance):
    torch = pytest.importorskip("torch")
    x = torch.as_tensor(blobs(n=219, d=2, k=3, seed=4))
    weight = torch.arange(219) % 3
    params = dict(covariance_type=covariance.name, sample_weight=weight)
    assert_same_fit(fitted(tensor_blocks(x)["loader of tensors"], **params), fitted(x, **params), 1e-10)


# What is refused

X = blobs(n=120, d=2, k=3, seed=9)


def with_nan():
    x = np.zeros((1000, 2))
    x[573, 1] = np.nan  # in block 57 of 100
    return np.split(x, 100)


def raising(number):
    """Blocks, of which the one of this number can not be read."""

    class Broken(Blocks):
        passes = 0

        def __iter__(self):
            self.passes += 1
            for i, block in enumerate(self.blocks):
                if i + 10 * (self.passes - 1) == number:
                    raise OSError(f"block {i} can not be read")
                yield block

    return Broken(np.split(X, 4))


class Shrinking(Blocks):
    """Gives a block less in each pass."""

    def __iter__(self):
        self.blocks = self.blocks[:-1]
        return super().__iter__()


class Growing(Blocks):
    """Gives a block more in each pass."""

    given = 0

    def __iter__(self):
        self.given += 1
        return iter(self.blocks[: self.given])


class Passes:
    """Gives these blocks in the first pass, the next ones in the second, ..., and the last ones ever after."""

    def __init__(self, *passes):
        self.passes, self.given = passes, 0

    def __iter__(self):
        self.given += 1
        return iter(self.passes[min(self.given, len(self.passes)) - 1])


OTHER_ROWS = r"gave other rows in a later pass than in the first one; pass an object that gives the same rows"


REFUSED = {
    "a generator": (lambda: (x for x in np.split(X, 4)), ValueError, r"X is a generator.*only once; pass an object"),
    "an exhausted iterator": (lambda: iter([]), ValueError, r"X is a list_iterator.*only once; pass an object"),
    "a map": (lambda: map(np.asarray, np.split(X, 4)), ValueError, r"X is a map.*only once; pass an object"),
    "no blocks": (lambda: Blocks([]), ValueError, r"the data gave no blocks"),
    "no rows": (lambda: Blocks([X[:0]]), ValueError, r"Found array with 0 sample\(s\)"),
    "no features": (lambda: Blocks([X[:, :0], X[:, :0]]), ValueError, r"Found array with 0 feature\(s\)"),
    "fewer later": (lambda: Shrinking(np.split(X, 4)), ValueError, r"90 rows in the first pass and 60 in a later one"),
    "more later": (lambda: Growing([X, X]), ValueError, r"120 rows in the first pass and 240 in a later one"),
    "widths": (lambda: Blocks([X, X[:, :1]]), ValueError, r"block 1 \(after row 120\) is a ndarray with 1 features"),
    "widths later": (
        lambda: Passes([X, X], [X, X[:, :1]]),
        ValueError,
        r"block 1 \(after row 120\) is a ndarray with 1 features, the first one a ndarray with 2",
    ),
    "one dimension later": (lambda: Passes([X, X], [X, X[:, 0]]), ValueError, r"Expected 2D array, got 1D array"),
    "NaN later": (lambda: Passes([X], [np.where(X[57, 1] == X, np.nan, X)]), ValueError, OTHER_ROWS),
    "infinity later": (
        lambda: Passes([X.astype(np.float32)], [np.where(X[57, 1] == X, 1e200, X)]),
        ValueError,
        OTHER_ROWS,
    ),
    "objects": (lambda: Blocks([X.astype(object)]), ValueError, r"X has dtype object"),
    "strings": (lambda: Blocks([X.astype(str)]), ValueError, r"X has dtype <U\d+"),
    "text": (lambda: Blocks(["1 2", "3 4"]), TypeError, r"gives blocks of type str"),
    "dicts": (
        lambda: Blocks([{"x": X}]),
        TypeError,
        r"gives blocks of type dict; pass an object that gives 2-d arrays",
    ),
    "lists": (lambda: Blocks([X.tolist()]), TypeError, r"gives blocks of type list"),
    "rows": (lambda: Blocks(list(X)), ValueError, r"Expected 2D array, got 1D array of shape \(2,\)"),
    "complex": (lambda: Blocks([X * 1j]), ValueError, r"Complex data not supported"),
    "NaN": (lambda: Blocks(with_nan()), ValueError, r"contains NaN \(first in row 573\)"),
    "infinity": (lambda: Blocks([X, X + np.inf]), ValueError, r"contains infinity \(first in row 120\)"),
    "too large": (
        lambda: Blocks([X.astype(np.float32), 1e50 * X]),
        ValueError,
        r"contains infinity \(first in row 120\)",
    ),
    "unreadable": (lambda: raising(2), OSError, r"^block 2 can not be read$"),
    "unreadable later": (lambda: raising(12), OSError, r"^block 2 can not be read$"),
    "too few rows": (
        lambda: Blocks([X[:1], X[:1]]),
        ValueError,
        r"n_samples >= num_\w+ but got num_\w+ = 3, n_samples = 2",
    ),
}


@pytest.mark.parametrize("estimator", [GaussianMixture(3), KMeans(3)])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(estimator, case):
    data, error, message = REFUSED[case]
    estimator = estimator.clone()
    with pytest.raises(error, match=message):
        estimator.fit(data())
    assert not {"means_", "centroids_", "converged_"} & vars(estimator).keys()


@pytest.mark.parametrize("estimator", [GaussianMixture(3), KMeans(3)])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.ones(50), r"shape \(50,\), and the data more rows; pass one weight for each row"),
        (np.ones(119), r"shape \(119,\), and the data more rows"),
        (np.ones(121), r"shape \(121,\); pass one weight for each of the 120 rows"),
        (np.ones((120, 1)), r"shape \(120, 1\); pass one weight for each row"),
        (2.0, r"shape \(\); pass one weight for each row"),
        (np.zeros(120), r"zero for every row"),
        (-np.ones(120), r"negative value, -1"),
        (np.arange(120) < 2, r"n_samples >= num_\w+ but got num_\w+ = 3, n_samples = 2"),
    ],
)
def test_weights_that_are_refused(library, estimator, weight, message):
    with pytest.raises(ValueError, match=message):
        estimator.clone().fit(in_blocks(X, (40, 80), library), sample_weight=weight)


@pytest.mark.parametrize("estimator", [GaussianMixture(2), KMeans(2)])
def test_predictions_that_are_refused(estimator):
    estimator = estimator.clone().fit(X)
    with pytest.raises(ValueError, match="X has 1 features, but .* is expecting 2 features"):
        estimator.predict(in_blocks(X[:, :1]))
    with pytest.raises(ValueError, match="an iterator, which can be gone through only once"):
        estimator.predict(iter(np.split(X, 4)))


# Rows that differ between passes


def changed(x, how, seed):
    """The rows x (n, d) as another pass might give them."""
    rng = np.random.RandomState(seed)
    if how == "new rows":
        return rng.normal(size=x.shape)
    if how == "noise":
        return x + 1e-9 * rng.normal(size=x.shape)
    if how == "signs":  # of whole rows: of each, an even number of values changes
        return x * rng.choice([-1.0, 1.0], size=(len(x), 1))
    if how == "a bootstrap":
        return x[rng.randint(len(x), size=len(x))]
    if how == "columns":  # each in an order of its own
        return np.stack([rng.permutation(column) for column in x.T], axis=1)
    if how == "mirrored":
        return x[:, ::-1]
    x = x.copy()
    x[rng.randint(len(x)), 1] = rng.normal() if how == "a value" else np.nan
    return x


CHANGES = ("new rows", "noise", "signs", "a bootstrap", "columns", "mirrored", "a value", "NaN")


class Changing:
    """The rows x in every pass but those from the `since`-th on, each of which changes them anew."""

    def __init__(self, x, how, since, library):
        self.x, self.how, self.since, self.library, self.given = x, how, since, library, 0

    def __iter__(self):
        self.given += 1
        x = self.x if self.given < self.since else changed(self.x, self.how, self.given).astype(self.x.dtype)
        return iter(in_blocks(x, (40, 80), self.library))


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture, KMeans])
@pytest.mark.parametrize("how", CHANGES)
def test_rows_that_differ_between_passes(library, cls, how):
    estimator = cls(3, random_state=0)
    for since in (2, 3, 5):
        with pytest.raises(ValueError, match=OTHER_ROWS):
            estimator.fit(Changing(X, how, since, library), sample_weight=None if since < 5 else np.arange(120.0))
    assert not {"means_", "centroids_", "converged_"} & vars(estimator).keys()
    estimator.fit(library.asarray(X))
    for method in ("predict", "score_samples", "score", "transform" if cls is KMeans else "predict_proba"):
        with pytest.raises(ValueError, match=OTHER_ROWS):
            getattr(estimator, method)(Changing(X, how, 2, library))


def test_steps_on_rows_that_differ_between_passes():
    mixture = GaussianMixture(3, random_state=0).partial_fit(X)
    before = mixture.means_
    with pytest.raises(ValueError, match=OTHER_ROWS):
        mixture.partial_fit(Changing(X, "new rows", 2, None))
    assert mixture.means_ is before
    assert mixture.n_steps_ == 1


class Shuffled:
    """The rows in another order and in other blocks in each pass."""

    def __init__(self, x, library):
        self.x, self.library, self.rng, self.given = x, library, np.random.RandomState(0), 0

    def __iter__(self):
        self.given += 1
        cuts = self.rng.randint(len(self.x), size=self.given)
        return iter(in_blocks(self.rng.permutation(self.x), cuts, self.library))


@pytest.mark.parametrize("spread", [3, 60])  # without and with pruning, which knows blocks by their numbers
def test_neither_order_nor_blocks_need_be_the_same(library, covariance, dtype, spread):
    x = blobs(n=400, d=3, k=8, seed=5, spread=spread).astype(dtype)
    params = dict(k=8, covariance_type=covariance.name, init_means=x[:8], covariance_regularization=1e-3)
    found, expected = fitted(Shuffled(x, library), **params), fitted(library.asarray(x), **params)
    assert_same_fit(found, expected, PARAMETER_TOLERANCE[dtype])


class Recut(Shuffled):
    """The rows in order, in other blocks in each pass."""

    def __iter__(self):
        self.given += 1
        return iter(in_blocks(self.x, self.rng.randint(len(self.x), size=self.given), self.library))


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture, KMeans])
def test_weights_need_the_same_order_but_not_the_same_blocks(library, cls):
    weight = np.random.RandomState(0).uniform(0.5, 2, size=len(X)) * (np.arange(len(X)) % 5 > 0)
    found, expected = (
        cls(3, random_state=0).fit(data, sample_weight=weight) for data in (Recut(X, library), library.asarray(X))
    )
    name = "centroids_" if cls is KMeans else "means_"
    assert_close(to_numpy(getattr(found, name)), to_numpy(getattr(expected, name)), 1e-9)
    with pytest.raises(
        ValueError, match=r"other rows in a later.*the same rows in the same order, which sample_weight"
    ):
        cls(3, random_state=0).fit(Shuffled(X, library), sample_weight=weight)


@pytest.mark.parametrize("cls", [GaussianMixture, SklearnMixture, KMeans])
def test_a_loader_in_random_order_takes_no_weights(cls):
    torch = pytest.importorskip("torch")
    from torch.utils import data

    rows = data.TensorDataset(torch.as_tensor(X))
    n, sampled = len(rows), data.BatchSampler
    distributed = data.DistributedSampler(rows, num_replicas=1, rank=0)
    samplers = (data.RandomSampler(rows), data.SubsetRandomSampler(range(n)), data.WeightedRandomSampler([1.0] * n, n))
    loaders = [data.DataLoader(rows, batch_size=50, shuffle=True)]
    for sampler in (*samplers, distributed):
        loaders += [data.DataLoader(rows, batch_size=50, sampler=sampler)]
        loaders += [data.DataLoader(rows, batch_sampler=sampled(sampler, 50, False))]
    for loader in loaders:
        drawn = []
        loader.collate_fn = drawn.append
        with pytest.raises(ValueError, match=r"draws its rows by a \w+Sampler, and sample_weight .* shuffle=False"):
            cls(3, random_state=0).fit(loader, sample_weight=np.ones(n))
        assert not drawn
    in_order = data.DistributedSampler(rows, num_replicas=1, rank=0, shuffle=False)
    for loader in (data.DataLoader(rows, batch_size=50), data.DataLoader(rows, batch_size=50, sampler=in_order)):
        cls(3, random_state=0).fit(loader, sample_weight=np.arange(n))


def test_a_loader_in_random_order_gives_the_fit_of_its_rows():
    torch = pytest.importorskip("torch")
    from torch.utils import data

    x = torch.as_tensor(X)
    params = dict(init_means=X[:3])
    loader = data.DataLoader(data.TensorDataset(x), batch_size=50, shuffle=True)
    assert_same_fit(fitted(loader, **params), fitted(x, **params), 1e-10)
    sampler = data.RandomSampler(x, replacement=True)
    with pytest.raises(ValueError, match=f"{OTHER_ROWS}.*without random augmentation and sampling"):
        fitted(data.DataLoader(data.TensorDataset(x), batch_size=50, sampler=sampler), **params)


def test_blocks_take_the_dtype_of_the_first(library):
    x = np.round(X)
    blocks = Blocks([library.asarray(x[:50], np.int32), library.asarray(x[50:])])
    assert_same_fit(fitted(blocks), fitted(library.asarray(x)), 1e-10)
    single = Blocks([library.asarray(x[:50], np.float32), library.asarray(x[50:])])
    assert str(fitted(single).means_.dtype).endswith("float32")


# Memory


@pytest.mark.parametrize("estimator", [GaussianMixture(2, trainer_params={"max_epochs": 1}), KMeans(2)])
def test_only_a_few_blocks_are_in_memory(estimator):
    class Generated(Blocks):
        """A million rows, 200 MB."""

        def __iter__(self):
            block = np.random.RandomState(0).normal(size=(10_000, 25))
            return (block + number % 2 for number in range(100))

    estimator = estimator.clone().set_params(random_state=0)
    tracemalloc.start()
    try:
        estimator.fit(Generated([]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6
