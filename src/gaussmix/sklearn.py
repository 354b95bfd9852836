"""GaussianMixture with scikit-learn's signature, attributes and sign."""

import math
import time
import warnings
from typing import Any, Self

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from gaussmix._arrays import asarray_like, floating_dtype
from gaussmix._covariance import COVARIANCES, Covariance
from gaussmix._data import Rows
from gaussmix._dispatch import engine
from gaussmix._em import Callback, EMResult, best_of, run_em
from gaussmix._engine import Engine
from gaussmix._estimator import Mixture
from gaussmix._initialization import initialize
from gaussmix._parameters import Parameters
from gaussmix._typing import Array
from gaussmix._validation import (
    check_covariance_type,
    check_enough_rows,
    check_integer,
    check_option,
    check_real,
    random_generator,
    validate_array,
    validate_mixture_weights,
    validate_rows,
)

__all__ = ["GaussianMixture"]

# scikit-learn's names for the strategies of `initialize`.
INIT_PARAMS = {
    "kmeans": "kmeans",
    "k-means++": "kmeans++",
    "random": "random",
    "random_from_data": "random_from_data",
}


class GaussianMixture(Mixture):
    """Gaussian mixture fitted by expectation-maximisation: a drop-in for `sklearn.mixture.GaussianMixture`.

    `score` and `score_samples` are log-likelihoods: larger is better. `gaussmix.GaussianMixture` is the same engine
    with PyCave's names and sign.

    Parameters
    ----------
    n_components : int, default 1
        Number of components, k.
    covariance_type : {"full", "tied", "diag", "spherical"}, default "full"
        One matrix for each component, one for all, one variance for each component and feature, or one variance for
        each component.
    tol : float, default 1e-3
        EM stops when the mean log-likelihood of a row changes by less, in nats.
    reg_covar : float, default 1e-6
        Added to each variance, in squared units of the data.
    max_iter : int, default 100
        Largest number of EM iterations. 0 stops at the start's parameters.
    n_init : int, default 1
        Number of starts; the one of highest final likelihood is kept.
    init_params : {"kmeans", "k-means++", "random", "random_from_data"}, default "kmeans"
        How EM starts: rows belong to the nearest centroid of k-means, the nearest seed of k-means++, or the nearest of
        k rows drawn at random; "random" draws the responsibilities of each row instead. k-means and its seeds see a
        sample of at most max(16384, 256 k) rows.
    weights_init, means_init, precisions_init : array-like, optional
        Parts of the start: (k,), (k, d), and the shape of `precisions_`. Given means alone, rows belong to the nearest.
    random_state : int, RandomState instance or None, default None
        Seeds the starts and `sample`. The same value gives the same start in every array library. None draws a fresh
        seed and leaves NumPy's global generator untouched.
    warm_start : bool, default False
        Start where the last `fit` ended.
    verbose : int, default 0
        1 prints each start and every `verbose_interval`-th iteration, 2 also changes and times.
    verbose_interval : int, default 10
        Iterations between two lines.

    Attributes
    ----------
    weights_ : array of shape (k,)
    means_ : array of shape (k, d)
    covariances_, precisions_, precisions_cholesky_ : array
        Shape (k, d, d) for "full", (d, d) for "tied", (k, d) for "diag", (k,) for "spherical". U is upper triangular
        with U U^T = Sigma^-1. Like all arrays here in the library, on the device and in the dtype of the data.
    converged_ : bool
        Whether the last change was below `tol`.
    n_iter_ : int
        Number of EM iterations of the best start.
    lower_bound_ : float
        Mean log-likelihood of a row in the last E-step of the best start.
    lower_bounds_ : list of float
        The same for each iteration.
    backend_ : str
        The implementation that ran, for example "numpy".
    precision_ : str
        The arithmetic of its E-step, for example "expanded-float64".
    n_features_in_ : int
        Number of features, d.
    feature_names_in_ : ndarray of shape (d,)
        Names of the features, where X has them.

    Examples
    --------
    >>> import numpy as np
    >>> from gaussmix.sklearn import GaussianMixture
    >>> x = np.array([[1.0, 2], [1, 4], [1, 0], [10, 2], [10, 4], [10, 0]])
    >>> mixture = GaussianMixture(2, random_state=0).fit(x)
    >>> sorted(mixture.means_[:, 0].tolist())
    [1.0, 10.0]
    >>> mixture.predict([[0.0, 0], [12, 3]]).tolist() == mixture.predict([[1.0, 2], [10, 2]]).tolist()
    True
    """

    precisions_: Array
    converged_: bool
    n_iter_: int
    lower_bound_: float

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "kmeans",
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit the mixture to the rows of X.

        Parameters
        ----------
        X : array-like of shape (n, d)
            NumPy, CuPy or torch array, any other array of the array API standard, list or data frame. float32 stays
            float32, half precision becomes float32, integers become float64; sums run in float64 in any case. A
            `numpy.memmap` is read block by block.
        y : None
            Ignored; there for pipelines.
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
            If the best start did not converge within `max_iter` iterations.
        """
        covariance = self._check_parameters()
        rows = validate_rows(self, X, reset=True, min_rows=2, sample_weight=sample_weight)
        check_enough_rows(rows, "n_components", self.n_components)
        on_rows = engine(rows, covariance, self.reg_covar)

        if self.warm_start and hasattr(self, "converged_"):
            warm = self._checked_parameters(on_rows.rows, covariance)
            result = self._run(on_rows, warm, 0, previous=self.lower_bound_)
        else:
            random_state = random_generator(self.random_state)
            result = best_of(
                self._run(on_rows, self._start(on_rows, covariance, random_state), i) for i in range(self.n_init)
            )
        if self.max_iter and not result.converged:
            warnings.warn(
                f"EM did not converge within max_iter={self.max_iter} iterations; increase max_iter or tol (now "
                f"{self.tol:g}), or try other init_params",
                ConvergenceWarning,
                stacklevel=2,
            )
        self._set_parameters(result.parameters, rows)
        self.converged_ = result.converged
        self.n_iter_ = len(result.lower_bounds)
        self.lower_bounds_ = result.lower_bounds
        self.lower_bound_ = result.lower_bounds[-1] if result.lower_bounds else -math.inf
        self.backend_, self.precision_ = on_rows.backend, on_rows.precision
        return self

    def score_samples(self, X: Any) -> Array:
        """Log-likelihood of each row, in nats.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.

        Returns
        -------
        log_likelihood : array of shape (n,)
            Larger is better; in the library, on the device and in the dtype of X (float64 for integers).

        Raises
        ------
        sklearn.exceptions.NotFittedError, ValueError
            As `predict`.
        """
        return self._on(X, "score_samples").log_evidence()

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-likelihood of a row, in nats: larger is better.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.
        y : None
            Ignored.

        Returns
        -------
        log_likelihood : float

        Raises
        ------
        sklearn.exceptions.NotFittedError, ValueError
            As `predict`.
        """
        return self._on(X, "score").mean_log_evidence()

    def bic(self, X: Any) -> float:
        """Bayesian information criterion, -2 log L + p log n (Schwarz 1978): smaller is better.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.

        Returns
        -------
        bic : float
        """
        return -2 * self.score(X) * _n_rows(X) + self._n_parameters() * math.log(_n_rows(X))

    def aic(self, X: Any) -> float:
        """Akaike information criterion, -2 log L + 2 p (Akaike 1974): smaller is better.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.

        Returns
        -------
        aic : float
        """
        return -2 * self.score(X) * _n_rows(X) + 2 * self._n_parameters()

    def sample(self, n_samples: int = 1) -> tuple[Array, Array]:
        """Draw rows from the fitted mixture.

        Parameters
        ----------
        n_samples : int, default 1
            How many.

        Returns
        -------
        X : array of shape (n_samples, d)
            Grouped by component; in the library, on the device and in the dtype of the fitted arrays. An integer
            `random_state` draws the same rows at each call.
        y : array of shape (n_samples,), int64
            The component of each row.
        """
        return self._draw(n_samples)

    def _check_parameters(self) -> Covariance:
        check_integer("n_components", self.n_components, 1)
        check_real("tol", self.tol)
        check_real("reg_covar", self.reg_covar)
        check_integer("max_iter", self.max_iter, 0)
        check_integer("n_init", self.n_init, 1)
        check_option("init_params", self.init_params, INIT_PARAMS)
        check_integer("verbose_interval", self.verbose_interval, 1)
        return check_covariance_type(self.covariance_type)

    def _start(self, on_rows: Engine, covariance: Covariance, random_state: np.random.RandomState) -> Parameters:
        """Where EM starts: what was given, and the rest from the rows."""
        rows = on_rows.rows
        k, d = self.n_components, rows.shape[1]
        weights, means, precisions = self.weights_init, self.means_init, self.precisions_init
        if weights is not None:
            weights = asarray_like(validate_mixture_weights("weights_init", weights, k), rows.array, rows.dtype)
        if means is not None:
            means = asarray_like(validate_array("means_init", means, (k, d)), rows.array, rows.dtype)
        if precisions is not None:
            precisions = validate_array("precisions_init", precisions, covariance.shape(k, d))
            precisions = asarray_like(precisions, rows.array, rows.dtype)
            covariance.validate(precisions, k, d, "precisions_init")
            # The factor of the precisions' inverse is that of the covariances: U U^T = P^-1.
            covariances = covariance.square(covariance.precision_cholesky(precisions))
            factors = covariance.precision_cholesky(covariances)
        if weights is not None and means is not None and precisions is not None:
            return Parameters(weights, means, covariances, factors)
        found = initialize(on_rows, k, INIT_PARAMS[self.init_params], random_state, means)
        return Parameters(
            found.weights if weights is None else weights,
            found.means if means is None else means,
            *((found.covariances, found.precision_cholesky) if precisions is None else (covariances, factors)),
        )

    def _checked_parameters(self, rows: Rows, covariance: Covariance) -> Parameters:
        """The fitted parameters, for rows that they have to fit."""
        k, d = self.n_components, rows.shape[1]
        if tuple(self.means_.shape) != (k, d):
            raise ValueError(
                f"warm_start goes on from means of shape {tuple(self.means_.shape)}, but n_components={k} and the data "
                f"has {d} features; set warm_start=False to start anew"
            )
        if tuple(self.covariances_.shape) != covariance.shape(k, d):
            raise ValueError(f"warm_start can not go on with covariance_type={covariance.name!r}; set it to False")
        return self._parameters.moved(rows.array, rows.dtype)

    def _run(self, on_rows: Engine, start: Parameters, index: int, previous: float = -math.inf) -> EMResult:
        progress = _print_progress(self.verbose, self.verbose_interval) if self.verbose else None
        if self.verbose:
            print(f"Initialization {index}")
        began = time.perf_counter()
        result = run_em(
            on_rows, start, tolerance=self.tol, max_iter=self.max_iter, previous=previous, callback=progress
        )
        if self.verbose:
            outcome = "converged" if result.converged else "did not converge"
            details = ""
            if self.verbose > 1 and result.lower_bounds:
                details = f" time lapse {time.perf_counter() - began:.5f}s\t lower bound {result.lower_bounds[-1]:.5f}."
            print(f"Initialization {outcome}.{details}")
        return result

    def _set_parameters(self, parameters: Parameters, rows: Rows) -> None:
        super()._set_parameters(parameters, rows)
        precisions = COVARIANCES[self.covariance_type].square(parameters.precision_cholesky)
        self.precisions_ = asarray_like(precisions, rows.array, floating_dtype(rows.array))

    def _n_parameters(self) -> int:
        k, d = self.means_.shape
        return k - 1 + k * d + COVARIANCES[self.covariance_type].n_parameters(k, d)


def _n_rows(X: Any) -> int:
    return X.shape[0] if hasattr(X, "shape") else len(X)


def _print_progress(verbose: int, interval: int) -> Callback:
    """Prints every `interval`-th iteration, with the change and the time since the last line where `verbose` > 1."""
    last_bound, last_time = -math.inf, time.perf_counter()

    def show(iteration: int, lower_bound: float, parameters: Parameters) -> None:
        nonlocal last_bound, last_time
        change, last_bound = lower_bound - last_bound, lower_bound
        if iteration % interval:
            return
        now = time.perf_counter()
        details = f"\t time lapse {now - last_time:.5f}s\t ll change {change:.5f}" if verbose > 1 else ""
        last_time = now
        print(f"  Iteration {iteration}{details}")

    return show
