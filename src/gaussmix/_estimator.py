"""What the estimators share: inference, sampling and persistence on top of fitted attributes."""

import os
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, DensityMixin, clone
from sklearn.utils.validation import check_is_fitted

from gaussmix import _persistence
from gaussmix._arrays import array_namespace, asarray_like, floating_dtype
from gaussmix._covariance import COVARIANCES
from gaussmix._data import Rows
from gaussmix._dispatch import engine
from gaussmix._engine import Engine
from gaussmix._parameters import Parameters
from gaussmix._typing import Array
from gaussmix._validation import (
    check_covariance_type,
    check_integer,
    check_same_library,
    random_generator,
    validate_parameters,
    validate_rows,
)


class Persistent(BaseEstimator):
    """An estimator that is saved to a directory and loaded from it."""

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

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read an estimator that `save` wrote.

        Parameters
        ----------
        path : str or os.PathLike
            The directory.

        Returns
        -------
        estimator
            Its arrays are NumPy arrays; predictions follow the library of the data that they are made for.

        Raises
        ------
        FileNotFoundError
            If there is nothing to load at `path`.
        ValueError
            If the files are damaged, or belong to another class or a newer version.
        """
        return _persistence.load(cls, path)

    def clone(self) -> Self:
        """An unfitted copy with the same parameters."""
        copy: Self = clone(self)
        return copy

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.array_api_support = True
        return tags


class Mixture(DensityMixin, Persistent):
    """A fitted mixture is its attributes: `weights_`, `means_`, `covariances_` and `precisions_cholesky_`."""

    covariance_type: str
    random_state: Any
    batch_size: int | None = None

    weights_: Array
    means_: Array
    covariances_: Array
    precisions_cholesky_: Array

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
        rows = validate_rows(self, X, reset=False, batch_size=self.batch_size)
        check_same_library(rows.array, self, self.means_, method)
        return _Inference(rows, self._parameters, engine(rows, COVARIANCES[self.covariance_type]))

    @property
    def _parameters(self) -> Parameters:
        return Parameters(self.weights_, self.means_, self.covariances_, self.precisions_cholesky_)

    def _set_parameters(self, parameters: Parameters, rows: Rows) -> None:
        """Publish parameters in the dtype of the data."""
        moved = parameters.moved(rows.array, floating_dtype(rows.array))
        self.weights_, self.means_ = moved.weights, moved.means
        self.covariances_, self.precisions_cholesky_ = moved.covariances, moved.precision_cholesky

    def _draw(self, n: int) -> tuple[Array, Array]:
        """N rows drawn from the mixture, grouped by component, and their labels."""
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
        xp = array_namespace(self.means_)
        labels = np.repeat(np.arange(counts.size), counts)
        return asarray_like(rows, self.means_), asarray_like(labels, self.means_, xp.int64)


class _Inference:
    """Predictions for some rows, as the caller sees them: in the floating dtype of the data."""

    def __init__(self, rows: Rows, parameters: Parameters, on_rows: Engine) -> None:
        self._engine = on_rows
        self._parameters = parameters.moved(on_rows.rows.array, on_rows.rows.dtype)
        self._like, self._dtype = rows.array, floating_dtype(rows.array)

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
