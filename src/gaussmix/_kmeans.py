"""KMeans with PyCave's signature."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from gaussmix._arrays import asarray_like, floating_dtype, integer_dtype, to_numpy
from gaussmix._checks import check_integer, check_option, check_real, random_generator
from gaussmix._em import progress_bar
from gaussmix._initialization import (
    SAMPLE_ROWS,
    SAMPLE_ROWS_PER_COMPONENT,
    SEEDS,
    KMeansResult,
    lloyd,
    mean_squared_distance,
)
from gaussmix._methods import averaged, by_block, numpy_defaults, takes_data, whole_or_not_at_all
from gaussmix._persistent import Trained
from gaussmix._typing import Array
from gaussmix.backends._dispatch import clusters, distances, shareable
from gaussmix.backends._engine import Engine
from gaussmix.compat._fabric import launch
from gaussmix.compat._trainer import Settings
from gaussmix.rows._data import Rows, Stream
from gaussmix.rows._group import Group
from gaussmix.rows._validation import check_enough_rows, check_same_library, validate_rows


@dataclass(frozen=True)
class KMeansModel:
    """The parameters of a fitted clustering under PyCave's name."""

    centroids: Array  # (k, d)


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, Trained):
    """k-means by Lloyd's iterations over all rows, with PyCave's parameters.

    Parameters
    ----------
    num_clusters : int, default 1
        Number of clusters, k.
    init_strategy : {"kmeans++", "random"}, default "kmeans++"
        Seeds by k-means++, or k rows drawn at random; from a sample of at most max(8192, 256 k) rows.
    convergence_tolerance : float, default 1e-4
        Stops when the squared movement of the centroids, summed over them, is at most this times the mean variance of a
        feature: scikit-learn's rule, which does not depend on the units of the data.
    batch_size : int, optional
        Number of rows read at a time; the result does not depend on it.
    trainer_params : dict, optional
        As for `GaussianMixture`; `max_epochs` is the largest number of iterations (default 300).
    random_state : int, RandomState instance or None, default None
        Seeds the start. None draws a fresh seed and leaves NumPy's global generator untouched.

    Attributes
    ----------
    centroids_ : array of shape (k, d)
        In the library, on the device and in the dtype of the data.
    model_ : gaussmix.torch.KMeansModel
        A torch module with the same memory as `centroids`; without torch, an object with this attribute.
    converged_ : bool
        Whether the last movement was below the tolerance.
    num_iter_ : int
        Number of iterations.
    inertia_ : float
        **Mean** squared distance of a row to its centroid, in squared units of the data.
    n_features_in_ : int
        Number of features, d.

    Examples
    --------
    >>> import numpy as np
    >>> from gaussmix import KMeans
    >>> x = np.array([[0.0], [1.0], [10.0], [11.0]])
    >>> clustering = KMeans(2, random_state=0).fit(x)
    >>> clustering.inertia_
    0.25
    """

    centroids_: Array
    converged_: bool
    num_iter_: int
    inertia_: float
    n_features_in_: int
    _max_epochs = 300

    def __init__(
        self,
        num_clusters: int = 1,
        *,
        init_strategy: str = "kmeans++",
        convergence_tolerance: float = 1e-4,
        batch_size: int | None = None,
        trainer_params: dict[str, Any] | None = None,
        random_state: Any = None,
    ) -> None:
        self.num_clusters = num_clusters
        self.init_strategy = init_strategy
        self.convergence_tolerance = convergence_tolerance
        self.batch_size = batch_size
        self.trainer_params = trainer_params
        self.random_state = random_state

    @numpy_defaults
    @takes_data
    @whole_or_not_at_all
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Find the centroids.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data, as `GaussianMixture.fit` takes it.
        y : None
            Ignored.
        sample_weight : array-like of shape (n,), optional
            Weight of each row.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            For bad parameters, data that is not finite, and fewer rows than clusters.
        """
        self._check_parameters()
        settings = self._settings()
        rows = validate_rows(self, X, reset=True, sample_weight=sample_weight, batch_size=self.batch_size)
        k = int(self.num_clusters)
        check_enough_rows(rows.n_positive, "num_clusters", k)

        random_state = random_generator(self.random_state)
        run = _Run(k, self.init_strategy, self.convergence_tolerance, settings)
        if settings.fabric is None:
            result, self.inertia_ = run(settings.placement.placed(rows), random_state)
        else:
            result, self.inertia_ = launch(
                settings.fabric, partial(run.shared, self._told(), shareable(rows), random_state)
            )
        like = settings.placement.rounded(rows.like[:0, :])
        self.centroids_ = asarray_like(result.centroids, like, floating_dtype(like))
        self.converged_, self.num_iter_ = result.converged, result.n_iter
        return self

    @numpy_defaults
    @takes_data
    @by_block
    def predict(self, X: Any) -> Array:
        """Nearest centroid of each row.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.

        Returns
        -------
        labels : array of shape (n,), int64
            In the library and on the device of X.
        """
        rows = self._rows(X, "predict")
        on_rows = clusters(self._placement().placed(rows))
        labels = on_rows.nearest(self._centroids(on_rows))
        return asarray_like(labels, rows.like, integer_dtype(rows.like))

    @takes_data
    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Array:
        """Find the centroids and return the labels of the same rows, as `fit(X).predict(X)` does."""
        return self.fit(X, y, sample_weight).predict(X)

    @numpy_defaults
    @takes_data
    @by_block
    def transform(self, X: Any) -> Array:
        """Euclidean distances to all centroids.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.

        Returns
        -------
        distances : array of shape (n, k)
            In the units, the library, on the device and in the dtype of X.
        """
        rows = self._rows(X, "transform")
        found = distances(self._placement().placed(rows), self.centroids_)
        return asarray_like(found, rows.like, floating_dtype(rows.like))

    @takes_data
    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Array:
        """Find the centroids and return the distances of the same rows, as `fit(X).transform(X)` does."""
        return self.fit(X, y, sample_weight).transform(X)

    @numpy_defaults
    @takes_data
    @by_block
    def score_samples(self, X: Any) -> Array:
        """Squared distance of each row to the nearest centroid.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.

        Returns
        -------
        squared_distances : array of shape (n,)
            In squared units of the data; in the library, on the device and in the dtype of X.
        """
        rows = self._rows(X, "score_samples")
        on_rows = clusters(self._placement().placed(rows))
        found = on_rows.squared_distances(self._centroids(on_rows))
        return asarray_like(found, rows.like, floating_dtype(rows.like))

    @numpy_defaults
    @takes_data
    @averaged
    def score(self, X: Any, y: Any = None) -> float:
        """Mean squared distance of a row to its centroid: smaller is better.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.
        y : None
            Ignored.

        Returns
        -------
        inertia : float
        """
        on_rows = clusters(self._placement().placed(self._rows(X, "score")))
        return mean_squared_distance(on_rows, self._centroids(on_rows))

    @property
    def model_(self) -> Any:
        """The centroids as a `gaussmix.torch.KMeansModel`; without torch, an object with the same attribute."""
        if find_spec("torch") is None:
            return KMeansModel(self.centroids_)
        from gaussmix.torch import KMeansModel as Module

        return Module.of(self.centroids_)

    def _check_parameters(self) -> None:
        check_integer("num_clusters", self.num_clusters, 1)
        check_option("init_strategy", self.init_strategy, SEEDS)
        check_real("convergence_tolerance", self.convergence_tolerance)

    @property
    def _n_features_out(self) -> int:
        return int(self.centroids_.shape[0])

    def _rows(self, X: Any, method: str) -> Rows | Stream:
        check_is_fitted(self, "centroids_")
        rows = validate_rows(self, X, reset=False, batch_size=self.batch_size)
        check_same_library(rows.like, self, self.centroids_, method)
        return rows

    def _centroids(self, on_rows: Engine) -> Array:
        return asarray_like(self.centroids_, on_rows.rows.like, on_rows.rows.dtype)


@dataclass(frozen=True)
class _Run:
    """A fit, apart from its data and its random numbers: what other processes are told."""

    k: int
    init_strategy: str
    tolerance: float
    settings: Settings

    def __call__(
        self, rows: Rows | Stream, random_state: np.random.RandomState, group: Group | None = None
    ) -> tuple[KMeansResult, float]:
        """Seeds and Lloyd's iterations: the result and its inertia."""
        sample = rows.sample(max(SAMPLE_ROWS, SAMPLE_ROWS_PER_COMPONENT * self.k), random_state)
        seeds = SEEDS[self.init_strategy](sample, self.k, random_state)
        on_rows = clusters(rows, group, level=logging.INFO)
        max_iter = self.settings.max_epochs
        is_shown = self.settings.progress_bar and (group is None or group.rank == 0)
        with progress_bar(is_shown, max_iter, "movement", rows.shape[0]) as show:
            result = lloyd(on_rows, seeds, tolerance=self.tolerance, max_iter=max_iter, callback=show)
        return result, mean_squared_distance(on_rows, result.centroids)

    def shared(
        self, told: dict[str, Any], rows: Rows | Stream, random_state: np.random.RandomState, group: Group
    ) -> tuple[KMeansResult, float]:
        """The same in several processes; with arrays in host memory, which travel between them."""
        group.compare(told | {"the shape of X": rows.shape})
        rows = replace(self.settings.placement, device=group.device).placed(rows)
        result, inertia = self(rows, group.from_first(random_state), group)
        return replace(result, centroids=to_numpy(result.centroids)), inertia
