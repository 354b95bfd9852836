"""The estimator with scikit-learn's signature: its own checks, and behaviour compared with the original."""

import inspect
import pickle

import numpy as np
import pytest
import sklearn
from sklearn.mixture import GaussianMixture as Reference
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks

from cases import PARAMETER_TOLERANCE, assert_close, blobs, start_for
from gaussmix import GaussianMixture as PyCaveMixture
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix.sklearn import GaussianMixture

X = blobs(n=300, d=3, k=3, seed=1)


@pytest.fixture
def covariance(covariance):
    if covariance.sklearn_name != covariance.name:
        pytest.skip("scikit-learn has no such covariance type")
    return covariance


@parametrize_with_checks([GaussianMixture(covariance_type=name) for name in COVARIANCES])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@parametrize_with_checks([PyCaveMixture()])
def test_scikit_learns_checks_of_the_other_estimator(estimator, check):
    check(estimator)


def test_signature_and_defaults_are_scikit_learns():
    ours, theirs = (inspect.signature(cls).parameters for cls in (GaussianMixture, Reference))
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind


def test_every_fitted_attribute_of_scikit_learn_is_there(covariance):
    theirs, ours = (
        cls(3, covariance_type=covariance.name, random_state=0).fit(X) for cls in (Reference, GaussianMixture)
    )
    for name, value in vars(theirs).items():
        if name.endswith("_"):
            found = getattr(ours, name)
            assert np.shape(found) == np.shape(value) or name == "lower_bounds_", name
            assert isinstance(found, type(value)) or isinstance(value, np.generic), name


def test_known_parameters_predict_as_scikit_learn_does(library, covariance, dtype):
    reference = Reference(3, covariance_type=covariance.name, random_state=0).fit(X)
    mixture = GaussianMixture.from_parameters(
        *(library.asarray(getattr(reference, name), dtype) for name in ("weights_", "means_", "covariances_")),
        covariance_type=covariance.name,
    )
    x = library.asarray(X, dtype)
    tolerance = 1e-9 if dtype == "float64" else 1e-4
    assert_close(to_numpy(mixture.score_samples(x)), reference.score_samples(X), tolerance)
    assert_close(to_numpy(mixture.precisions_), reference.precisions_, tolerance)
    assert np.array_equal(to_numpy(mixture.predict(x)), reference.predict(X))


def test_attributes_set_by_hand_make_a_model(covariance):
    reference = Reference(3, covariance_type=covariance.name, random_state=0).fit(X)
    mixture = GaussianMixture(3, covariance_type=covariance.name)
    for name in ("weights_", "means_", "covariances_", "precisions_cholesky_"):
        setattr(mixture, name, getattr(reference, name))
    assert_close(mixture.score_samples(X), reference.score_samples(X), 1e-9)


def test_n_init_keeps_the_best_start():
    settings = dict(init_params="random_from_data", tol=1e-6, max_iter=500)
    generator = np.random.RandomState(0)
    single = [GaussianMixture(3, **settings, random_state=generator).fit(X) for _ in range(5)]
    best = GaussianMixture(3, **settings, n_init=5, random_state=0).fit(X)
    assert_close(best.lower_bound_, max(mixture.lower_bound_ for mixture in single), 1e-9)
    assert len({mixture.lower_bound_ for mixture in single}) > 1


def test_warm_start_goes_on_where_the_last_fit_ended(covariance, unconverged):
    start = start_for(X, 3, covariance.name)
    settings = dict(covariance_type=covariance.name, tol=0, **start)
    whole = GaussianMixture(3, max_iter=10, **settings).fit(X)
    parts = GaussianMixture(3, max_iter=4, warm_start=True, **settings).fit(X)
    parts.set_params(max_iter=6).fit(X)
    assert_close(parts.means_, whole.means_, 1e-12)
    assert_close(parts.covariances_, whole.covariances_, 1e-12)
    assert parts.n_iter_ == 6
    with pytest.raises(ValueError, match="warm_start goes on from a mixture with n_components=3, and it is 4 now"):
        parts.set_params(n_components=4, weights_init=None, means_init=None, precisions_init=None).fit(X)


def test_sample_has_labels_and_the_moments_of_the_mixture(library, covariance):
    mixture = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(library.asarray(X))
    rows, labels = mixture.sample(60_000)
    assert library.owns(rows)
    assert library.owns(labels)
    rows, labels = to_numpy(rows), to_numpy(labels)
    assert labels.dtype == np.int64
    assert_close(np.bincount(labels) / len(labels), to_numpy(mixture.weights_), 0.01)
    sigmas = to_numpy(mixture.covariances_)
    for k in range(3):
        expected = {
            "full": lambda k: sigmas[k],
            "tied": lambda k: sigmas,
            "diag": lambda k: np.diag(sigmas[k]),
            "tied_diag": lambda k: np.diag(sigmas),
            "spherical": lambda k: sigmas[k] * np.eye(3),
        }[covariance.name](k)
        group = rows[labels == k]
        assert_close(group.mean(axis=0), to_numpy(mixture.means_)[k], 0.03)
        assert_close(np.cov(group.T), expected, 0.05 * max(1.0, 1 / np.abs(expected).max()))
    again, _ = mixture.sample(60_000)
    assert np.array_equal(to_numpy(again), rows)


def test_sampling_many_components_of_float32_weights():
    k = 1000
    mixture = GaussianMixture.from_parameters(
        np.full(k, 1 / k, dtype=np.float32),
        np.arange(k, dtype=np.float32)[:, None],
        np.ones(k, dtype=np.float32),
        covariance_type="spherical",
    )
    rows, labels = mixture.sample(5000)
    assert rows.dtype == np.float64
    assert np.all(np.diff(labels) >= 0)


def test_pipelines_and_grid_search():
    grid = {"n_components": [1, 2, 3, 4], "covariance_type": ["full", "diag"]}
    ours, theirs = (
        GridSearchCV(cls(init_params="random", max_iter=500, random_state=0), grid, cv=3).fit(X)
        for cls in (GaussianMixture, Reference)
    )
    assert ours.best_params_ == theirs.best_params_
    assert_close(ours.cv_results_["mean_test_score"], theirs.cv_results_["mean_test_score"], 1e-6)
    pipelines = [make_pipeline(StandardScaler(), cls(3, random_state=0)).fit(X) for cls in (GaussianMixture, Reference)]
    for method in ("predict", "predict_proba", "score_samples", "score", "fit_predict"):
        found, expected = (getattr(pipeline, method)(X) for pipeline in pipelines)
        assert_close(found, expected, 1e-9, method)


def test_pickled_mixtures_predict_the_same(library, covariance):
    x = library.asarray(X)
    mixture = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(x)
    copied = pickle.loads(pickle.dumps(mixture))
    expected = Reference(3, covariance_type=covariance.name, random_state=0).fit(X)
    assert library.owns(copied.means_)
    assert_close(to_numpy(copied.score_samples(x)), expected.score_samples(X), 1e-9)


def test_tags_and_the_lack_of_set_output_are_scikit_learns():
    ours, theirs = (get_tags(cls()) for cls in (GaussianMixture, Reference))
    assert ours.array_api_support
    ours.array_api_support = theirs.array_api_support
    assert ours == theirs
    assert not hasattr(GaussianMixture(), "set_output")
    assert not hasattr(Reference(), "set_output")


def test_parameters_are_not_checked_where_scikit_learn_is_told_so():
    settings = dict(random_state=0, verbose=np.float64(0))
    for cls in (GaussianMixture, Reference):
        with pytest.raises(ValueError, match="The 'verbose' parameter of GaussianMixture must be"):
            cls(2, **settings).fit(X)
        with sklearn.config_context(skip_parameter_validation=True):
            assert cls(2, **settings).fit(X).n_iter_ > 0


def device_of(x):
    return getattr(x, "device", "cpu")


@pytest.mark.parametrize("init_params", ["kmeans", "k-means++", "random", "random_from_data"])
def test_array_api_dispatch_keeps_library_and_device(library, covariance, dtype, init_params):
    x = library.asarray(X, dtype)
    if library.name == "array_api_strict":
        import array_api_strict

        x = array_api_strict.asarray(x, device=array_api_strict.Device("device1"))
    settings = dict(covariance_type=covariance.name, init_params=init_params, random_state=0)
    expected = GaussianMixture(3, **settings).fit(X.astype(dtype))
    with sklearn.config_context(array_api_dispatch=True):
        mixture = GaussianMixture(3, **settings).fit(x)
        outputs = [mixture.predict(x), mixture.predict_proba(x), mixture.score_samples(x), *mixture.sample(5)]
        numbers = [mixture.score(x), mixture.aic(x), mixture.bic(x)]
    arrays = [getattr(mixture, name) for name in ("weights_", "means_", "covariances_", "precisions_")]
    for value in (*arrays, mixture.precisions_cholesky_, *outputs):
        assert library.owns(value)
        assert device_of(value) == device_of(x)
    assert all(type(number) is float for number in numbers)
    tolerance = PARAMETER_TOLERANCE[dtype]
    assert_close(to_numpy(mixture.means_), expected.means_, tolerance)
    assert_close(to_numpy(mixture.covariances_), expected.covariances_, tolerance)
    assert np.array_equal(to_numpy(outputs[0]), expected.predict(X.astype(dtype)))
    if init_params == "kmeans":
        reference = Reference(3, **settings).fit(X.astype(dtype).astype(np.float64))
        assert_close(to_numpy(mixture.means_), reference.means_, tolerance)


def test_the_two_estimators_have_opposite_signs(covariance):
    ours = PyCaveMixture(3, covariance_type=covariance.name, random_state=0).fit(X)
    theirs = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(X)
    assert ours.score(X) == -theirs.score(X)
    assert np.array_equal(ours.score_samples(X), -theirs.score_samples(X))
    assert ours.score_samples(X).shape == (300,)
    assert np.array_equal(ours.fit_predict(X), theirs.fit_predict(X))
    assert ours.sample(10).shape == (10, 3)
    assert np.array_equal(ours.model_.means, ours.means_)
    assert np.array_equal(ours.model_.component_probs, ours.weights_)


def test_a_model_fitted_in_one_library_predicts_in_another(library, covariance):
    mixture = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(X)
    proba = mixture.predict_proba(library.asarray(X))
    assert library.owns(proba)
    assert_close(to_numpy(proba), mixture.predict_proba(X), 1e-12)


@pytest.mark.parametrize(("unit", "n"), [(1e-6, 3000), (1.0, 3000), (1e6, 3000), (1.0, 2**13)])
def test_an_integer_random_state_gives_scikit_learns_fit(covariance, unit, n):
    x = unit * blobs(n=n, d=3, k=4, seed=2, spread=2.0)
    settings = dict(covariance_type=covariance.name, reg_covar=1e-6 * unit**2, random_state=3)
    theirs, ours = (cls(4, **settings).fit(x) for cls in (Reference, GaussianMixture))
    assert ours.n_iter_ == theirs.n_iter_ > 2
    assert_close(ours.weights_, theirs.weights_, 1e-9, "weights")
    assert_close(ours.means_ / unit, theirs.means_ / unit, 1e-9, "means")
    assert_close(ours.covariances_ / unit**2, theirs.covariances_ / unit**2, 1e-9, "covariances")
    assert abs(ours.lower_bound_ - theirs.lower_bound_) < 1e-9


def nearly_equal_features(dtype="float32"):
    """Rows whose features nearly agree: their covariances, rounded to float32, are those of another mixture."""
    rng = np.random.RandomState(0)
    return (1e4 * rng.normal(size=(5000, 1)) + rng.normal(size=(5000, 3))).astype(dtype)


@pytest.mark.parametrize("cls", [GaussianMixture, PyCaveMixture])
class TestTheFactorIsTheTruth:
    """What needs covariances again has those of the factor, however they are rounded."""

    x = nearly_equal_features()

    def fitted(self, cls, library, name):
        return cls(1, covariance_type=name, random_state=0).fit(library.asarray(self.x))

    @pytest.mark.parametrize("name", ["full", "tied"])
    def test_samples_are_as_wide_as_the_data(self, cls, library, name):
        sampled = self.fitted(cls, library, name).set_params(random_state=1).sample(5000)
        rows = to_numpy(sampled[0] if isinstance(sampled, tuple) else sampled).astype(np.float64)
        expected = self.x.astype(np.float64)
        for i, j in ((0, 1), (1, 2)):
            # Five standard errors of a standard deviation from 5000 rows.
            assert abs(np.std(rows[:, i] - rows[:, j]) / np.std(expected[:, i] - expected[:, j]) - 1) < 0.05

    @pytest.mark.parametrize("name", ["full", "tied", "diag", "spherical"])
    def test_published_parameters_make_the_same_mixture(self, cls, library, name):
        mixture, x = self.fitted(cls, library, name), library.asarray(self.x)
        again = cls.from_parameters(mixture.weights_, mixture.means_, mixture.covariances_, covariance_type=name)
        assert abs(again.score(x) - mixture.score(x)) < 1e-3
        assert again.precisions_cholesky_.dtype == mixture.means_.dtype == x.dtype

    @pytest.mark.parametrize("name", ["full", "tied", "diag", "spherical"])
    def test_a_step_on_the_same_rows_changes_nothing(self, cls, library, name):
        mixture, x = self.fitted(cls, library, name), library.asarray(self.x)
        before = mixture.score(x)
        assert abs(mixture.partial_fit(x).score(x) - before) < 1e-3

    @pytest.mark.parametrize("name", ["full", "tied"])
    def test_conversions_score_alike(self, cls, library, name):
        mixture = self.fitted(cls, library, name)
        sign = 1 if cls is GaussianMixture else -1
        theirs = mixture.to_sklearn()
        assert abs(theirs.score(self.x) - sign * mixture.score(library.asarray(self.x))) < 1e-2
        start = Reference(1, covariance_type=name, max_iter=2, precisions_init=theirs.precisions_, tol=1e6).fit(
            self.x.astype(np.float64)
        )
        assert abs(start.lower_bound_ - sign * mixture.score(library.asarray(self.x))) < 1e-2
        back = cls.from_sklearn(theirs)
        assert abs(back.score(self.x) - mixture.score(library.asarray(self.x))) < 1e-3


@pytest.mark.parametrize("name", ["full", "tied", "diag", "spherical"])
def test_float32_fits_go_on_where_they_were(library, name):
    x = library.asarray(nearly_equal_features())
    mixture = GaussianMixture(1, covariance_type=name, random_state=0, warm_start=True).fit(x)
    before = mixture.score(x)
    assert abs(mixture.fit(x).score(x) - before) < 1e-3
    given = GaussianMixture(
        1,
        covariance_type=name,
        max_iter=0,
        weights_init=mixture.weights_,
        means_init=mixture.means_,
        precisions_init=mixture.precisions_,
    ).fit(x)
    assert abs(given.score(x) - before) < 1e-3


@pytest.mark.parametrize("name", ["full", "tied", "diag", "spherical"])
def test_float32_fits_resume_where_they_were(library, name, tmp_path, unconverged):
    x = library.asarray(nearly_equal_features())
    settings = dict(covariance_type=name, tol=0, random_state=0)
    whole = GaussianMixture(2, max_iter=6, **settings).fit(x)
    GaussianMixture(2, max_iter=3, **settings).fit(x, checkpoint=tmp_path / "fit")
    resumed = GaussianMixture(2, max_iter=6, **settings).fit(x, checkpoint=tmp_path / "fit", resume=True)
    assert resumed.lower_bounds_ == whole.lower_bounds_
    assert np.array_equal(to_numpy(resumed.precisions_cholesky_), to_numpy(whole.precisions_cholesky_))


def test_covariances_keep_the_dtype_of_the_data_where_it_has_room_for_them(library, covariance, dtype):
    mixture = GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(library.asarray(X, dtype))
    for name in ("covariances_", "precisions_", "precisions_cholesky_", "means_", "weights_"):
        assert str(getattr(mixture, name).dtype).endswith(dtype)


@pytest.mark.parametrize("change", ["covariance_type", "components"])
@pytest.mark.parametrize("cls", [GaussianMixture, PyCaveMixture])
def test_what_was_fitted_knows_what_it_is(cls, covariance, change):
    x = X  # d = k: shapes of several types agree
    mixture = cls(3, covariance_type=covariance.name, random_state=0).fit(x)
    names = ["score_samples", "predict", "predict_proba", "score"] + (["bic"] if cls is GaussianMixture else [])
    before = [getattr(mixture, name)(x) for name in names]
    k_name = "n_components" if cls is GaussianMixture else "num_components"
    other = "tied" if covariance.name == "full" else "full"
    changed = {k_name: 2} if change == "components" else {"covariance_type": other}
    mixture.set_params(**changed)
    assert mixture.covariance_type_ == covariance.name
    after = [getattr(mixture, name)(x) for name in names]
    for one, two in zip(before, after, strict=True):
        assert np.array_equal(one, two)
    sampled = mixture.set_params(random_state=0).sample(10)
    assert np.shape(sampled[0] if isinstance(sampled, tuple) else sampled) == (10, 3)
    (name, value) = next(iter(changed.items()))
    for method in (lambda: mixture.partial_fit(x), mixture.to_sklearn):
        with pytest.raises(ValueError, match=f"{name}=.*it is {value!r} now; set it back, or start anew"):
            method()
    if cls is GaussianMixture:
        with pytest.raises(ValueError, match=f"warm_start goes on from a mixture with {name}="):
            mixture.set_params(warm_start=True).fit(x)
    assert np.array_equal(getattr(mixture, names[0])(x), before[0])


@pytest.mark.parametrize("cls", [GaussianMixture, PyCaveMixture])
def test_attributes_by_hand_that_do_not_fit_are_refused(cls, covariance):
    mixture = cls(3, covariance_type=covariance.name, random_state=0).fit(X)
    mixture.precisions_cholesky_ = np.ones((2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"precisions_cholesky_ has shape \(2, 2, 2, 2\); .* take"):
        mixture.predict(X)


REFUSED = {
    "too few rows": lambda x: x[:1],
    "NaN": lambda x: np.where(np.arange(len(x))[:, None] == 3, np.nan, x),
    "other width": lambda x: x[:, :2] * np.inf,
    "too large": lambda x: 1e200 * x,
    "one dimension": lambda x: x[:, 0],
    "text": lambda x: [["a", "b", "c"]] * 9,
    "collapse": lambda x: np.repeat(x[:2], 50, axis=0),
}


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
@pytest.mark.parametrize("cls", [GaussianMixture, PyCaveMixture])
def test_a_refused_fit_changes_nothing(cls, method, kind, covariance):
    frame = pytest.importorskip("pandas").DataFrame(X, columns=["a", "b", "c"])
    reg = {"reg_covar" if cls is GaussianMixture else "covariance_regularization": 0}
    mixture = cls(3, covariance_type=covariance.name, random_state=0, **reg).fit(frame)
    before, labels = dict(vars(mixture)), mixture.predict(frame)
    bad = REFUSED[kind](X)
    if (method, kind) in (("partial_fit", "collapse"), ("partial_fit", "too few rows")):
        pytest.skip("a step on few rows is none that is refused")
    with pytest.raises((ValueError, TypeError, np.linalg.LinAlgError)):
        getattr(mixture, method)(bad)
    assert vars(mixture).keys() == before.keys()
    assert all(value is before[name] for name, value in vars(mixture).items())
    assert np.array_equal(mixture.predict(frame), labels)
    new = cls(3, covariance_type=covariance.name, **reg)
    with pytest.raises((ValueError, TypeError, np.linalg.LinAlgError)):
        new.fit(bad)
    assert not [name for name in vars(new) if name.endswith("_")]


@pytest.mark.parametrize("name", ["full", "diag", "spherical"])
def test_starts_that_collapse_leave_the_others(name):
    # Two far points twice each: a component that takes such a pair alone has no width.
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.normal(size=(50, 2)), [[9.0, 9.0]] * 2])
    # tol: a start ends before the others find the pair.
    settings = dict(covariance_type=name, reg_covar=0, tol=1e6, init_params="random_from_data", random_state=0)
    with pytest.raises(np.linalg.LinAlgError):
        GaussianMixture(3, **settings, means_init=[x[0], x[1], x[-1]]).fit(x)
    settings["n_init"] = 12
    with pytest.warns(sklearn.exceptions.ConvergenceWarning, match=r"\d+ of 12 starts failed.*not positive definite"):
        mixture = GaussianMixture(3, **settings).fit(x)
    assert np.isfinite(mixture.score(x))
    with pytest.raises(np.linalg.LinAlgError, match="ill-defined empirical covariance"):
        GaussianMixture(2, **settings).fit(np.ones((20, 2)))
