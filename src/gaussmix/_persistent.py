"""Estimators that are saved and loaded; with PyCave's `trainer_params`, or without."""

import hashlib
import os
from types import ModuleType
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError

from gaussmix._arrays import to_numpy
from gaussmix.compat._trainer import Settings, settings, trainer
from gaussmix.rows._placement import Placement, environment
from gaussmix.storage import _persistence

# Parameters of constructors that no fitted parameter depends on, or through what `_told` says instead.
WITHOUT_EFFECT = ("batch_size", "num_workers", "trainer_params", "verbose", "verbose_interval")


def described(value: Any) -> Any:
    """A setting as JSON has it, for comparison: an array is told by its contents, a generator by nothing."""
    if isinstance(value, (np.random.RandomState, ModuleType)):  # numpy.random is one, scikit-learn says
        return None
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    array = to_numpy(value).astype(np.float64)
    return {"shape": list(array.shape), "sha256": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}


class Persistent(BaseEstimator):
    """An estimator that is saved to a directory and loaded from it."""

    def __getattr__(self, name: str) -> Any:
        # Only for what is not there: a fitted attribute says why.
        computed = getattr(type(self), name, None)
        if isinstance(computed, property) and self.persistent_attributes:
            # What it needs is not there: asked for once more, that says so.
            return computed.__get__(self)
        is_fitted_later = any(name in getattr(cls, "__annotations__", ()) for cls in type(self).__mro__)
        if name.endswith("_") and (is_fitted_later or isinstance(computed, property)):
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
        TypeError, ValueError
            If a constructor parameter can not be written as JSON, or `load` would refuse a parameter or an attribute:
            NaN, names that no class annotates.
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
        NotADirectoryError, TypeError, ValueError
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
        NotADirectoryError, TypeError, ValueError
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
            If the files are damaged or incomplete, hold what no fit leaves, belong to another class or a newer version,
            or the parameters are a pickle.
        ImportError
            If PyCave or torchgmm wrote the files and torch is not installed.

        Warns
        -----
        UserWarning
            If `converged_`, `num_iter_` and the score of the fit are not loaded because they are a pickle, and if
            gaussmix 0.1.0 wrote the files: without a digest of all that they say, damage may go unnoticed.
        """
        return _persistence.load(cls, path, allow_pickle)

    def clone(self) -> Self:
        """An unfitted copy with the same parameters."""
        copy: Self = clone(self)
        return copy

    def _placement(self) -> Placement:
        """Where rows are to be computed."""
        return environment()

    def _told(self) -> dict[str, Any]:
        """What the constructor was told that a fit depends on, as JSON has it; arrays by their contents."""
        params = self.get_params(deep=False)
        return {name: described(value) for name, value in params.items() if name not in WITHOUT_EFFECT}

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

    def _placement(self) -> Placement:
        return self._settings(warn=False).placement

    def _told(self) -> dict[str, Any]:
        settings = self._settings(warn=False)
        return super()._told() | {"max_epochs": settings.max_epochs, "precision": settings.placement.dtype}
