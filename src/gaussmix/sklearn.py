"""GaussianMixture with scikit-learn's signature, attributes and sign."""

import math
from numbers import Integral
from typing import Any, ClassVar, Self

from array_api_compat import is_dask_array
from sklearn import get_config
from sklearn.mixture import GaussianMixture as Reference
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import check_is_fitted

from gaussmix._arrays import array_namespace, as_host, asarray_like, integer_dtype, working_dtype
from gaussmix._checks import validate_array, validate_mixture_weights, validate_precisions
from gaussmix._covariance import COVARIANCES
from gaussmix._estimator import Mixture
from gaussmix._fit import Continued, Found, Plan
from gaussmix._methods import averaged, by_block, numpy_defaults, sum_of_blocks
from gaussmix._parameters import Parameters
from gaussmix._typing import Array
from gaussmix.compat import _interop
from gaussmix.rows._data import Described, Rows

__all__ = ["GaussianMixture"]

# scikit-learn's names for the strategies of `initialize`.
INIT_PARAMS = {
    "kmeans": "kmeans",
    "k-means++": "kmeans++",
    "random": "random",
    "random_from_data": "random_from_data",
}
# scikit-learn's words, which scripts look for; what follows them is ours.
NOT_CONVERGED = (
    "Best performing initialization did not converge. Try different init parameters, or increase max_iter, tol, or "
    "check for degenerate data."
)
ILL_DEFINED = (
    "Fitting the mixture model failed because some components have ill-defined empirical covariance (for instance "
    "caused by singleton or collapsed samples). Try to decrease the number of components, increase reg_covar, or scale "
    "the input data. Cause: "
)


class GaussianMixture(Mixture):
    """Gaussian mixture fitted by expectation-maximisation: a drop-in for `sklearn.mixture.GaussianMixture`.

    `score` and `score_samples` are log-likelihoods: larger is better. `gaussmix.GaussianMixture` is the same engine
    with PyCave's names and sign.

    Parameters
    ----------
    n_components : int, default 1
        Number of components, k.
    covariance_type : {"full", "tied", "diag", "tied_diag", "spherical"}, default "full"
        One matrix for each component, one for all, one variance for each component and feature, one for each feature
        (shared by all components; scikit-learn has no such type), or one variance for each component.
    tol : float, default 1e-3
        EM stops when the mean log-likelihood of a row changes by less, in nats.
    reg_covar : float, default 1e-6
        Added to each variance, in squared units of the data.
    max_iter : int, default 100
        Largest number of EM iterations. 0 stops at the start: `means_` are then the seeds, or what was given.
    n_init : int, default 1
        Number of starts; of those that do not fail, the one of highest final likelihood is kept.
    init_params : {"kmeans", "k-means++", "random", "random_from_data"}, default "kmeans"
        How EM starts: rows belong to the nearest centroid of k-means, the nearest seed of k-means++, or the nearest of
        k rows drawn at random; "random" draws the responsibilities of each row instead. k-means and its seeds see a
        sample of at most max(8192, 256 k) rows.
    weights_init, means_init, precisions_init : array-like, optional
        Parts of the start: (k,), (k, d), and the shape of `precisions_`. `init_params` finds those that are not given;
        with means but without weights or precisions, rows belong to the nearest of those means, unless it is "random".
    random_state : int, RandomState instance or None, default None
        Seeds the starts and `sample`. The same value gives the same start in every array library, and the one of
        scikit-learn where there are no more rows than k-means looks at. None draws a fresh seed and leaves NumPy's
        global generator untouched.
    warm_start : bool, default False
        Start where the last `fit` ended; `n_init` then counts for the first fit only.
    verbose : int, default 0
        1 prints each start and every `verbose_interval`-th iteration, 2 also changes and times.
    verbose_interval : int, default 10
        Iterations between two lines.

    Attributes
    ----------
    weights_ : array of shape (k,)
    means_ : array of shape (k, d)
    covariances_, precisions_, precisions_cholesky_ : array
        Shape (k, d, d) for "full", (d, d) for "tied", (k, d) for "diag", (d,) for "tied_diag", (k,) for "spherical". U
        is upper triangular with U U^T = Sigma^-1. Like all arrays here in the library, on the device and in the dtype
        of the data; where float32 has no room for what the factor says of the covariances (two features that nearly
        agree), `covariances_` and `precisions_` are in float64.
    covariance_type_ : str
        The covariance type of what was fitted.
    converged_ : bool
        Whether the last change was below `tol`.
    n_iter_ : int
        Number of EM iterations of the best start.
    lower_bound_ : float
        Mean log-likelihood of a row in the last E-step of the best start.
    lower_bounds_ : list of float
        The same for each iteration; that of the last step after `partial_fit`.
    n_steps_ : int
        Number of steps that `partial_fit` took since the last `fit`.
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

    # What scikit-learn accepts and how it says no, but for covariance types, of which there may be more.
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **Reference._parameter_constraints,
        "covariance_type": [StrOptions(set(COVARIANCES))],
    }

    precisions_: Array
    converged_: bool
    n_iter_: int
    lower_bound_: float

    _ill_defined = ILL_DEFINED

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

    @numpy_defaults
    @by_block
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

    @numpy_defaults
    @averaged
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

    @numpy_defaults
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
        log_likelihood, n = self._log_likelihood(X)
        return -2 * log_likelihood + self._n_parameters() * math.log(n)

    @numpy_defaults
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
        log_likelihood, _ = self._log_likelihood(X)
        return -2 * log_likelihood + 2 * self._n_parameters()

    @numpy_defaults
    def sample(self, n_samples: int = 1) -> tuple[Array, Array]:
        """Draw rows from the fitted mixture.

        Parameters
        ----------
        n_samples : int, default 1
            How many.

        Returns
        -------
        X : array of shape (n_samples, d)
            Grouped by component; in the library and on the device of the fitted arrays, in float64 where the device has
            it. An integer `random_state` draws the same rows at each call, and those that scikit-learn would draw.
        y : array of shape (n_samples,), int64
            The component of each row.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`.
        ValueError, TypeError
            If `n_samples` is not a positive integer.
        """
        check_is_fitted(self, "means_")
        if not isinstance(n_samples, Integral):
            raise TypeError(f"n_samples must be an integer, got {n_samples!r}")
        if n_samples < 1:
            raise ValueError(f"Invalid value for 'n_samples': {n_samples} . The sampling requires at least one sample.")
        rows, labels = self._draw(int(n_samples))
        return (
            asarray_like(rows, self.means_, working_dtype(self.means_)),
            asarray_like(labels, self.means_, integer_dtype(self.means_)),
        )

    @numpy_defaults
    def to_sklearn(self) -> Any:
        """The same mixture as a `sklearn.mixture.GaussianMixture`, for tools that ask for that class.

        Returns
        -------
        mixture : sklearn.mixture.GaussianMixture
            With copies of the parameters and of every fitted attribute that the class has, as NumPy arrays.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`.

        Examples
        --------
        >>> from gaussmix.sklearn import GaussianMixture
        >>> mixture = GaussianMixture(2, random_state=0).fit([[0.0], [1.0], [10.0], [11.0]])
        >>> converted = mixture.to_sklearn()
        >>> type(converted).__module__.partition(".")[0], converted.n_iter_ == mixture.n_iter_
        ('sklearn', True)
        """
        check_is_fitted(self, "means_")
        self._check_unchanged("to_sklearn")
        return _interop.to_sklearn(self, self.get_params(deep=False), _interop.attributes(self))

    @classmethod
    @numpy_defaults
    def from_sklearn(cls, mixture: Any) -> Self:
        """The mixture that a `sklearn.mixture.GaussianMixture` was fitted to.

        Parameters
        ----------
        mixture : sklearn.mixture.GaussianMixture
            A fitted one. Not a `BayesianGaussianMixture`: it predicts with the spread of its posterior, which a
            Gaussian mixture with the same `weights_`, `means_` and `covariances_` does not have.

        Returns
        -------
        mixture
            With copies of its parameters and fitted attributes, in the library in which it holds them.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If `mixture` is not fitted.
        TypeError
            If it is of another class.

        Examples
        --------
        >>> import sklearn.mixture
        >>> from gaussmix.sklearn import GaussianMixture
        >>> x = [[0.0], [1.0], [10.0], [11.0]]
        >>> mixture = GaussianMixture.from_sklearn(sklearn.mixture.GaussianMixture(2, random_state=0).fit(x))
        >>> sorted(round(mean, 6) for mean in mixture.means_[:, 0].tolist())
        [0.5, 10.5]
        """
        params, parameters, attributes = _interop.from_sklearn(mixture)
        converted = cls(**params)
        converted._set_parameters(parameters, Rows(parameters.means))
        for name, value in attributes.items():
            setattr(converted, name, value)
        return converted

    def _start(self, rows: Described) -> Found:
        k, d, strategy = self.n_components, rows.shape[1], INIT_PARAMS[self.init_params]
        given, covariance = {}, COVARIANCES[self.covariance_type]
        if self.weights_init is not None:
            given["weights"] = validate_mixture_weights("weights", self.weights_init, k)
        if self.means_init is not None:
            given["means"] = validate_array("means", self.means_init, (k, d))
        if self.precisions_init is not None:
            precisions = validate_precisions(self.precisions_init, covariance, k, d)
            # The factor of the precisions' inverse is that of the covariances: U U^T = P^-1.
            given["covariances"] = covariance.square(covariance.precision_cholesky(precisions))
            given["precision_cholesky"] = covariance.precision_cholesky(given["covariances"])
        # Nobody sees the seeds once EM runs: it goes on from the means of the rows that are nearest to them.
        means = None if strategy == "random" else given.get("means")
        return Found(k, strategy, means, given, keeps_means=self.max_iter == 0)

    def _plan(self, rows: Described) -> Plan:
        is_warm = self.warm_start and hasattr(self, "converged_")
        return Plan(
            objective=self._objective,
            start=Continued(self._continued("warm_start", rows)) if is_warm else self._start(rows),
            tolerance=self.tol,
            max_iter=self.max_iter,
            n_init=1 if is_warm else self.n_init,
            previous=self.lower_bound_ if is_warm else -math.inf,
            verbose=self.verbose,
            verbose_interval=self.verbose_interval,
        )

    def _not_converged(self, n_iter: int) -> str:
        return f"{NOT_CONVERGED} Now max_iter={self.max_iter}, tol={self.tol:g}."

    def _check_parameters(self) -> None:
        if not get_config()["skip_parameter_validation"]:
            self._validate_params()
        self._placement()  # what is wrong with the environment is said before any row is read

    @property
    def _k(self) -> tuple[str, int]:
        return "n_components", self.n_components

    @property
    def _reg_covar(self) -> float:
        return self.reg_covar

    def _set_progress(self, lower_bounds: list[float], converged: bool) -> None:
        self.converged_, self.n_iter_, self.lower_bounds_ = converged, len(lower_bounds), lower_bounds
        self.lower_bound_ = lower_bounds[-1] if lower_bounds else -math.inf

    def _set_parameters(self, parameters: Parameters, rows: Described) -> None:
        super()._set_parameters(parameters, rows)
        precisions = self._covariance.square(parameters.precision_cholesky)
        # Rounding loses of precisions what it loses of covariances.
        self.precisions_ = asarray_like(precisions, rows.like, self.covariances_.dtype)

    def _n_parameters(self) -> int:
        k, d = self.means_.shape
        return k - 1 + k * d + self._covariance.n_parameters(k, d)

    def _log_likelihood(self, X: Any) -> tuple[float, int]:
        """Log-likelihood of all rows, and their number."""
        if is_dask_array(X):
            return sum_of_blocks(self, "score", X)
        evidence = as_host(self.score_samples(X))
        return float(array_namespace(evidence).sum(evidence, dtype=working_dtype(evidence))), evidence.shape[0]
