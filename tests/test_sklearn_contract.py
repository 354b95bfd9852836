"""What `sklearn.mixture.GaussianMixture` promises, name by name: `CONTRACT` has a test for each of them.

Expected values come from scikit-learn itself or from `oracle.py`.
"""

import copy
import inspect
import re
import warnings
from functools import cache

import numpy as np
import pytest
import sklearn
from sklearn.base import clone as sklearns_clone
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import BayesianGaussianMixture
from sklearn.mixture import GaussianMixture as Reference
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils._param_validation import InvalidParameterError

import oracle
from cases import PARAMETER_TOLERANCE, assert_close, blobs, start_for
from gaussmix._arrays import to_numpy
from gaussmix.sklearn import GaussianMixture

X = blobs(n=240, d=3, k=3, seed=1)
ARRAYS = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_")
INIT_PARAMS = ("kmeans", "k-means++", "random", "random_from_data")


@pytest.fixture
def covariance(covariance):
    if covariance.sklearn_name != covariance.name:
        pytest.skip("scikit-learn has no such covariance type")
    return covariance


def fitted(x=X, n_components=3, **settings):
    """Our mixture and scikit-learn's, fitted alike."""
    settings = dict(random_state=0, tol=1e-5, max_iter=500) | settings
    return tuple(cls(n_components, **copy.deepcopy(settings)).fit(x) for cls in (GaussianMixture, Reference))


def assert_same(ours, theirs, tolerance=1e-9):
    for name in ARRAYS:
        assert_close(getattr(ours, name), getattr(theirs, name), tolerance, name)
    assert ours.lower_bound_ == pytest.approx(theirs.lower_bound_, abs=tolerance)


def both(call):
    """What `call` raises for our class, after having raised the same for scikit-learn's."""
    with pytest.raises(Exception) as expected:
        call(Reference)
    with pytest.raises(expected.type) as found:
        call(GaussianMixture)
    return str(found.value), str(expected.value)


def assert_refused(x=X, **settings):
    """Both refuse these parameters, with the same words where words have an order."""
    found, expected = both(lambda cls: cls(**settings).fit(x))
    assert issubclass(InvalidParameterError, (ValueError, TypeError))
    with pytest.raises(InvalidParameterError):
        GaussianMixture(**settings).fit(x)
    assert re.sub(r"\{.*\}", "", found) == re.sub(r"\{.*\}", "", expected)


def assert_starts_with_theirs(found, expected):
    """Scikit-learn's words first, then what is to be done."""
    assert found.startswith(expected.rstrip("."))
    assert len(found) > len(expected) + 10


# Parameters


def test_n_components():
    for k in (1, 2, np.int64(5)):
        ours, theirs = fitted(n_components=k)
        assert_same(ours, theirs)
        assert ours.n_iter_ == theirs.n_iter_
    for bad in (0, -1, 2.0, "2", None):
        assert_refused(n_components=bad)
    assert_starts_with_theirs(*both(lambda cls: cls(7).fit(X[:5])))


def test_covariance_type(covariance):
    assert_same(*fitted(covariance_type=covariance.name))
    assert GaussianMixture().covariance_type == Reference().covariance_type == "full"
    assert_refused(covariance_type="round")


def test_tol(unconverged):
    iterations = []
    for tol in (0, 1e-7, 1e-4, 1e-1):
        ours, theirs = fitted(tol=tol, max_iter=60, init_params="random")
        assert (ours.n_iter_, ours.converged_) == (theirs.n_iter_, theirs.converged_)
        iterations.append(ours.n_iter_)
    assert iterations[0] == 60
    assert iterations == sorted(iterations, reverse=True)
    assert len(set(iterations)) > 2
    for bad in (-1e-9, np.nan, np.inf, "small", None):
        assert_refused(tol=bad)


def test_reg_covar(covariance):
    for reg_covar in (0, 1e-6, 0.5):
        assert_same(*fitted(covariance_type=covariance.name, reg_covar=reg_covar))
    for bad in (-1e-9, np.nan, np.inf, "small"):
        assert_refused(reg_covar=bad)
    collapsed = np.repeat([[0.0, 0.0], [1.0, 1.0]], 5, axis=0)
    found, expected = both(lambda cls: cls(2, covariance_type=covariance.name, reg_covar=0).fit(collapsed))
    assert_starts_with_theirs(found, expected)
    assert "Cause: the covariance" in found


@pytest.mark.parametrize("init_params", INIT_PARAMS)
def test_max_iter(init_params, covariance):
    settings = dict(init_params=init_params, covariance_type=covariance.name, random_state=0)
    # 0 shows where EM starts, silently.
    ours, theirs = (cls(3, max_iter=0, **settings).fit(X) for cls in (GaussianMixture, Reference))
    assert_close(ours.means_, theirs.means_, 1e-9)
    for name in ("n_iter_", "lower_bound_", "lower_bounds_", "converged_"):
        assert getattr(ours, name) == getattr(theirs, name), name
    messages = []
    for cls in (GaussianMixture, Reference):
        with pytest.warns(ConvergenceWarning) as caught:
            assert cls(3, max_iter=1, **settings).fit(X).n_iter_ == 1
        messages.append(str(caught[0].message))
    assert_starts_with_theirs(*messages)
    for bad in (-1, 1.5, None):
        assert_refused(max_iter=bad)


@pytest.mark.parametrize("init_params", ["kmeans", "random"])
def test_n_init(init_params):
    settings = dict(init_params=init_params, covariance_type="diag")
    assert_same(*fitted(n_init=4, **settings))
    single, _ = fitted(n_init=1, **settings)
    best, _ = fitted(n_init=4, **settings)
    assert best.lower_bound_ >= single.lower_bound_
    for bad in (0, 1.0, None):
        assert_refused(n_init=bad)


@pytest.mark.parametrize("init_params", INIT_PARAMS)
def test_init_params(init_params, covariance):
    ours, theirs = fitted(init_params=init_params, covariance_type=covariance.name)
    if init_params in ("kmeans", "random"):
        assert_same(ours, theirs)
        assert ours.n_iter_ == theirs.n_iter_
    elif covariance.shape(3, 3) != (3, 3) or covariance.name != "tied":
        # scikit-learn starts from covariances of reg_covar, so that its first iteration assigns each row to the nearest
        # seed, which is where we start. Its tied covariance is wrong there: it has the second moments of all rows, and
        # the means of k.
        assert_same(ours, theirs)
        assert ours.n_iter_ == theirs.n_iter_ - 1
        assert_close(ours.lower_bounds_, theirs.lower_bounds_[1:], 1e-9)
    else:
        assert ours.lower_bound_ >= theirs.lower_bound_ - 1e-9
    assert_refused(init_params="kmeans++")


def test_weights_init(library, covariance):
    weights = np.array([0.2, 0.5, 0.3])
    assert_same(*fitted(weights_init=weights, init_params="random", covariance_type=covariance.name))
    started = GaussianMixture(3, max_iter=0, weights_init=library.asarray(weights)).fit(library.asarray(X))
    assert to_numpy(started.weights_).tolist() == weights.tolist()
    for bad in ([[0.5], [0.5]], [0.5], [0.6, 0.6], [np.nan, 1.0]):
        assert_starts_with_theirs(*both(lambda cls, bad=bad: cls(2, weights_init=bad).fit(X)))
    # scikit-learn has the largest and the smallest value exchanged.
    found, expected = both(lambda cls: cls(2, weights_init=[-0.5, 1.5]).fit(X))
    assert found.startswith(expected.partition("max value")[0])
    assert "max value 1.50000, min value -0.50000" in found
    assert_refused(weights_init=0.5)


def test_means_init(library, covariance):
    means = X[:3]
    assert_same(*fitted(means_init=means, init_params="random", covariance_type=covariance.name))
    started = GaussianMixture(3, covariance_type=covariance.name, max_iter=0, means_init=library.asarray(means))
    started.fit(library.asarray(X))
    assert to_numpy(started.means_).tolist() == means.tolist()
    # Weights and covariances are those of the rows nearest to each mean.
    nearest = np.eye(3)[np.argmin(((X[:, None] - means) ** 2).sum(axis=2), axis=1)]
    weights, _, covariances = oracle.maximize(*oracle.statistics(X, nearest), covariance.name, 1e-6)
    assert_close(to_numpy(started.weights_), weights, 1e-12)
    assert_close(to_numpy(started.covariances_), covariances, 1e-9)
    for bad in (np.zeros((2, 2)), np.zeros(3), np.full((2, 3), np.nan)):
        assert_starts_with_theirs(*both(lambda cls, bad=bad: cls(2, means_init=bad).fit(X)))
    assert_refused(means_init="zeros")


def test_precisions_init(library, covariance):
    shape = covariance.shape(3, 3)
    is_matrix = covariance.shape(1, 2)[-2:] == (2, 2)
    scale = np.eye(3) if is_matrix else 1.0
    precisions = np.broadcast_to(0.25 * scale, shape).copy()
    settings = dict(covariance_type=covariance.name)
    assert_same(*fitted(precisions_init=precisions, init_params="random", **settings))
    started = GaussianMixture(3, max_iter=0, precisions_init=library.asarray(precisions), **settings)
    started.fit(library.asarray(X))
    assert_close(to_numpy(started.precisions_), precisions, 1e-12)
    assert_close(to_numpy(started.covariances_), np.broadcast_to(4 * scale, shape), 1e-12)
    bad_values = [precisions[..., None], -precisions, 0 * precisions, np.full(shape, np.nan)]
    if is_matrix:
        bad_values.append(precisions + np.triu(np.ones((3, 3)), 1))
    for bad in bad_values[1:]:
        assert_starts_with_theirs(*both(lambda cls, bad=bad: cls(3, precisions_init=bad, **settings).fit(X)))
    found, expected = both(lambda cls: cls(3, precisions_init=np.ones((1, 1)), **settings).fit(X))
    assert_starts_with_theirs(found, expected)
    # The rounding of an inverse is no asymmetry.
    rounding = 1 + 1e-6 * np.triu(np.ones((3, 3)), 1) if is_matrix else 1.0
    assert_same(*fitted(precisions_init=(precisions + 0.1) * rounding, init_params="random", **settings), 1e-5)


@pytest.mark.parametrize("init_params", ["kmeans", "random"])
def test_random_state(init_params):
    one, again = (fitted(init_params=init_params, random_state=3)[0] for _ in range(2))
    assert np.array_equal(one.means_, again.means_)
    # A generator goes on from fit to fit, as in scikit-learn.
    ours, theirs = np.random.RandomState(5), np.random.RandomState(5)
    for _ in range(3):
        settings = dict(init_params=init_params, covariance_type="diag", tol=1e-6, max_iter=500)
        assert_same(
            GaussianMixture(3, random_state=ours, **settings).fit(X),
            Reference(3, random_state=theirs, **settings).fit(X),
        )
    unseeded = [GaussianMixture(5, init_params="random", max_iter=0).fit(X).means_ for _ in range(2)]
    assert not np.array_equal(*unseeded)
    for bad in ("seed", 1.5, -1):
        assert_refused(random_state=bad)


def test_warm_start(covariance, unconverged):
    settings = dict(covariance_type=covariance.name, warm_start=True, tol=1e-4, random_state=0, init_params="random")
    ours, theirs = GaussianMixture(3, **settings), Reference(3, **settings)
    for max_iter in (1, 2, 0, 3, 500):
        ours.set_params(max_iter=max_iter).fit(X)
        theirs.set_params(max_iter=max_iter).fit(X)
        for name in ARRAYS:
            assert_close(getattr(ours, name), getattr(theirs, name), 1e-9, name)
        assert (ours.n_iter_, ours.converged_) == (theirs.n_iter_, theirs.converged_)
        assert_close(ours.lower_bounds_, theirs.lower_bounds_, 1e-9)
    assert ours.converged_
    assert ours.fit(X).n_iter_ == 1
    assert_refused(warm_start="yes")


def printed(capsys, cls, **settings):
    """What a fit prints, with its times replaced."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture = cls(3, random_state=0, init_params="random", **settings)
        for _ in range(2):
            mixture.fit(X)
    return re.sub(r"time lapse \d+\.\d{5}s", "time lapse T", capsys.readouterr().out)


@pytest.mark.parametrize(
    "settings", [dict(n_init=2, max_iter=12), dict(max_iter=3), dict(max_iter=0), dict(warm_start=True)]
)
def test_verbose(capsys, settings):
    assert printed(capsys, GaussianMixture, verbose=0, **settings) == ""
    for verbose in (1, True, 2, 3):
        ours, theirs = (printed(capsys, cls, verbose=verbose, **settings) for cls in (GaussianMixture, Reference))
        assert ours == theirs
        assert "Initialization 0" in ours
        assert ("ll change" in ours) == (verbose > 1 and settings.get("max_iter", 100) >= 10)
    for bad in (-1, "yes"):
        assert_refused(verbose=bad)


@pytest.mark.parametrize("interval", [1, 3])
def test_verbose_interval(capsys, interval):
    ours, theirs = (printed(capsys, cls, verbose=2, verbose_interval=interval) for cls in (GaussianMixture, Reference))
    assert ours == theirs
    assert f"Iteration {interval}\t time lapse T\t ll change" in ours
    for bad in (0, 2.5):
        assert_refused(verbose_interval=bad)


# Methods


@cache
def reference(covariance_type, dtype="float64"):
    """scikit-learn's fit in float64 to rows that were rounded to this dtype; not to be changed."""
    return Reference(3, covariance_type=covariance_type, random_state=0).fit(X.astype(dtype).astype(np.float64))


@pytest.fixture
def pair(covariance):
    """A fit of scikit-learn's, and the same one as ours."""
    theirs = copy.deepcopy(reference(covariance.name))
    return GaussianMixture.from_sklearn(theirs), theirs


def test_aic(library, pair):
    ours, theirs = pair
    value = ours.aic(library.asarray(X))
    assert isinstance(value, float)
    assert value == pytest.approx(theirs.aic(X), rel=1e-12)


def test_bic(library, pair):
    ours, theirs = pair
    value = ours.bic(library.asarray(X))
    assert isinstance(value, float)
    assert value == pytest.approx(theirs.bic(X), rel=1e-12)


def test_fit(covariance, dtype):
    x = X.astype(dtype)
    settings = dict(covariance_type=covariance.name, random_state=0)
    ours = GaussianMixture(3, **settings)
    assert ours.fit(x, None) is ours
    # Where they differ in float32, it is scikit-learn that lost digits.
    assert_same(ours, reference(covariance.name, dtype), PARAMETER_TOLERANCE[dtype])
    # A weight is a number of equal rows.
    weight = np.random.RandomState(0).randint(4, size=len(X))
    start = start_for(X, 3, covariance.name)
    settings = dict(covariance_type=covariance.name, tol=1e-6, max_iter=500, **start)
    repeated = Reference(3, **settings).fit(np.repeat(X, weight, axis=0))
    assert_same(GaussianMixture(3, **settings).fit(X, sample_weight=weight), repeated)


def test_fit_predict(library, covariance):
    settings = dict(covariance_type=covariance.name, random_state=0)
    ours = GaussianMixture(3, **settings)
    labels = ours.fit_predict(library.asarray(X))
    assert library.owns(labels)
    expected = Reference(3, **settings).fit_predict(X)
    assert to_numpy(labels).dtype == expected.dtype
    assert np.array_equal(to_numpy(labels), expected)
    assert np.array_equal(to_numpy(ours.predict(library.asarray(X))), expected)


def test_get_metadata_routing():
    assert GaussianMixture().get_metadata_routing().fit.requests == {"sample_weight": None}
    with sklearn.config_context(enable_metadata_routing=True):
        routed = GaussianMixture().set_fit_request(sample_weight="mass")
        assert routed.get_metadata_routing().fit.requests == {"sample_weight": "mass"}
        # A fit is all that takes weights.
        assert routed.get_metadata_routing().score.requests == Reference().get_metadata_routing().score.requests == {}


def test_set_fit_request():
    weight = np.arange(len(X)) % 3
    with sklearn.config_context(enable_metadata_routing=True):
        mixture = GaussianMixture(3, random_state=0, **start_for(X, 3, "full")).set_fit_request(sample_weight=True)
        # The scaler takes weights too; here it is not to have them.
        pipeline = Pipeline([("scaler", StandardScaler().set_fit_request(sample_weight=False)), ("mixture", mixture)])
        pipeline.fit(X, sample_weight=weight)
        labels = sklearns_clone(pipeline).fit_predict(X, sample_weight=weight)
        unrouted = make_pipeline(StandardScaler(), GaussianMixture(3))
        with pytest.raises(ValueError, match="sample_weight"):
            unrouted.fit(X, sample_weight=weight)
    scaled = StandardScaler().fit_transform(X)
    expected = Reference(3, random_state=0, **start_for(X, 3, "full")).fit(np.repeat(scaled, weight, axis=0))
    assert_same(pipeline["mixture"], expected)
    assert np.array_equal(labels, expected.predict(scaled))


def test_get_params():
    assert GaussianMixture().get_params() == Reference().get_params()
    settings = dict(n_components=4, tol=0.1, means_init=X[:4], random_state=np.random.RandomState(0))
    assert GaussianMixture(**settings).get_params() == Reference(**settings).get_params()


def test_set_params():
    mixture = GaussianMixture()
    assert mixture.set_params(n_components=3, tol=1e-5, max_iter=500, random_state=0) is mixture
    assert_same(mixture.fit(X), fitted()[1])
    found, expected = both(lambda cls: cls().set_params(num_components=2))
    assert found == expected


def test_predict(library, pair):
    ours, theirs = pair
    labels = ours.predict(library.asarray(X))
    assert library.owns(labels)
    assert to_numpy(labels).dtype == theirs.predict(X).dtype
    assert np.array_equal(to_numpy(labels), theirs.predict(X))
    assert_refuses_alike("predict", pair)


def test_predict_proba(library, pair, dtype):
    ours, theirs = pair
    proba = ours.predict_proba(library.asarray(X, dtype))
    assert library.owns(proba)
    assert to_numpy(proba).dtype == dtype
    assert_close(to_numpy(proba), theirs.predict_proba(X), 1e-9 if dtype == "float64" else 1e-4)
    assert_refuses_alike("predict_proba", pair)


def test_score_samples(library, pair, dtype):
    ours, theirs = pair
    found = ours.score_samples(library.asarray(X, dtype))
    assert library.owns(found)
    assert to_numpy(found).dtype == dtype
    assert_close(to_numpy(found), theirs.score_samples(X), 1e-9 if dtype == "float64" else 1e-4)
    assert_refuses_alike("score_samples", pair)


def test_score(library, pair, dtype):
    ours, theirs = pair
    found = ours.score(library.asarray(X, dtype), np.zeros(len(X)))
    assert isinstance(found, float)
    assert found == pytest.approx(theirs.score(X), abs=1e-9 if dtype == "float64" else 1e-5)
    assert_refuses_alike("score", pair)


def assert_refuses_alike(method, pair):
    """Both refuse to predict before a fit, and for another number of features."""
    found, expected = both(lambda cls: getattr(cls(), method)(X))
    assert found == expected
    mixtures = {type(mixture): mixture for mixture in pair}
    found, expected = both(lambda cls: getattr(mixtures[cls], method)(X[:, :2]))
    assert found == expected


def test_sample(library, covariance, dtype):
    theirs = copy.deepcopy(reference(covariance.name))
    theirs.weights_ = np.array([0.2, 0.45, 0.35])
    for name in ARRAYS:
        setattr(theirs, name, getattr(theirs, name).astype(dtype))
    ours = GaussianMixture(3, covariance_type=covariance.name, random_state=0)
    for name in ARRAYS:
        setattr(ours, name, library.asarray(getattr(theirs, name)))
    for n in (1, np.int64(7), 500):
        rows, labels = ours.sample(n)
        expected_rows, expected_labels = theirs.sample(n)
        assert library.owns(rows)
        assert library.owns(labels)
        assert to_numpy(labels).dtype == np.int64
        assert to_numpy(rows).dtype == np.float64
        assert np.array_equal(to_numpy(labels), expected_labels)
        assert np.array_equal(to_numpy(rows), expected_rows)
    found, expected = both(lambda cls: cls(3).sample(1))
    assert found == expected
    mixtures = {type(mixture): mixture for mixture in (ours, theirs)}
    found, expected = both(lambda cls: mixtures[cls].sample(0))
    # scikit-learn prints the number of components where it means that of the rows.
    assert found == expected.replace("'n_samples': 3", "'n_samples': 0")
    # A generator goes on from call to call, after the fit.
    generators = [np.random.RandomState(1), np.random.RandomState(1)]
    for mixture, generator in zip((ours, theirs), generators, strict=True):
        mixture.set_params(random_state=generator)
    for _ in range(2):
        assert np.array_equal(to_numpy(ours.sample(20)[1]), theirs.sample(20)[1])
    assert generators[0].random_sample() == generators[1].random_sample()


# Methods that scikit-learn's class does not have


def test_from_parameters(library, pair):
    _, theirs = pair
    ours = GaussianMixture.from_parameters(
        *(library.asarray(getattr(theirs, name)) for name in ("weights_", "means_", "covariances_")),
        covariance_type=theirs.covariance_type,
    )
    assert_close(to_numpy(ours.precisions_cholesky_), theirs.precisions_cholesky_, 1e-9)
    assert_close(to_numpy(ours.predict_proba(library.asarray(X))), theirs.predict_proba(X), 1e-9)


SETTINGS = dict(
    n_components=3,
    tol=1e-4,
    reg_covar=1e-5,
    max_iter=300,
    n_init=2,
    init_params="random",
    random_state=4,
    verbose_interval=5,
)


def test_to_sklearn(library, covariance, dtype):
    pandas = pytest.importorskip("pandas")
    settings = SETTINGS | {"covariance_type": covariance.name}
    x = library.asarray(X, dtype)
    ours = GaussianMixture(**settings, means_init=library.asarray(X[:3])).fit(x)
    converted = ours.to_sklearn()
    assert type(converted) is Reference
    assert converted.get_params() | {"means_init": None} == Reference(**settings).get_params()
    assert isinstance(converted.means_init, np.ndarray)
    expected = Reference(**settings, means_init=X[:3]).fit(X.astype(dtype))
    assert vars(converted).keys() == vars(expected).keys()
    tolerance = 1e-9 if dtype == "float64" else 2e-3
    for name in ARRAYS:
        assert isinstance(getattr(converted, name), np.ndarray)
        assert getattr(converted, name).dtype == dtype
        assert_close(getattr(converted, name), getattr(expected, name), tolerance, name)
    assert converted.n_features_in_ == 3
    assert converted.converged_
    assert converted.lower_bound_ == converted.lower_bounds_[-1] == ours.lower_bound_
    assert converted.n_iter_ == len(converted.lower_bounds_) == ours.n_iter_
    if dtype == "float64":
        assert converted.n_iter_ == expected.n_iter_
        assert_close(to_numpy(ours.predict_proba(x)), converted.predict_proba(X), 1e-9)
        assert_close(to_numpy(ours.score_samples(x)), converted.score_samples(X), 1e-9)
        assert ours.bic(x) == pytest.approx(converted.bic(X), rel=1e-12)
    # What one does afterwards is no matter to the other.
    converted.means_[:] = 0
    assert np.all(to_numpy(ours.means_) != 0)
    named = GaussianMixture(2).fit(pandas.DataFrame(X, columns=["a", "b", "c"])).to_sklearn()
    assert named.feature_names_in_.tolist() == ["a", "b", "c"]
    by_hand = GaussianMixture(3, covariance_type=covariance.name)
    for name in ("weights_", "means_", "covariances_", "precisions_cholesky_"):
        setattr(by_hand, name, getattr(expected, name))
    assert_close(by_hand.to_sklearn().score_samples(X), expected.score_samples(X), 1e-9)
    with pytest.raises(NotFittedError, match="This GaussianMixture instance is not fitted yet"):
        GaussianMixture().to_sklearn()


def test_from_sklearn(covariance, dtype):
    pandas = pytest.importorskip("pandas")
    settings = SETTINGS | {"covariance_type": covariance.name, "weights_init": np.array([0.2, 0.2, 0.6], dtype)}
    theirs = Reference(**settings).fit(X.astype(dtype))
    ours = GaussianMixture.from_sklearn(theirs)
    params = ours.get_params(), theirs.get_params()
    assert params[0].keys() == params[1].keys()
    assert all(np.array_equal(params[0][name], params[1][name]) for name in params[0])
    assert vars(ours).keys() == vars(theirs).keys() | {"covariance_type_"}
    for name in ARRAYS:
        assert getattr(ours, name).dtype == dtype
        assert_close(getattr(ours, name), getattr(theirs, name), 1e-12 if dtype == "float64" else 1e-5, name)
    for name in ("converged_", "n_iter_", "lower_bound_", "lower_bounds_", "n_features_in_"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert_close(ours.score_samples(X), theirs.score_samples(X), 1e-9 if dtype == "float64" else 1e-3)
    ours.means_[:] = 0
    assert np.all(theirs.means_ != 0)
    named = GaussianMixture.from_sklearn(Reference(2).fit(pandas.DataFrame(X, columns=["a", "b", "c"])))
    assert named.feature_names_in_.tolist() == ["a", "b", "c"]
    with pytest.raises(NotFittedError, match="not fitted"):
        GaussianMixture.from_sklearn(Reference())
    for other in (BayesianGaussianMixture(n_components=2).fit(X), KMeans(2).fit(X), named, None):
        name = re.escape(f"{type(other).__module__}.{type(other).__qualname__}")
        with pytest.raises(TypeError, match=f"takes a fitted sklearn.mixture.GaussianMixture, got a {name};"):
            GaussianMixture.from_sklearn(other)


def test_from_sklearn_of_arrays_in_another_library(library):
    with sklearn.config_context(array_api_dispatch=True):
        theirs = Reference(3, init_params="random", random_state=0).fit(library.asarray(X))
        ours = GaussianMixture.from_sklearn(theirs)
        assert library.owns(ours.means_)
        assert_close(
            to_numpy(ours.score_samples(library.asarray(X))), to_numpy(theirs.score_samples(library.asarray(X))), 1e-9
        )


def test_save(pair, tmp_path):
    ours, theirs = pair
    ours.save(tmp_path)
    assert_close(GaussianMixture.load(tmp_path).score_samples(X), theirs.score_samples(X), 1e-9)


def test_load(library, tmp_path):
    ours, theirs = fitted()
    GaussianMixture(3, tol=1e-5, max_iter=500, random_state=0).fit(library.asarray(X)).save(tmp_path)
    loaded = GaussianMixture.load(tmp_path)
    assert loaded.get_params() == theirs.get_params() == ours.get_params()
    assert_same(loaded, theirs)


def test_save_parameters(tmp_path):
    GaussianMixture(4, tol=0.5).save_parameters(tmp_path)
    loaded = GaussianMixture.load(tmp_path)
    assert loaded.get_params() == Reference(4, tol=0.5).get_params()
    assert not hasattr(loaded, "means_")


def test_load_parameters(pair, tmp_path):
    ours, theirs = pair
    ours.save(tmp_path)
    loaded = GaussianMixture.load_parameters(tmp_path)
    assert loaded.get_params() == theirs.get_params()
    assert not hasattr(loaded, "means_")


def test_save_attributes(pair, tmp_path):
    ours, theirs = pair
    ours.save_attributes(tmp_path)
    assert_close(GaussianMixture.load(tmp_path).score_samples(X), theirs.score_samples(X), 1e-9)


def test_load_attributes(pair, tmp_path):
    ours, theirs = pair
    ours.save(tmp_path)
    other = GaussianMixture(3, covariance_type=theirs.covariance_type, tol=0.5)
    other.load_attributes(tmp_path)
    assert other.tol == 0.5
    assert_close(other.score_samples(X), theirs.score_samples(X), 1e-9)


def test_clone():
    ours, theirs = fitted()
    copied = ours.clone()
    assert copied.get_params() == sklearns_clone(theirs).get_params()
    assert vars(copied).keys() == vars(sklearns_clone(theirs)).keys()


# Attributes


def arrays_of(name, library, covariance, dtype):
    """Our mixture and one of its attributes, which is scikit-learn's after a fit in float64 to the same rows."""
    ours = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(library.asarray(X, dtype))
    found = getattr(ours, name)
    assert library.owns(found)
    assert to_numpy(found).dtype == dtype
    assert_close(to_numpy(found), getattr(reference(covariance.name, dtype), name), PARAMETER_TOLERANCE[dtype], name)
    return ours, to_numpy(found)


def test_weights_(library, covariance, dtype):
    _, weights = arrays_of("weights_", library, covariance, dtype)
    assert weights.sum() == pytest.approx(1, abs=1e-6)


def test_means_(library, covariance, dtype):
    _, means = arrays_of("means_", library, covariance, dtype)
    assert means.shape == (3, 3)


def test_covariances_(library, covariance, dtype):
    _, covariances = arrays_of("covariances_", library, covariance, dtype)
    assert covariances.shape == covariance.shape(3, 3)


def test_precisions_(library, covariance, dtype):
    ours, precisions = arrays_of("precisions_", library, covariance, dtype)
    inverses = np.linalg.inv(oracle.matrices(to_numpy(ours.covariances_), covariance.name, 3, 3))
    found = oracle.matrices(precisions, covariance.name, 3, 3)
    assert_close(found, inverses, 1e-9 if dtype == "float64" else 1e-4)


def test_precisions_cholesky_(library, covariance, dtype):
    ours, factors = arrays_of("precisions_cholesky_", library, covariance, dtype)
    factors = oracle.matrices(factors, covariance.name, 3, 3)
    assert np.array_equal(factors, np.triu(factors))
    inverses = np.linalg.inv(oracle.matrices(to_numpy(ours.covariances_), covariance.name, 3, 3))
    assert_close(factors @ factors.swapaxes(1, 2), inverses, 1e-9 if dtype == "float64" else 1e-4)


def test_converged_(unconverged):
    for max_iter in (1, 2, 500):
        ours, theirs = fitted(max_iter=max_iter)
        assert ours.converged_ is theirs.converged_ is (max_iter == 500)


def test_n_iter_(covariance, unconverged):
    for max_iter in (0, 3, 500):
        ours, theirs = fitted(covariance_type=covariance.name, max_iter=max_iter)
        assert type(ours.n_iter_) is type(theirs.n_iter_) is int
        assert ours.n_iter_ == theirs.n_iter_


def test_lower_bound_(covariance, unconverged):
    start = start_for(X, 3, covariance.name)
    ours, theirs = fitted(covariance_type=covariance.name, max_iter=1, **start)
    # The mean log-likelihood before the last M-step.
    shape = covariance.shape(1, 2)
    covariances = 1 / start["precisions_init"] if shape[-2:] != (2, 2) else np.linalg.inv(start["precisions_init"])
    sigmas = oracle.matrices(covariances, covariance.name, 3, 3)
    _, evidence = oracle.evidence(X, start["weights_init"], start["means_init"], sigmas)
    assert isinstance(ours.lower_bound_, float)
    assert ours.lower_bound_ == pytest.approx(evidence.mean(), abs=1e-9)
    assert theirs.lower_bound_ == pytest.approx(evidence.mean(), abs=1e-9)


def test_lower_bounds_(covariance):
    ours, theirs = fitted(covariance_type=covariance.name, init_params="random")
    assert type(ours.lower_bounds_) is type(theirs.lower_bounds_) is list
    assert_close(ours.lower_bounds_, theirs.lower_bounds_, 1e-9)
    assert len(ours.lower_bounds_) == ours.n_iter_
    assert ours.lower_bounds_[-1] == ours.lower_bound_
    assert np.all(np.diff(ours.lower_bounds_) > -1e-9)


def test_n_features_in_(library):
    for d in (1, 3):
        ours = GaussianMixture(2).fit(library.asarray(X[:, :d]))
        assert ours.n_features_in_ == Reference(2).fit(X[:, :d]).n_features_in_ == d
    assert not hasattr(GaussianMixture(), "n_features_in_")


def test_feature_names_in_():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=["a", "b", "c"])
    mixtures = {type(mixture): mixture for mixture in fitted(frame)}
    ours, theirs = mixtures.values()
    assert type(ours.feature_names_in_) is type(theirs.feature_names_in_)
    assert ours.feature_names_in_.dtype == theirs.feature_names_in_.dtype
    assert ours.feature_names_in_.tolist() == theirs.feature_names_in_.tolist() == ["a", "b", "c"]
    assert_close(ours.score_samples(frame), theirs.score_samples(frame), 1e-9)
    found, expected = both(lambda cls: mixtures[cls].predict(frame[["c", "b", "a"]]))
    assert found == expected
    for mixture in mixtures.values():
        with pytest.warns(
            UserWarning, match="X does not have valid feature names, but GaussianMixture was fitted with"
        ):
            mixture.predict(X)
        assert not hasattr(mixture.fit(X), "feature_names_in_")


@pytest.mark.parametrize(("setting", "expected"), [("auto", "numpy"), ("array_api", "array_api:numpy")])
def test_backend_(monkeypatch, setting, expected):
    monkeypatch.setenv("GAUSSMIX_BACKEND", setting)
    assert GaussianMixture(3, random_state=0).fit(X).backend_ == expected


@pytest.mark.parametrize(("setting", "expected"), [("auto", "expanded-float64"), ("array_api", "centred-float64")])
def test_precision_(monkeypatch, setting, expected):
    monkeypatch.setenv("GAUSSMIX_BACKEND", setting)
    assert GaussianMixture(3, random_state=0).fit(X).precision_ == expected


def test_partial_fit(covariance, unconverged):
    """A step of size 1 is an iteration of scikit-learn's."""
    start = start_for(X, 3, covariance.name)
    ours = GaussianMixture(3, covariance_type=covariance.name, max_iter=0, **start).fit(X[:100])
    ours.partial_fit(X, step_delay=1)
    theirs = Reference(3, covariance_type=covariance.name, max_iter=1, **start).fit(X)
    assert_same(ours, theirs)


def test_set_partial_fit_request():
    with sklearn.config_context(enable_metadata_routing=True):
        mixture = GaussianMixture().set_partial_fit_request(sample_weight=True)
        assert mixture.get_metadata_routing().partial_fit.requests == {"sample_weight": True}


def test_covariance_type_(covariance):
    mixture = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(X)
    assert mixture.set_params(covariance_type="no longer").covariance_type_ == covariance.name


def test_n_steps_():
    mixture = GaussianMixture(2, random_state=0).fit(X)
    assert [mixture.n_steps_, mixture.partial_fit(X).n_steps_, mixture.partial_fit(X).n_steps_] == [0, 1, 2]


CONTRACT = {
    "n_components": test_n_components,
    "covariance_type": test_covariance_type,
    "tol": test_tol,
    "reg_covar": test_reg_covar,
    "max_iter": test_max_iter,
    "n_init": test_n_init,
    "init_params": test_init_params,
    "weights_init": test_weights_init,
    "means_init": test_means_init,
    "precisions_init": test_precisions_init,
    "random_state": test_random_state,
    "warm_start": test_warm_start,
    "verbose": test_verbose,
    "verbose_interval": test_verbose_interval,
    "aic": test_aic,
    "bic": test_bic,
    "fit": test_fit,
    "fit_predict": test_fit_predict,
    "get_metadata_routing": test_get_metadata_routing,
    "get_params": test_get_params,
    "predict": test_predict,
    "predict_proba": test_predict_proba,
    "sample": test_sample,
    "score": test_score,
    "score_samples": test_score_samples,
    "set_params": test_set_params,
    "weights_": test_weights_,
    "means_": test_means_,
    "covariances_": test_covariances_,
    "precisions_": test_precisions_,
    "precisions_cholesky_": test_precisions_cholesky_,
    "converged_": test_converged_,
    "n_iter_": test_n_iter_,
    "lower_bound_": test_lower_bound_,
    "lower_bounds_": test_lower_bounds_,
    "n_features_in_": test_n_features_in_,
    "feature_names_in_": test_feature_names_in_,
}
# What only our class has.
ADDED = {
    "set_fit_request": test_set_fit_request,
    "partial_fit": test_partial_fit,
    "set_partial_fit_request": test_set_partial_fit_request,
    "n_steps_": test_n_steps_,
    "covariance_type_": test_covariance_type_,
    "from_parameters": test_from_parameters,
    "from_sklearn": test_from_sklearn,
    "to_sklearn": test_to_sklearn,
    "save": test_save,
    "save_attributes": test_save_attributes,
    "save_parameters": test_save_parameters,
    "load": test_load,
    "load_attributes": test_load_attributes,
    "load_parameters": test_load_parameters,
    "clone": test_clone,
    "backend_": test_backend_,
    "precision_": test_precision_,
}


def section(cls, title):
    """The names in a section of a numpydoc docstring."""
    text = inspect.cleandoc(cls.__doc__)
    body = re.search(rf"^{title}\n-+\n(.*?)(?=^\S[^\n]*\n---|\Z)", text, re.MULTILINE | re.DOTALL).group(1)
    return {name for line in re.findall(r"^(\w[\w, ]*?) *(?::|$)", body, re.MULTILINE) for name in line.split(", ")}


def public_names(cls):
    """Parameters, public methods and documented attributes."""
    parameters = set(inspect.signature(cls).parameters)
    assert section(cls, "Parameters") == parameters
    methods = {name for name, value in inspect.getmembers(cls, callable) if not name.startswith("_")}
    return parameters | methods | section(cls, "Attributes")


def test_every_public_name_of_scikit_learn_has_a_row():
    assert public_names(Reference) == set(CONTRACT)


def test_every_public_name_of_ours_has_a_row():
    assert public_names(GaussianMixture) == set(CONTRACT | ADDED)


def test_every_row_has_a_test_of_its_own():
    tests = [*CONTRACT.values(), *ADDED.values()]
    assert len(set(tests)) == len(tests)
    for name, test in (CONTRACT | ADDED).items():
        assert test.__name__ == f"test_{name}"
        assert globals()[test.__name__] is test  # not shadowed: pytest runs it


def test_every_fitted_attribute_is_documented():
    for mixture in fitted():
        fitted_names = {name for name in vars(mixture) if name.endswith("_")}
        assert fitted_names | {"feature_names_in_"} == section(type(mixture), "Attributes")
