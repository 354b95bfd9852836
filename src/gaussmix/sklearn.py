"""GaussianMixture with scikit-learn's signature, attributes and sign."""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
from array_api_compat import is_dask_array
from sklearn import get_config
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Reference
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import check_is_fitted

from gaussmix import _interop
from gaussmix._arrays import array_namespace, asarray_like, working_dtype
from gaussmix._checkpoint import State, opened, run
from gaussmix._covariance import COVARIANCES, Covariance
from gaussmix._data import Described, Rows
from gaussmix._dispatch import engine
from gaussmix._distributed import Group, Share
from gaussmix._em import Callback, DivergedError, EMResult, best_of, is_converged
from gaussmix._engine import Fitting
from gaussmix._estimator import (
    Mixture,
    averaged,
    by_block,
    in_group,
    numpy_defaults,
    sum_of_blocks,
    whole_or_not_at_all,
)
from gaussmix._initialization import find_means, initialize
from gaussmix._parameters import Parameters, SingularCovarianceError
from gaussmix._typing import Array
from gaussmix._validation import (
    check_callback,
    check_enough_rows,
    random_generator,
    validate_array,
    validate_mixture_weights,
    validate_precisions,
    validate_rows,
)
from gaussmix._warnings import warn_user

__all__ = ["GaussianMixture"]

# scikit-learn's names for the strategies of `initialize`.
INIT_PARAMS = {
    "kmeans": "kmeans",
    "k-means++": "kmeans++",
    "random": "random",
    "random_from_data": "random_from_data",
}
# Those whose seeds are rows of the data.
SEEDED = ("k-means++", "random_from_data")

# scikit-learn's words, which scripts look for; what follows them is ours.
NOT_CONVERGED = (
    "Best performing initialization did not converge. Try different init parameters, or increase max_iter, tol, or "
    "check for degenerate data."
)
ILL_DEFINED = (
    "Fitting the mixture model failed because some components have ill-defined empirical covariance (for instance "
    "caused by singleton or collapsed samples). Try to decrease the number of components, increase reg_covar, or scale "
    "the input data."
)


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
        Largest number of EM iterations. 0 stops at the start: `means_` are then the seeds, or what was given.
    n_init : int, default 1
        Number of starts; of those that do not fail, the one of highest final likelihood is kept.
    init_params : {"kmeans", "k-means++", "random", "random_from_data"}, default "kmeans"
        How EM starts: rows belong to the nearest centroid of k-means, the nearest seed of k-means++, or the nearest of
        k rows drawn at random; "random" draws the responsibilities of each row instead. k-means and its seeds see a
        sample of at most max(16384, 256 k) rows.
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
        Shape (k, d, d) for "full", (d, d) for "tied", (k, d) for "diag", (k,) for "spherical". U is upper triangular
        with U U^T = Sigma^-1. Like all arrays here in the library, on the device and in the dtype of the data; where
        float32 has no room for what the factor says of the covariances (two features that nearly agree),
        `covariances_` and `precisions_` are in float64.
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
    @whole_or_not_at_all
    @in_group
    def fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        callback: Callback | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 10,
        resume: bool = False,
        distributed: Any = None,
    ) -> Self:
        """Fit the mixture to the rows of X.

        Parameters
        ----------
        X : array-like of shape (n, d)
            NumPy, CuPy or torch array, any other array of the array API standard, list or data frame. float32 stays
            float32, half precision becomes float32, integers become float64; sums run in float64 in any case.
            Read block by block, anew in each pass (about three for the start, one an iteration), and never all in
            memory: `numpy.memmap`, `h5py.Dataset` and `zarr.Array`; a torch `Dataset` or `DataLoader`; any object that
            gives blocks of rows, or tuples that begin with one, each time it is iterated over; a Dask array. They
            have to give the same rows each time, with `sample_weight` in the same order.
        y : None
            Ignored; there for pipelines.
        sample_weight : array-like of shape (n,), optional
            Weight of each row: an integer counts as so many equal rows, zero leaves a row out.
        callback : callable, optional
            Called after each iteration with its number, the mean log-likelihood of a row in its E-step and the
            parameters after it (`weights`, `means`, `covariances`, `precision_cholesky`, in the precision that EM
            runs in). The fit ends with what it has where the answer is true.
        checkpoint : str or os.PathLike, optional
            A file that says where the fit stands, written every `checkpoint_every` iterations and at its end; always
            whole, whatever interrupts the fit. It takes the place of another checkpoint, of no other file, and belongs
            to one fit at a time.
        checkpoint_every : int, default 10
            Iterations between two of them.
        resume : bool, default False
            Go on from `checkpoint` where there is such a file: the result is that of a fit that was not interrupted.
            Rows, weights and settings have to be the same, but for the tolerance and the largest number of iterations.
        distributed : "torch" or torch.distributed.ProcessGroup, optional
            X is this process's share of the rows, which may be none: the processes that torchrun started, or those of
            the group, fit one mixture to all of them. Attributes are the same in every process. So must be what it is
            told, but for `verbose` and `callback`; an error in one process ends the fit in all.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            For bad parameters, data that is not finite, and fewer rows than components or than two; in all processes
            for settings in which they differ.
        RuntimeError
            If another process failed; the error has its message.
        numpy.linalg.LinAlgError
            If a covariance is not positive definite; also a `torch.linalg.LinAlgError` where torch is loaded.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If the best start did not converge within `max_iter` iterations; if some of `n_init` starts failed.
        """
        self._check_parameters()
        check_callback(callback)
        covariance = COVARIANCES[self.covariance_type]
        group = distributed
        rows = self._validated(X, sample_weight, group)
        check_enough_rows(rows.n_positive, "n_components", self.n_components)
        on_rows = engine(rows, covariance, self.reg_covar, level=logging.INFO)
        given = self._given(on_rows.rows, covariance)
        random_state = random_generator(self.random_state)
        if group is not None:
            random_state = group.from_first(random_state)
            callback = group.agreed(callback)
        is_warm = self.warm_start and hasattr(self, "converged_")
        warm = self._continued("warm_start", on_rows.rows) if is_warm else None
        identity = {} if checkpoint is None else self._identity(rows, warm)
        with opened(checkpoint, checkpoint_every, identity, resume=resume, group=group) as (noted, state):
            run_from = partial(self._run, on_rows, checkpoint=noted, callbacks=[] if callback is None else [callback])
            try:
                if warm is not None:
                    result = run_from(0, lambda: warm, previous=self.lower_bound_, state=state)
                else:
                    result = self._best(run_from, partial(self._start, on_rows, given), random_state, state)
            except SingularCovarianceError as error:
                error.args = (f"{ILL_DEFINED} Cause: {error}",)
                raise
        if self.max_iter and not result.converged:
            warn_user(f"{NOT_CONVERGED} Now max_iter={self.max_iter}, tol={self.tol:g}.", ConvergenceWarning)
        self._set_parameters(result.parameters, rows)
        self._set_progress(result.lower_bounds, result.converged)
        self.n_steps_ = 0
        self.backend_, self.precision_ = on_rows.backend, on_rows.precision
        return self

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
        xp = array_namespace(self.means_)
        return (
            asarray_like(rows, self.means_, working_dtype(self.means_)),
            asarray_like(labels, self.means_, xp.int64),
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

    def _given(self, rows: Described, covariance: Covariance) -> dict[str, Array]:
        """The parts of the start that the user gave, under their names in `Parameters`."""
        k, d = self.n_components, rows.shape[1]
        given = {}
        if self.weights_init is not None:
            given["weights"] = validate_mixture_weights("weights", self.weights_init, k)
        if self.means_init is not None:
            given["means"] = validate_array("means", self.means_init, (k, d))
        if self.precisions_init is not None:
            precisions = validate_precisions(self.precisions_init, covariance, k, d)
            precisions = asarray_like(precisions, rows.like, rows.dtype)
            # The factor of the precisions' inverse is that of the covariances: U U^T = P^-1.
            given["covariances"] = covariance.square(covariance.precision_cholesky(precisions))
            given["precision_cholesky"] = covariance.precision_cholesky(given["covariances"])
        return {name: asarray_like(value, rows.like, rows.dtype) for name, value in given.items()}

    def _start(self, on_rows: Fitting, given: dict[str, Array], random_state: np.random.RandomState) -> Parameters:
        """Where EM starts: what was given, and the rest from the rows."""
        if {"weights", "means", "precision_cholesky"} <= given.keys():
            return Parameters(**given)
        rows, k, strategy = on_rows.rows, self.n_components, INIT_PARAMS[self.init_params]
        seeds = None if strategy == "random" else given.get("means")
        if seeds is None and self.init_params in SEEDED:
            seeds = asarray_like(find_means(rows, k, strategy, random_state), rows.like, rows.dtype)
        found = initialize(on_rows, k, strategy, random_state, seeds)
        if self.max_iter == 0 and seeds is not None:
            # Nobody sees the seeds once EM runs: it goes on from the means of the rows that are nearest to them.
            found = replace(found, means=seeds)
        return replace(found, **given)

    def _check_parameters(self) -> None:
        if not get_config()["skip_parameter_validation"]:
            self._validate_params()

    @property
    def _k(self) -> tuple[str, int]:
        return "n_components", self.n_components

    @property
    def _reg_covar(self) -> float:
        return self.reg_covar

    def _begin(self, on_rows: Fitting) -> Parameters:
        given = self._given(on_rows.rows, COVARIANCES[self.covariance_type])
        return self._start(on_rows, given, random_generator(self.random_state))

    def _set_progress(self, lower_bounds: list[float], converged: bool) -> None:
        self.converged_, self.n_iter_, self.lower_bounds_ = converged, len(lower_bounds), lower_bounds
        self.lower_bound_ = lower_bounds[-1] if lower_bounds else -math.inf

    def _validated(self, X: Any, sample_weight: Any, group: Group | None) -> Any:
        """The rows to fit to; with a group, those of all its processes."""
        if group is None:
            return validate_rows(self, X, reset=True, min_rows=2, sample_weight=sample_weight)
        return Share.of(validate_rows(self, X, reset=True, min_rows=0, sample_weight=sample_weight), group)

    def _best(
        self,
        run_from: Callable[..., EMResult],
        start: Callable[[np.random.RandomState], Parameters],
        random_state: np.random.RandomState,
        state: State | None,
    ) -> EMResult:
        """The best of `n_init` starts, some of which may be done in `state`."""
        first, before = (0, None) if state is None else (state.start, state.best)
        if state is not None and state.random_state is not None:
            random_state = state.random_state
        best, failures = before, []
        for i in range(first, self.n_init):
            noted = partial(_state, i, best, random_state)
            try:
                found = run_from(i, partial(start, random_state), state=state, noted=noted)
                best = found if best is None else best_of([best, found])
            except (SingularCovarianceError, DivergedError) as error:
                failures.append(error)
            state = None
        if failures and best is None:
            raise failures[0]
        if failures:
            warn_user(
                f"{len(failures)} of {self.n_init} starts failed, and the best of the others is kept; "
                f"the first failure: {failures[0]}",
                ConvergenceWarning,
            )
        if best is not None and best is before:
            # It was done with another tolerance, or with fewer iterations.
            best = replace(best, converged=is_converged(best.lower_bounds, self.tol))
            if not best.converged and len(best.lower_bounds) < self.max_iter:
                state = State(best, "")
        if state is not None:
            noted = partial(_state, self.n_init, None, random_state)
            best = run_from(self.n_init, partial(start, random_state), state=state, noted=noted)
        assert best is not None
        return best

    def _run(
        self,
        on_rows: Fitting,
        index: int,
        start: Callable[[], Parameters],
        *,
        callbacks: list[Callback],
        previous: float = -math.inf,
        state: State | None = None,
        **noted: Any,
    ) -> EMResult:
        done = [] if state is None else state.reached.lower_bounds
        last = done[-1] if done else previous
        progress = _Progress(self.verbose, self.verbose_interval, index, last) if self.verbose else None
        result = run(
            on_rows,
            start,
            tolerance=self.tol,
            max_iter=self.max_iter,
            previous=previous,
            callbacks=callbacks if progress is None else [progress, *callbacks],
            state=state,
            **noted,
        )
        if progress and self.max_iter:
            progress.end(result)
        return result

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
        evidence = self.score_samples(X)
        return float(array_namespace(evidence).sum(evidence, dtype=working_dtype(evidence))), evidence.shape[0]


def _state(
    index: int, best: EMResult | None, random_state: np.random.RandomState, reached: EMResult, form: str
) -> State:
    return State(reached, form, index, best, random_state)


class _Progress:
    """Prints what scikit-learn prints about a start: times and changes where `verbose` > 1."""

    def __init__(self, verbose: int, interval: int, index: int, previous: float) -> None:
        self._details, self._interval, self._bound = verbose > 1, interval, previous
        self._began = self._last = time.perf_counter()
        print(f"Initialization {index}")

    def __call__(self, iteration: int, lower_bound: float, parameters: Parameters) -> None:
        change, self._bound = lower_bound - self._bound, lower_bound
        if iteration % self._interval:
            return
        now = time.perf_counter()
        details = f"\t time lapse {now - self._last:.5f}s\t ll change {change:.5f}" if self._details else ""
        self._last = now
        print(f"  Iteration {iteration}{details}")

    def end(self, result: EMResult) -> None:
        elapsed = time.perf_counter() - self._began
        details = f" time lapse {elapsed:.5f}s\t lower bound {self._bound:.5f}." if self._details else ""
        print(f"Initialization {'converged' if result.converged else 'did not converge'}.{details}")
