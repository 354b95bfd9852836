"""What the estimators share: inference, sampling and persistence on top of fitted attributes."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, Self, TypeVar, cast

import numpy as np
from sklearn.base import BaseEstimator, DensityMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from gaussmix import _persistence
from gaussmix._arrays import array_namespace, asarray_like, floating_dtype
from gaussmix._covariance import COVARIANCES
from gaussmix._data import Rows, Stream
from gaussmix._dispatch import engine
from gaussmix._engine import Engine
from gaussmix._parameters import Parameters
from gaussmix._trainer import Settings, settings, trainer
from gaussmix._typing import Array
from gaussmix._validation import (
    check_covariance_type,
    check_integer,
    check_same_library,
    random_generator,
    validate_parameters,
    validate_rows,
)

Method = TypeVar("Method", bound=Callable[..., Any])


def takes_data(method: Method) -> Method:
    """The method, whose X may also be passed as `data`, PyCave's name for it."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "data" in kwargs:
            if args or "X" in kwargs:
                raise TypeError(f"{method.__name__}() got both X and data, which are the same argument; pass one")
            args = (kwargs.pop("data"),)
        return method(self, *args, **kwargs)

    return cast(Method, call)


class Persistent(BaseEstimator):
    """An estimator that is saved to a directory and loaded from it."""

    def __getattr__(self, name: str) -> Any:
        # Only for what is not there: a fitted attribute says why.
        is_fitted_later = any(name in getattr(cls, "__annotations__", ()) for cls in type(self).__mro__)
        if name.endswith("_") and (is_fitted_later or isinstance(getattr(type(self), name, None), property)):
            raise NotFittedError(f"{type(self).__name__} has no {name} before it is fitted; call fit first")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def persistent_attributes(self) -> list[str]:
        """Names of the fitted attributes that `save` writes; none before `fit`."""
        return [name for name in vars(self) if name[-1] == "_" and name[0] != "_"]

    def set_params(self, values: dict[str, Any] | None = None, **params: Any) -> Self:
        """Set parameters of the constructor.

        Parameters
        ----------
        values : dict, optional
            Parameters by name, as PyCave takes them.
        **params
            Parameters by name, as scikit-learn takes them.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For a name that is no parameter.
        """
        changed: Self = super().set_params(**(values or {}), **params)
        return changed

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the estimator to a directory, as `params.json` and, once fitted, `model.safetensors`.

        Files are written aside and renamed: an interrupted save leaves the files of the one before. Nothing in them is
        code, so that loading is safe whoever wrote them.

        Parameters
        ----------
        path : str or os.PathLike
            The directory; made where it does not exist.

        Raises
        ------
        NotADirectoryError
            If `path` is a file.
        TypeError
            If a constructor parameter can not be written as JSON.
        """
        _persistence.save(self, path)

    def save_parameters(self, path: str | os.PathLike[str]) -> None:
        """Write `params.json`, the constructor's parameters, to a directory: a part of `save`.

        Parameters
        ----------
        path : str or os.PathLike
            The directory; made where it does not exist.

        Raises
        ------
        NotADirectoryError, TypeError
            As `save`.
        """
        _persistence.save_parameters(self, path)

    def save_attributes(self, path: str | os.PathLike[str]) -> None:
        """Write `model.safetensors`, the fitted attributes, to a directory: a part of `save`.

        Parameters
        ----------
        path : str or os.PathLike
            The directory; made where it does not exist.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`.
        NotADirectoryError, TypeError
            As `save`.
        """
        _persistence.save_attributes(self, path)

    @classmethod
    def load_parameters(cls, path: str | os.PathLike[str]) -> Self:
        """An unfitted estimator with the parameters that are saved in a directory: a part of `load`.

        Parameters
        ----------
        path : str or os.PathLike
            The directory.

        Returns
        -------
        estimator

        Raises
        ------
        FileNotFoundError, ValueError
            As `load`.
        """
        return _persistence.load_parameters(cls, path)

    def load_attributes(self, path: str | os.PathLike[str]) -> None:
        """Take over the fitted attributes that are saved in a directory: a part of `load`.

        Parameters
        ----------
        path : str or os.PathLike
            The directory.

        Raises
        ------
        FileNotFoundError
            If the estimator that was saved there was not fitted.
        ValueError
            As `load`.
        """
        _persistence.load_attributes(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Self:
        """Read an estimator that `save` wrote, or PyCave 3 or torchgmm 0.1.

        Parameters
        ----------
        path : str or os.PathLike
            The directory.
        allow_pickle : bool, default False
            Whether to read PyCave's and torchgmm's `params.pickle` and `attributes.pickle`, which can run any code:
            only if you trust whoever wrote them. `save` writes no pickles.

        Returns
        -------
        estimator
            Its arrays are NumPy arrays, or torch tensors if PyCave or torchgmm wrote them; predictions follow the
            library of the data that they are made for.

        Raises
        ------
        FileNotFoundError
            If there is nothing to load at `path`.
        ValueError
            If the files are damaged, belong to another class or a newer version, or the parameters are a pickle.
        ImportError
            If PyCave or torchgmm wrote the files and torch is not installed.

        Warns
        -----
        UserWarning
            If `converged_`, `num_iter_` and the score of the fit are not loaded because they are a pickle.
        """
        return _persistence.load(cls, path, allow_pickle)

    def clone(self) -> Self:
        """An unfitted copy with the same parameters."""
        copy: Self = clone(self)
        return copy

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.array_api_support = True
        return tags


class Trained(Persistent):
    """An estimator with PyCave's `trainer_params`."""

    trainer_params: dict[str, Any] | None
    _max_epochs = 100

    @property
    def trainer_params_user(self) -> dict[str, Any] | None:
        """`trainer_params`, as the constructor was given them."""
        return self.trainer_params

    def trainer(self, **kwargs: Any) -> Any:
        """A Lightning Trainer with the estimator's settings; there for scripts that ask for one, not used by `fit`.

        Parameters
        ----------
        **kwargs
            Settings that take precedence over `trainer_params`.

        Returns
        -------
        trainer : pytorch_lightning.Trainer

        Raises
        ------
        ImportError
            If pytorch_lightning is not installed.
        """
        return trainer(self.trainer_params, {"max_epochs": self._max_epochs}, kwargs)

    def _settings(self, *, warn: bool = True) -> Settings:
        # A fit has said what there is to say about them: predictions say nothing.
        return settings(self.trainer_params, self._max_epochs, warn=warn)


class Mixture(DensityMixin, Persistent):
    """A fitted mixture is its attributes: `weights_`, `means_`, `covariances_` and `precisions_cholesky_`."""

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

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit the mixture to the rows of X; each estimator documents its own."""
        raise NotImplementedError

    @classmethod
    def from_parameters(cls, weights: Any, means: Any, covariances: Any, *, covariance_type: str) -> Self:
        """A fitted mixture with known parameters.

        Parameters
        ----------
        weights : array-like of shape (k,)
            Not negative, with sum 1.
        means : array-like of shape (k, d)
            Their library, device and dtype become those of all fitted arrays.
        covariances : array-like
            Shape (k, d, d) for "full", (d, d) for "tied", (k, d) for "diag", (k,) for "spherical".
        covariance_type : {"full", "tied", "diag", "spherical"}
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
        mixture._set_parameters(parameters, Rows(parameters.means))
        mixture.n_features_in_ = d
        return mixture

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

    @takes_data
    def predict(self, X: Any) -> Array:
        """Most probable component of each row.

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.

        Returns
        -------
        labels : array of shape (n,), int64
            In the library and on the device of X.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`.
        ValueError
            If X is not finite or has another number of features than the data of `fit`.
        """
        return self._on(X, "predict").labels()

    @takes_data
    def predict_proba(self, X: Any) -> Array:
        """Probability of each component given the row (its responsibility).

        Parameters
        ----------
        X : array-like of shape (n, d)
            The data.

        Returns
        -------
        responsibilities : array of shape (n, k)
            Rows sum to 1; in the library, on the device and in the dtype of X (float64 for integers).

        Raises
        ------
        sklearn.exceptions.NotFittedError, ValueError
            As `predict`.
        """
        return self._on(X, "predict_proba").responsibilities()

    def _on(self, X: Any, method: str) -> "_Inference":
        check_is_fitted(self, "means_")
        if not hasattr(self, "n_features_in_"):  # attributes set by hand
            self.n_features_in_ = self.means_.shape[1]
        rows = validate_rows(self, X, reset=False, batch_size=self.batch_size, num_workers=self.num_workers)
        check_same_library(rows.like, self, self.means_, method)
        return _Inference(rows, self._parameters, engine(self._placed(rows), COVARIANCES[self.covariance_type]))

    def _placed(self, rows: Rows | Stream) -> Rows | Stream:
        """The rows where they are to be computed."""
        return rows

    @property
    def _parameters(self) -> Parameters:
        return Parameters(self.weights_, self.means_, self.covariances_, self.precisions_cholesky_)

    def _set_parameters(self, parameters: Parameters, rows: Rows | Stream) -> None:
        """Publish parameters in the dtype of the data."""
        moved = parameters.moved(rows.like, floating_dtype(rows.like))
        self.weights_, self.means_ = moved.weights, moved.means
        self.covariances_, self.precisions_cholesky_ = moved.covariances, moved.precision_cholesky

    def _draw(self, n: int) -> Array:
        """N rows drawn from the mixture, grouped by component: (n, d)."""
        check_is_fitted(self, "means_")
        check_integer("the number of rows to sample", n, 1)
        random_state = random_generator(self.random_state)
        parameters = self._parameters.mapped(lambda value: asarray_like(value, np.empty(0)))
        counts = random_state.multinomial(n, parameters.weights / parameters.weights.sum())
        covariance = COVARIANCES[self.covariance_type]
        rows = np.concatenate(
            [
                mean
                + covariance.colorize(random_state.normal(size=(count, mean.size)), parameters.precision_cholesky, i)
                for i, (mean, count) in enumerate(zip(parameters.means, counts, strict=True))
            ]
        )
        return asarray_like(rows, self.means_)


class _Inference:
    """Predictions for some rows, as the caller sees them: in the floating dtype of the data."""

    def __init__(self, rows: Rows | Stream, parameters: Parameters, on_rows: Engine) -> None:
        self._engine = on_rows
        self._parameters = parameters.moved(on_rows.rows.like, on_rows.rows.dtype)
        self._like, self._dtype = rows.like, floating_dtype(rows.like)

    def labels(self) -> Array:
        labels = self._engine.labels(self._parameters)
        return asarray_like(labels, self._like, array_namespace(self._like).int64)

    def responsibilities(self) -> Array:
        return asarray_like(self._engine.responsibilities(self._parameters), self._like, self._dtype)

    def log_evidence(self) -> Array:
        return asarray_like(self._engine.log_evidence(self._parameters), self._like, self._dtype)

    def mean_log_evidence(self) -> float:
        evidence = self._engine.log_evidence(self._parameters)
        return float(array_namespace(evidence).mean(evidence))
