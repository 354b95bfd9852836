"""To and from scikit-learn's class, under PyCave's names; test_sklearn_contract.py has it under scikit-learn's."""

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture as Reference

from cases import assert_close, blobs
from gaussmix import GaussianMixture as PyCaveMixture
from gaussmix._arrays import to_numpy

X = blobs(n=240, d=3, k=3, seed=1)


@pytest.fixture
def covariance(covariance):
    if covariance.sklearn_name != covariance.name:
        pytest.skip("scikit-learn has no such covariance type")
    return covariance


@pytest.mark.parametrize("strategy", ["kmeans", "kmeans++", "random", "random_from_data"])
def test_pycaves_class_becomes_scikit_learns_and_back(library, covariance, strategy):
    settings = dict(covariance_type=covariance.name, init_strategy=strategy, convergence_tolerance=1e-4, random_state=2)
    ours = PyCaveMixture(
        3, covariance_regularization=1e-5, init_means=X[:3], trainer_params={"max_epochs": 300}, **settings
    ).fit(library.asarray(X))
    converted = ours.to_sklearn()
    assert type(converted) is Reference
    expected = dict(n_components=3, covariance_type=covariance.name, tol=1e-4, reg_covar=1e-5, max_iter=300)
    expected |= dict(init_params=strategy.replace("kmeans++", "k-means++"), random_state=2)
    assert converted.get_params() | {"means_init": None} == Reference(**expected).get_params()
    assert np.array_equal(converted.means_init, X[:3])
    assert_close(-to_numpy(ours.score_samples(library.asarray(X))), converted.score_samples(X), 1e-9)
    assert converted.n_iter_ == ours.num_iter_
    assert converted.lower_bound_ == -ours.nll_ == converted.lower_bounds_[-1]
    back = PyCaveMixture.from_sklearn(converted)
    assert back.get_params() | {"init_means": None} == ours.get_params() | {"init_means": None}
    assert vars(back).keys() == vars(ours).keys() - {"backend_", "precision_", "n_steps_"}
    assert (back.num_iter_, back.nll_, back.converged_) == (ours.num_iter_, ours.nll_, ours.converged_)
    assert_close(back.predict_proba(X), converted.predict_proba(X), 1e-9)
    with pytest.raises(NotFittedError, match="This GaussianMixture instance is not fitted yet"):
        PyCaveMixture().to_sklearn()
    with pytest.raises(NotFittedError, match="not fitted"):
        PyCaveMixture.from_sklearn(Reference())
    with pytest.raises(TypeError, match=r"got a gaussmix\._mixture\.GaussianMixture"):
        PyCaveMixture.from_sklearn(ours)
