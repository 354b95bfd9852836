"""GaussianMixture with PyCave's signature."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
from sklearn.utils.validation import check_is_fitted

from gaussmix._arrays import asarray_like, to_numpy
from gaussmix._checks import check_covariance_type, check_integer, check_option, check_real, validate_array
from gaussmix._em import EMResult
from gaussmix._estimator import Mixture
from gaussmix._fit import Found, Plan
from gaussmix._methods import averaged, by_block, numpy_defaults, takes_data
from gaussmix._persistent import Trained
from gaussmix._typing import Array
from gaussmix.backends._dispatch import shareable
from gaussmix.compat import _interop
from gaussmix.compat._fabric import launch
from gaussmix.compat._trainer import Settings
from gaussmix.rows._data import Described, Rows, Stream
from gaussmix.rows._group import Group
from gaussmix.rows._processes import Share, share_of

INIT_STRATEGIES = ("kmeans", "kmeans++", "random", "random_from_data")


@dataclass(frozen=True)
class MixtureModel:
    """The parameters of a fitted mixture under PyCave's names."""

    component_probs: Array  # (k,)
    means: Array  # (k, d)
    precisions_cholesky: Array  # as the covariance type stores them
    covariances: Array  # the same shape


class GaussianMixture(Mixture, Trained):
    """Gaussian mixture fitted by expectation-maximisation, with PyCave's parameters and signs.

    `score` and `score_samples` are **negative** log-likelihoods: smaller is better. `gaussmix.sklearn.GaussianMixture`
    is the same engine with scikit-learn's names and sign.

    Parameters
    ----------
    num_components : int, default 1
        Number of components, k.
    covariance_type : {"full", "tied", "diag", "tied_diag", "spherical"}, default "diag"
        One matrix for each component, one for all, one variance for each component and feature, one for each feature
        (shared by all components: EEI in mclust), or one variance for each component.
    init_strategy : {"kmeans", "kmeans++", "random", "random_from_data"}, default "kmeans"
        How EM starts: rows belong to the nearest centroid of k-means, the nearest seed of k-means++, or the nearest of
        k rows drawn at random; "random" draws the responsibilities of each row instead. k-means and its seeds see a
        sample of at most max(8192, 256 k) rows.
    init_means : array-like of shape (k, d), optional
        Means to start from, handled as if k-means had found them. A mean without rows keeps its place, with weight 0.
    convergence_tolerance : float, default 1e-3
        EM stops when the mean log-likelihood of a row changes by less, in nats. 0 runs every iteration.
    covariance_regularization : float, default 1e-6
        Added to each variance, in squared units of the data.
    batch_size : int, optional
        Largest number of rows read at a time. EM is exact whatever it is; it only bounds memory.
    trainer_params : dict, optional
        Settings of a Lightning Trainer, of which these mean something here: `max_epochs`, the largest number of EM
        iterations (default 100); `accelerator` ("cpu", "gpu", "cuda", "auto") and `devices` ([i]), where rows are
        computed (default: where they are; results come back to where they were, and rows that a GPU has no room for
        pass through it in blocks); `precision` (32 or 64), the dtype of rows and results; `enable_progress_bar`, on
        stderr (default: where the level of the logger "gaussmix" is INFO).
        `devices` above 1, `num_nodes`, `strategy` and `plugins` have Lightning Fabric start processes that share the
        rows. `logger`, checkpoints and the like are ignored. Stored as passed.
    num_workers : int, default 0
        Processes that load a torch `Dataset` passed for X.
    random_state : int, RandomState instance or None, default None
        Seeds the start and `sample`. The same value gives the same start in every array library. None draws a fresh
        seed and leaves NumPy's global generator untouched.

    Attributes
    ----------
    weights_ : array of shape (k,)
    means_ : array of shape (k, d)
    covariances_, precisions_cholesky_ : array
        Shape (k, d, d) for "full", (d, d) for "tied", (k, d) for "diag", (d,) for "tied_diag", (k,) for "spherical". U
        is upper triangular with U U^T = Sigma^-1. Like all arrays here in the library, on the device and in the dtype
        of the data; where float32 has no room for what the factor says of the covariances (two features that nearly
        agree), they are in float64.
    covariance_type_ : str
        The covariance type of what was fitted.
    model_ : gaussmix.GaussianMixtureModel
        A torch module with the same memory, as `component_probs`, `means`, `precisions_cholesky`, and `covariances`.
        Without torch, an object with these attributes.
    converged_ : bool
        Whether the last change was below the tolerance.
    num_iter_ : int
        Number of EM iterations, whatever the batches.
    nll_ : float
        Mean negative log-likelihood of a row in the last E-step.
    lower_bounds_ : list of float
        Mean log-likelihood of a row at each iteration's E-step; that of the last step after `partial_fit`.
    n_steps_ : int
        Number of steps that `partial_fit` took since the last `fit`.
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

    @numpy_defaults
    @takes_data
    @by_block
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

    @numpy_defaults
    @takes_data
    @averaged
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

    @numpy_defaults
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
        check_is_fitted(self, "means_")
        check_integer("the number of rows to sample", num_datapoints, 1)
        return asarray_like(self._draw(num_datapoints)[0], self.means_)

    @numpy_defaults
    def to_sklearn(self) -> Any:
        """The same mixture as a `sklearn.mixture.GaussianMixture`, whose `score` is the negative of ours.

        `batch_size`, `num_workers` and all of `trainer_params` but `max_epochs` have no counterpart there.

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
        >>> from gaussmix import GaussianMixture
        >>> mixture = GaussianMixture(2, random_state=0).fit([[0.0], [1.0], [10.0], [11.0]])
        >>> abs(mixture.to_sklearn().score([[5.0]]) + mixture.score([[5.0]])) < 1e-9
        True
        """
        check_is_fitted(self, "means_")
        self._check_unchanged("to_sklearn")
        params = {
            "n_components": self.num_components,
            "covariance_type": self.covariance_type,
            "tol": self.convergence_tolerance,
            "reg_covar": self.covariance_regularization,
            "max_iter": (self.trainer_params or {}).get("max_epochs", self._max_epochs),
            "init_params": self.init_strategy.replace("kmeans++", "k-means++"),
            "means_init": self.init_means,
            "random_state": self.random_state,
        }
        fitted = _interop.attributes(self)
        if hasattr(self, "num_iter_"):
            fitted |= {"n_iter_": self.num_iter_, "lower_bound_": -self.nll_}
        return _interop.to_sklearn(self, params, fitted)

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
            With copies of its fitted attributes, in the library in which it holds them, and of the parameters that have
            a counterpart here: not `n_init`, `weights_init`, `precisions_init`, `warm_start` and `verbose`.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If `mixture` is not fitted.
        TypeError
            If it is of another class.

        Examples
        --------
        >>> import sklearn.mixture
        >>> from gaussmix import GaussianMixture
        >>> x = [[0.0], [1.0], [10.0], [11.0]]
        >>> mixture = GaussianMixture.from_sklearn(sklearn.mixture.GaussianMixture(2, random_state=0).fit(x))
        >>> sorted(round(mean, 6) for mean in mixture.means_[:, 0].tolist())
        [0.5, 10.5]
        """
        params, parameters, fitted = _interop.from_sklearn(mixture)
        converted = cls(
            params["n_components"],
            covariance_type=params["covariance_type"],
            init_strategy=params["init_params"].replace("k-means++", "kmeans++"),
            init_means=params["means_init"],
            convergence_tolerance=params["tol"],
            covariance_regularization=params["reg_covar"],
            trainer_params={"max_epochs": params["max_iter"]},
            random_state=params["random_state"],
        )
        converted._set_parameters(parameters, Rows(parameters.means))
        if "n_iter_" in fitted:
            fitted |= {"num_iter_": fitted.pop("n_iter_"), "nll_": -fitted.pop("lower_bound_")}
        for name, value in fitted.items():
            setattr(converted, name, value)
        return converted

    @property
    def model_(self) -> Any:
        """The mixture as a `gaussmix.GaussianMixtureModel`; without torch, an object with the same attributes."""
        if find_spec("torch") is None:
            return MixtureModel(self.weights_, self.means_, self.precisions_cholesky_, self.covariances_)
        from gaussmix.torch import GaussianMixtureModel

        return GaussianMixtureModel.of(self.weights_, self.means_, self.precisions_cholesky_, self._covariance.name)

    def _check_parameters(self) -> None:
        check_integer("num_components", self.num_components, 1)
        check_covariance_type(self.covariance_type)
        check_option("init_strategy", self.init_strategy, INIT_STRATEGIES)
        check_real("convergence_tolerance", self.convergence_tolerance)
        check_real("covariance_regularization", self.covariance_regularization)
        self._settings(warn=False)  # what is wrong with them is said before any row is read

    @property
    def _k(self) -> tuple[str, int]:
        return "num_components", self.num_components

    @property
    def _reg_covar(self) -> float:
        return self.covariance_regularization

    def _start(self, rows: Described) -> Found:
        means = self.init_means
        if means is not None:
            means = validate_array("init_means", means, (self.num_components, rows.shape[1]))
        return Found(self.num_components, self.init_strategy, means)

    def _plan(self, rows: Described) -> Plan:
        settings = self._settings()
        return Plan(
            objective=self._objective,
            start=self._start(rows),
            tolerance=self.convergence_tolerance,
            max_iter=settings.max_epochs,
            shows_bar=settings.progress_bar,
        )

    def _validated(self, X: Any, sample_weight: Any, group: Group | None) -> Any:
        fabric = self._settings(warn=False).fabric
        if group is not None and fabric is not None:
            raise ValueError(
                f"trainer_params starts processes ({fabric}), and distributed names some that are there; leave one of "
                "them out"
            )
        return super()._validated(X, sample_weight, group)

    def _runs(self, plan: Plan, rows: Rows | Stream | Share) -> Callable[[np.random.RandomState], tuple[EMResult, str]]:
        settings = self._settings(warn=False)
        if settings.fabric is None:
            return super()._runs(plan, rows)
        return partial(_launched, plan, settings, self._told(), shareable(rows))

    def _rounded(self, rows: Described) -> Described:
        return Rows(self._placement().rounded(rows.like[:0, :]))

    def _not_converged(self, n_iter: int) -> str:
        return (
            f"EM did not converge within {n_iter} iterations; increase trainer_params['max_epochs'] or "
            f"convergence_tolerance (now {self.convergence_tolerance:g})"
        )

    def _set_progress(self, lower_bounds: list[float], converged: bool) -> None:
        self.converged_, self.num_iter_, self.lower_bounds_ = converged, len(lower_bounds), lower_bounds
        self.nll_ = -lower_bounds[-1] if lower_bounds else float("inf")


def _launched(
    plan: Plan, settings: Settings, told: dict[str, Any], rows: Rows, random_state: np.random.RandomState
) -> tuple[EMResult, str]:
    """The fit in as many processes as the settings ask for."""
    assert settings.fabric is not None
    return launch(settings.fabric, partial(_shared, plan, settings, told, rows, random_state))


def _shared(
    plan: Plan, settings: Settings, told: dict[str, Any], rows: Rows, random_state: np.random.RandomState, group: Group
) -> tuple[EMResult, str]:
    """The fit in processes that all have the rows; with arrays in host memory, which travel between them."""
    group.compare(told | {"the shape of X": rows.shape})
    placement = replace(settings.placement, device=group.device)
    share = Share.of(rows.part(share_of(rows, group)), group)
    result, backend = plan(placement.placed(share), random_state)
    return replace(result, parameters=result.parameters.mapped(to_numpy)), backend
