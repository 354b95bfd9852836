"""What mixtures share: fitting, inference and sampling, on top of fitted attributes."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
from array_api_compat import is_array_api_obj
from sklearn.base import DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.metadata_routing import UNUSED
from sklearn.utils.validation import check_is_fitted

from gaussmix._arrays import (
    array_namespace,
    as_host,
    asarray_like,
    floating_dtype,
    integer_dtype,
    to_numpy,
    working_dtype,
)
from gaussmix._checks import check_callback, check_covariance_type, check_real, random_generator, validate_parameters
from gaussmix._covariance import COVARIANCES, Covariance
from gaussmix._density import Density
from gaussmix._em import Callback, EMResult, stepwise
from gaussmix._fit import Continued, Found, Plan, Start
from gaussmix._methods import by_block, in_group, numpy_defaults, takes_data, whole_or_not_at_all
from gaussmix._objective import MaximumLikelihood, density_of
from gaussmix._parameters import Parameters, SingularCovarianceError
from gaussmix._persistent import Persistent, described
from gaussmix._typing import Array
from gaussmix._warnings import warn_user
from gaussmix.backends._dispatch import engine
from gaussmix.backends._engine import Engine
from gaussmix.compat import _interop
from gaussmix.rows._data import Described, Rows, Stream
from gaussmix.rows._group import Group
from gaussmix.rows._processes import Share
from gaussmix.rows._validation import check_enough_rows, check_same_library, validate_rows
from gaussmix.storage._checkpoint import DATA

# Covariances whose rounding to the dtype of the data may change a log-density by more than this, in nats, are published
# in float64.
COVARIANCE_TOLERANCE = 1e-2
START_ANEW = "start anew with fit (and warm_start=False)"
# Those that say when a fit ends, and nothing else.
ENDS = ("convergence_tolerance", "tol", "max_epochs", "max_iter")


class Mixture(DensityMixin, Persistent):
    """A fitted mixture is its attributes: `weights_`, `means_`, `covariances_` and `precisions_cholesky_`."""

    # What concerns one run is no metadata that pipelines route; sample weights are.
    __metadata_request__fit: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("callback", "checkpoint", "checkpoint_every", "resume", "distributed"), UNUSED
    )
    __metadata_request__partial_fit: ClassVar[dict[str, Any]] = dict.fromkeys(("step_decay", "step_delay"), UNUSED)

    covariance_type: str
    random_state: Any
    batch_size: int | None = None
    num_workers: int = 0

    weights_: Array
    means_: Array
    covariances_: Array
    precisions_cholesky_: Array
    lower_bounds_: list[float]
    backend_: str
    precision_: str
    n_features_in_: int
    n_steps_: int
    covariance_type_: str

    # What an error says of a covariance that came out singular, before its cause.
    _ill_defined: ClassVar[str] = ""

    def __getattr__(self, name: str) -> Any:
        # Attributes that are set by hand are those that scikit-learn predicts from: the rest follows from them.
        if name == "n_features_in_" and "means_" in vars(self):
            return self.means_.shape[1]
        if name == "covariances_" and "means_" in vars(self):
            factor, covariance = self.precisions_cholesky_, self._covariance
            exact = array_namespace(factor).astype(factor, working_dtype(factor), copy=False)
            rounded = asarray_like(covariance.covariances(exact), factor)
            parameters = Parameters(self.weights_, self.means_, rounded, factor)
            return _with_covariances_that_hold(parameters, covariance).covariances
        return super().__getattr__(name)

    @numpy_defaults
    @takes_data
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
            NumPy, torch, JAX or CuPy array, any other of the array API standard, list or data frame. float32 stays
            float32, half precision becomes float32, integers become float64; sums run in float64 in any case.
            Read block by block, anew in each pass (about three for the start, one an iteration), and never all in
            memory: `numpy.memmap`, `h5py.Dataset` and `zarr.Array`; a torch `Dataset` or `DataLoader`; any object that
            gives blocks of rows, or tuples that begin with one, each time it is iterated over; a Dask array. They
            have to give the same rows each time, with `sample_weight` in the same order. `data` is another name for X.
        y : None
            Ignored; there for scikit-learn's pipelines.
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
            told, but for `batch_size`, `num_workers`, `verbose` and `callback`; an error in one process ends the fit in
            all.

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
            If the best start did not converge within `max_epochs` or `max_iter` iterations; if some of `n_init` starts
            failed.
        """
        self._check_parameters()
        check_callback(callback)
        random_state = random_generator(self.random_state)
        rows = self._validated(X, sample_weight, distributed)
        check_enough_rows(rows.n_positive, *self._k)
        plan = replace(
            self._plan(rows),
            callback=callback,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            resume=resume,
        )
        if checkpoint is not None:
            plan = replace(plan, identity=self._identity(rows, plan.start))
        try:
            result, self.backend_ = self._runs(plan, rows)(random_state)
        except SingularCovarianceError as error:
            error.args = (f"{self._ill_defined}{error}",)
            raise
        if plan.max_iter and not result.converged:
            warn_user(self._not_converged(len(result.lower_bounds)), ConvergenceWarning)
        self._set_parameters(result.parameters, self._rounded(rows))
        self._set_progress(result.lower_bounds, result.converged)
        self.precision_ = result.precision
        self.n_steps_ = 0
        return self

    @classmethod
    @numpy_defaults
    def from_parameters(cls, weights: Any, means: Any, covariances: Any, *, covariance_type: str) -> Self:
        """A fitted mixture with known parameters.

        Parameters
        ----------
        weights : array-like of shape (k,)
            Not negative, with sum 1.
        means : array-like of shape (k, d)
            Their library, device and dtype become those of all fitted arrays.
        covariances : array-like
            Shape (k, d, d) for "full", (d, d) for "tied", (k, d) for "diag", (d,) for "tied_diag", (k,) for
            "spherical".
        covariance_type : {"full", "tied", "diag", "tied_diag", "spherical"}
            What the covariances are.

        Returns
        -------
        mixture
            Ready for `predict`, `score` and `sample`.

        Raises
        ------
        ValueError
            If a shape does not fit, or a covariance is not symmetric and positive definite.

        Examples
        --------
        >>> from gaussmix import GaussianMixture
        >>> mixture = GaussianMixture.from_parameters([1.0], [[0.0]], [1.0], covariance_type="spherical")
        >>> round(mixture.score([[0.0]]), 6)  # log(2 pi) / 2
        0.918939
        """
        covariance = check_covariance_type(covariance_type)
        parameters = validate_parameters(weights, means, covariances, covariance)
        k, d = parameters.means.shape
        mixture: Self = cls(k, covariance_type=covariance_type)
        mixture._set_parameters(parameters, Rows(means if is_array_api_obj(means) else parameters.means))
        mixture.n_features_in_ = d
        return mixture

    @numpy_defaults
    @takes_data
    @whole_or_not_at_all
    def partial_fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        step_decay: float = 0.7,
        step_delay: float = 2.0,
    ) -> Self:
        """Take a step towards the rows of X: online learning by stepwise EM.

        The mixture's statistics move by the part `(n_steps_ + step_delay) ** -step_decay` of the way to those of X
        under the mixture, and its parameters with them. The first call on a mixture that is not fitted starts from X,
        which then needs at least as many rows as there are components; after `fit`, steps go on from where it ended.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The next rows; whatever `fit` takes.
        y : None
            Ignored.
        sample_weight : array-like of shape (n,), optional
            Weight of each row, relative to the others in X.
        step_decay : float, default 0.7
            Above 0.5 and at most 1: how fast steps get shorter. 1 weighs all calls alike in the long run; less forgets
            the start sooner.
        step_delay : float, default 2.0
            At least 1: larger values make the first steps shorter, and so trust the start more.

        Returns
        -------
        self
            With `n_steps_`, the number of steps so far; `lower_bounds_` has the bound of this step alone, which is that
            of X, and `converged_` is False.

        Raises
        ------
        ValueError, TypeError, numpy.linalg.LinAlgError
            As `fit`; also for step parameters out of their range, and where the number of components or the covariance
            type is another than that of what was fitted.

        Notes
        -----
        Cappe and Moulines (2009), *On-line expectation-maximization algorithm for latent data models*, J. R. Statist.
        Soc. B 71, 593-613; Liang and Klein (2009), *Online EM for unsupervised models*.

        Examples
        --------
        >>> import numpy as np
        >>> from gaussmix import GaussianMixture
        >>> rng = np.random.RandomState(0)
        >>> mixture = GaussianMixture(2, random_state=0)
        >>> for _ in range(30):
        ...     rows = rng.normal(size=(200, 1)) + 10 * rng.randint(2, size=(200, 1))
        ...     mixture = mixture.partial_fit(rows)
        >>> sorted(mixture.means_[:, 0].round().astype(int).tolist()), mixture.n_steps_
        ([0, 10], 30)
        """
        check_real("step_decay", step_decay)
        check_real("step_delay", step_delay)
        if not 0.5 < step_decay <= 1:
            raise ValueError(f"step_decay must be above 0.5 and at most 1, for steps to converge, got {step_decay!r}")
        if step_delay < 1:
            raise ValueError(
                f"step_delay must be at least 1, for no step to be longer than the way, got {step_delay!r}"
            )
        self._check_parameters()
        is_new = not hasattr(self, "means_")
        rows = validate_rows(
            self,
            X,
            reset=is_new,
            sample_weight=sample_weight,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )
        if is_new:
            check_enough_rows(rows.n_positive, *self._k)
        objective = self._objective
        level = logging.INFO if is_new else logging.DEBUG
        on_rows = engine(self._placement().placed(rows), objective.covariance, level=level)
        begun: Start = self._start(rows) if is_new else Continued(self._continued("partial_fit", rows))
        start = begun(on_rows, objective, random_generator(self.random_state))
        n_steps = getattr(self, "n_steps_", 0)
        bound, parameters, precision = stepwise(on_rows, objective, start, (n_steps + step_delay) ** -step_decay)
        if not math.isfinite(bound):
            raise ValueError(f"the log-likelihood of X is {bound} under the mixture; rescale X, or start anew with fit")
        self._set_parameters(parameters, rows)
        self._set_progress([bound], converged=False)
        self.backend_, self.precision_ = on_rows.backend, precision
        self.n_steps_ = n_steps + 1
        return self

    @takes_data
    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Array:
        """Fit the mixture and return the labels of the same rows.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.
        y : None
            Ignored; there for scikit-learn's pipelines.
        sample_weight : array-like of shape (n,), optional
            Weight of each row.

        Returns
        -------
        labels : array of shape (n,), int64
            What `fit(X).predict(X)` returns.
        """
        return self.fit(X, y, sample_weight).predict(X)

    @numpy_defaults
    @takes_data
    @by_block
    def predict(self, X: Any) -> Array:
        """Most probable component of each row.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.

        Returns
        -------
        labels : array of shape (n,), int64
            In the library and on the device of X; for a Dask array one that is computed when it is asked for.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`.
        ValueError
            If X is not finite or has another number of features than the data of `fit`.
        """
        return self._on(X, "predict").labels()

    @numpy_defaults
    @takes_data
    @by_block
    def predict_proba(self, X: Any) -> Array:
        """Probability of each component given the row (its responsibility).

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.

        Returns
        -------
        responsibilities : array of shape (n, k)
            Rows sum to 1; in the library, on the device and in the dtype of X (float64 for integers). For a Dask array
            as `predict`.

        Raises
        ------
        sklearn.exceptions.NotFittedError, ValueError
            As `predict`.
        """
        return self._on(X, "predict_proba").responsibilities()

    def _on(self, X: Any, method: str) -> "_Inference":
        check_is_fitted(self, "means_")
        rows = validate_rows(self, X, reset=False, batch_size=self.batch_size, num_workers=self.num_workers)
        check_same_library(rows.like, self, self.means_, method)
        density = density_of(self._parameters.mapped(as_host), self._covariance)
        return _Inference(rows, density, engine(self._placement().placed(rows), self._covariance))

    def _told_to_fit(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What processes that fit together need to be told alike."""
        told = {"the class": f"{type(self).__module__}.{type(self).__qualname__}"} | self._told()
        told["whether sample_weight is given"] = arguments["sample_weight"] is not None
        checkpoint = arguments["checkpoint"]
        told["checkpoint"] = None if checkpoint is None else os.fspath(checkpoint)
        told |= {name: described(arguments[name]) for name in ("checkpoint_every", "resume")}
        if getattr(self, "warm_start", False):
            names = ("weights_", "means_", "covariances_", "precisions_cholesky_", "lower_bound_")
            told |= {f"{name} (warm_start)": described(getattr(self, name, None)) for name in names}
        return told

    def _identity(self, rows: Described, begun: Start) -> dict[str, Any]:
        """What the result of a fit depends on, but for its end, as JSON has it."""
        told = {name: value for name, value in self._told().items() if name not in ENDS}
        dtype = told.pop("precision", None) or str(floating_dtype(rows.like)).rpartition(".")[2]
        start = None
        if isinstance(begun, Continued):
            start = np.concatenate([to_numpy(value).ravel() for value in vars(begun.parameters).values()])
        data = {"shape": list(rows.shape), "dtype": dtype, DATA: f"{rows.fingerprint():016x}"}
        return told | {"warm_start": described(start)} | data

    def _check_parameters(self) -> None:
        """Raise for parameters of the constructor that mean nothing."""
        raise NotImplementedError

    @property
    def _k(self) -> tuple[str, int]:
        """The parameter that says how many components there are, and its value."""
        raise NotImplementedError

    @property
    def _reg_covar(self) -> float:
        """What is added to each variance."""
        raise NotImplementedError

    @property
    def _objective(self) -> MaximumLikelihood:
        """What a fit maximises."""
        return MaximumLikelihood(COVARIANCES[self.covariance_type], float(self._reg_covar))

    def _start(self, rows: Described) -> Found:
        """Where EM starts, unless it goes on."""
        raise NotImplementedError

    def _plan(self, rows: Described) -> Plan:
        """A fit to these rows, as the constructor was told."""
        raise NotImplementedError

    def _runs(self, plan: Plan, rows: Rows | Stream | Share) -> Callable[[np.random.RandomState], tuple[EMResult, str]]:
        """The plan, where it is to be computed."""
        return partial(plan, self._placement().placed(rows))

    def _not_converged(self, n_iter: int) -> str:
        """What is said after so many iterations."""
        raise NotImplementedError

    def _rounded(self, rows: Described) -> Described:
        """Some rows in the precision that results are to have."""
        return rows

    def _validated(self, X: Any, sample_weight: Any, group: Group | None) -> Any:
        """The rows to fit to; with a group, those of all its processes."""
        rows = validate_rows(
            self,
            X,
            reset=True,
            min_rows=2 if group is None else 0,
            sample_weight=sample_weight,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )
        return rows if group is None else Share.of(rows, group)

    def _set_progress(self, lower_bounds: list[float], converged: bool) -> None:
        """Publish how EM went."""
        raise NotImplementedError

    @property
    def _covariance(self) -> Covariance:
        """The covariance type of what was fitted, whatever the parameter says by now."""
        return COVARIANCES[getattr(self, "covariance_type_", self.covariance_type)]

    @property
    def _parameters(self) -> Parameters:
        factor, covariance = self.precisions_cholesky_, self._covariance
        expected = covariance.shape(*self.means_.shape)
        if tuple(factor.shape) != expected:
            raise ValueError(
                f"precisions_cholesky_ has shape {tuple(factor.shape)}; means_ of shape {tuple(self.means_.shape)} and "
                f"covariance_type={covariance.name!r} take {expected}: set all fitted attributes, covariance_type_ too"
            )
        return Parameters(self.weights_, self.means_, self.covariances_, factor)

    def _continued(self, method: str, rows: Described) -> Parameters:
        """The fitted parameters, for EM on these rows to go on from."""
        self._check_unchanged(method)
        if self.means_.shape[1] != rows.shape[1]:
            raise ValueError(
                f"{method} goes on from means of {self.means_.shape[1]} features, and the data has {rows.shape[1]}; "
                f"pass data of the same features, or {START_ANEW}"
            )
        like = as_host(rows.like)
        moved = self._parameters.moved(like, working_dtype(like))
        # The factor is the truth: covariances of a narrower dtype are rounded once more.
        return replace(moved, covariances=self._covariance.covariances(moved.precision_cholesky))

    def _check_unchanged(self, method: str) -> None:
        """Raise ValueError where the parameters that say what a mixture is are not those of what was fitted."""
        name, k = self._k
        for parameter, now, fitted in (
            (name, k, self.weights_.shape[0]),
            ("covariance_type", self.covariance_type, self._covariance.name),
        ):
            if now != fitted:
                raise ValueError(
                    f"{method} goes on from a mixture with {parameter}={fitted!r}, and it is {now!r} now; set it back, "
                    f"or {START_ANEW}"
                )

    def _set_parameters(self, parameters: Parameters, rows: Described) -> None:
        """Publish parameters in the dtype of the data; covariances in more where it would lose them."""
        covariance = COVARIANCES[self.covariance_type]
        moved = parameters.moved(rows.like, floating_dtype(rows.like))
        moved = _with_covariances_that_hold(moved, covariance)
        self.weights_, self.means_ = moved.weights, moved.means
        self.covariances_, self.precisions_cholesky_ = moved.covariances, moved.precision_cholesky
        self.covariance_type_ = covariance.name

    def _draw(self, n: int) -> tuple[Array, Array]:
        """N rows drawn from the mixture, grouped by component, and their components, on the host: (n, d), (n,)."""
        covariance, parameters = self._covariance, self._parameters
        drawing = _interop.to_sklearn(self, {"covariance_type": covariance.name}, {})
        held = to_numpy(_with_covariances_that_hold(parameters, covariance).covariances)
        drawing.covariances_ = covariance.for_sklearn(held, len(drawing.weights_))
        weights = drawing.weights_.astype(np.float64)
        # Rounded to float32 they may add up to more than NumPy takes; else they are to draw what they always draw.
        drawing.weights_ = weights if abs(weights.sum() - 1) < 1e-12 else weights / weights.sum()
        drawing.random_state = random_generator(self.random_state)
        rows, labels = drawing.sample(n)
        return rows, labels


def _with_covariances_that_hold(parameters: Parameters, covariance: Covariance) -> Parameters:
    """Parameters of a narrow dtype, with covariances in a wider one where their own dtype would lose them."""
    means = parameters.means
    dtype = working_dtype(means)
    if means.dtype == dtype:
        return parameters
    host = parameters.mapped(as_host)
    exact = host.moved(host.means, working_dtype(host.means))
    derived = covariance.covariances(exact.precision_cholesky)
    xp = array_namespace(derived)
    # Rounding changes entries by eps times their size: a log-density at most by eps times this.
    kappa = covariance.kappa(derived, exact.precision_cholesky, 0 * exact.means)
    is_lost = float(xp.finfo(host.means.dtype).eps) * float(xp.max(kappa)) > COVARIANCE_TOLERANCE
    return replace(parameters, covariances=asarray_like(derived, means, dtype)) if is_lost else parameters


class _Inference:
    """Predictions for some rows, as the caller sees them: in the floating dtype of the data."""

    def __init__(self, rows: Rows | Stream, density: Density, on_rows: Engine) -> None:
        self._engine = on_rows
        self._density = density.moved(on_rows.rows.like, on_rows.rows.dtype)
        self._like, self._dtype = rows.like, floating_dtype(rows.like)

    def labels(self) -> Array:
        labels = self._engine.labels(self._density)
        return asarray_like(labels, self._like, integer_dtype(self._like))

    def responsibilities(self) -> Array:
        return asarray_like(self._engine.responsibilities(self._density), self._like, self._dtype)

    def log_evidence(self) -> Array:
        return asarray_like(self._engine.log_evidence(self._density), self._like, self._dtype)

    def mean_log_evidence(self) -> float:
        return self._engine.mean_log_evidence(self._density)
