"""GaussianMixture with PyCave's signature."""

import logging
import warnings
from dataclasses import dataclass
from typing import Any, Self

from sklearn.exceptions import ConvergenceWarning

from gaussmix._dispatch import engine
from gaussmix._em import run_em
from gaussmix._estimator import Mixture
from gaussmix._initialization import initialize
from gaussmix._trainer import max_epochs
from gaussmix._typing import Array
from gaussmix._validation import (
    check_covariance_type,
    check_enough_rows,
    check_integer,
    check_option,
    check_real,
    random_generator,
    validate_array,
    validate_rows,
)

logger = logging.getLogger("gaussmix")

INIT_STRATEGIES = ("kmeans", "kmeans++", "random", "random_from_data")


@dataclass(frozen=True)
class MixtureModel:
    """The parameters of a fitted mixture under PyCave's names."""

    component_probs: Array  # (k,)
    means: Array  # (k, d)
    precisions_cholesky: Array  # as the covariance type stores them
    covariances: Array  # the same shape


class GaussianMixture(Mixture):
    """Gaussian mixture fitted by expectation-maximisation, with PyCave's parameters and signs.

    `score` and `score_samples` are **negative** log-likelihoods: smaller is better. `gaussmix.sklearn.GaussianMixture`
    is the same engine with scikit-learn's names and sign.

    Parameters
    ----------
    num_components : int, default 1
        Number of components, k.
    covariance_type : {"full", "tied", "diag", "spherical"}, default "diag"
        One matrix for each component, one for all, one variance for each component and feature, or one variance for
        each component.
    init_strategy : {"kmeans", "kmeans++", "random", "random_from_data"}, default "kmeans"
        How EM starts: rows belong to the nearest centroid of k-means, the nearest seed of k-means++, or the nearest of
        k rows drawn at random; "random" draws the responsibilities of each row instead. k-means and its seeds see a
        sample of at most max(16384, 256 k) rows.
    init_means : array-like of shape (k, d), optional
        Means to start from, handled as if k-means had found them. A mean without rows keeps its place, with weight 0.
    convergence_tolerance : float, default 1e-3
        EM stops when the mean log-likelihood of a row changes by less, in nats. 0 runs every iteration.
    covariance_regularization : float, default 1e-6
        Added to each variance, in squared units of the data.
    batch_size : int, optional
        Largest number of rows read at a time. EM is exact whatever it is; it only bounds memory.
    trainer_params : dict, optional
        `max_epochs` is the largest number of EM iterations (default 100). Settings of Lightning that do not matter here
        are accepted and ignored.
    num_workers : int, default 0
        Stored; there for scripts that pass it.
    random_state : int, RandomState instance or None, default None
        Seeds the start and `sample`. The same value gives the same start in every array library. None draws a fresh
        seed and leaves NumPy's global generator untouched.

    Attributes
    ----------
    weights_ : array of shape (k,)
    means_ : array of shape (k, d)
    covariances_, precisions_cholesky_ : array
        Shape (k, d, d) for "full", (d, d) for "tied", (k, d) for "diag", (k,) for "spherical". U is upper triangular
        with U U^T = Sigma^-1. Like all arrays here in the library, on the device and in the dtype of the data.
    model_ : MixtureModel
        The same arrays as `component_probs`, `means`, `covariances`, `precisions_cholesky`.
    converged_ : bool
        Whether the last change was below the tolerance.
    num_iter_ : int
        Number of EM iterations, whatever the batches.
    nll_ : float
        Mean negative log-likelihood of a row in the last E-step.
    lower_bounds_ : list of float
        Mean log-likelihood of a row at each iteration's E-step.
    backend_ : str
        The implementation that ran, for example "numpy".
    precision_ : str
        The arithmetic of its E-step, for example "expanded-float64".
    n_features_in_ : int
        Number of features, d.

    Notes
    -----
    EM for Gaussian mixtures: Dempster, Laird and Rubin (1977); the updates are those of Bishop, *Pattern Recognition
    and Machine Learning* (2006), section 9.2.

    Examples
    --------
    >>> import numpy as np
    >>> from gaussmix import GaussianMixture
    >>> x = np.array([[0.0], [1.0], [10.0], [11.0]])
    >>> mixture = GaussianMixture(2, random_state=0).fit(x)
    >>> sorted(mixture.means_[:, 0].tolist())
    [0.5, 10.5]
    >>> mixture.converged_
    True
    """

    converged_: bool
    num_iter_: int
    nll_: float

    def __init__(
        self,
        num_components: int = 1,
        *,
        covariance_type: str = "diag",
        init_strategy: str = "kmeans",
        init_means: Any = None,
        convergence_tolerance: float = 1e-3,
        covariance_regularization: float = 1e-6,
        batch_size: int | None = None,
        trainer_params: dict[str, Any] | None = None,
        num_workers: int = 0,
        random_state: Any = None,
    ) -> None:
        self.num_components = num_components
        self.covariance_type = covariance_type
        self.init_strategy = init_strategy
        self.init_means = init_means
        self.convergence_tolerance = convergence_tolerance
        self.covariance_regularization = covariance_regularization
        self.batch_size = batch_size
        self.trainer_params = trainer_params
        self.num_workers = num_workers
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit the mixture to the rows of X.

        Parameters
        ----------
        X : array-like of shape (n, d)
            NumPy, CuPy or torch array, any other array of the array API standard, list or data frame. float32 stays
            float32, half precision becomes float32, integers become float64; sums run in float64 in any case. A
            `numpy.memmap` is read block by block.
        y : None
            Ignored; there for scikit-learn's pipelines.
        sample_weight : array-like of shape (n,), optional
            Weight of each row: an integer counts as so many equal rows, zero leaves a row out.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            For bad parameters, data that is not finite, and fewer rows than components or than two.
        numpy.linalg.LinAlgError
            If a covariance is not positive definite; also a `torch.linalg.LinAlgError` where torch is loaded.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If EM did not converge within `max_epochs` iterations.
        """
        check_integer("num_components", self.num_components, 1)
        covariance = check_covariance_type(self.covariance_type)
        check_option("init_strategy", self.init_strategy, INIT_STRATEGIES)
        check_real("convergence_tolerance", self.convergence_tolerance)
        check_real("covariance_regularization", self.covariance_regularization)
        max_iter = max_epochs(self.trainer_params)
        random_state = random_generator(self.random_state)
        rows = validate_rows(self, X, reset=True, min_rows=2, sample_weight=sample_weight, batch_size=self.batch_size)
        k = self.num_components
        check_enough_rows(rows, "num_components", k)
        means = self.init_means
        if means is not None:
            means = validate_array("init_means", means, (k, rows.shape[1]))

        on_rows = engine(rows, covariance, self.covariance_regularization)
        start = initialize(on_rows, k, self.init_strategy, random_state, means)
        result = run_em(on_rows, start, tolerance=self.convergence_tolerance, max_iter=max_iter)
        if max_iter and not result.converged:
            warnings.warn(
                f"EM did not converge within {max_iter} iterations; increase trainer_params['max_epochs'] or "
                f"convergence_tolerance (now {self.convergence_tolerance:g})",
                ConvergenceWarning,
                stacklevel=2,
            )
        self._set_parameters(result.parameters, rows)
        self.converged_ = result.converged
        self.num_iter_ = len(result.lower_bounds)
        self.lower_bounds_ = result.lower_bounds
        self.nll_ = -result.lower_bounds[-1] if result.lower_bounds else float("inf")
        self.backend_, self.precision_ = on_rows.backend, on_rows.precision
        return self

    def score_samples(self, X: Any) -> Array:
        """Negative log-likelihood of each row, in nats.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.

        Returns
        -------
        nll : array of shape (n,)
            Smaller is better; in the library, on the device and in the dtype of X (float64 for integers).

        Raises
        ------
        sklearn.exceptions.NotFittedError, ValueError
            As `predict`.
        """
        return -self._on(X, "score_samples").log_evidence()

    def score(self, X: Any, y: Any = None) -> float:
        """Mean negative log-likelihood of a row, in nats: smaller is better.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.
        y : None
            Ignored.

        Returns
        -------
        nll : float

        Raises
        ------
        sklearn.exceptions.NotFittedError, ValueError
            As `predict`.
        """
        return -self._on(X, "score").mean_log_evidence()

    def sample(self, num_datapoints: int) -> Array:
        """Draw rows from the fitted mixture.

        Parameters
        ----------
        num_datapoints : int
            How many.

        Returns
        -------
        X : array of shape (num_datapoints, d)
            Grouped by component; in the library, on the device and in the dtype of the fitted arrays. An integer
            `random_state` draws the same rows at each call.
        """
        return self._draw(num_datapoints)[0]

    @property
    def model_(self) -> MixtureModel:
        """The fitted parameters under PyCave's names."""
        return MixtureModel(self.weights_, self.means_, self.precisions_cholesky_, self.covariances_)
