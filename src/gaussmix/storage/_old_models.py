"""Estimators that PyCave 3 and torchgmm 0.1 saved.

Their directories hold `params.json`, `attributes.json` and, in `model_` or `model`, the module's `config.json` and
`parameters.pt`. What was no JSON they pickled: parameters with `init_means`, and the attributes of nearly every fit, as
the module is among them. `params.pickle` and `attributes.pickle` can run code when they are read, and are read only
where the caller allows it.
"""

import pickle
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gaussmix._checks import REPORTS
from gaussmix._files import UNREADABLE, damaged, read_json

PARAMS, PICKLED_PARAMS = "params.json", "params.pickle"
ATTRIBUTES, PICKLED_ATTRIBUTES = "attributes.json", "attributes.pickle"
MODELS = ("model_", "model")
# The parameter by which the files tell the class.
CLASSES = {"num_components": "GaussianMixture", "num_clusters": "KMeans"}
# What both libraries add to the user's trainer_params before they save them.
ADDED = {"logger": False, "log_every_n_steps": 1, "enable_checkpointing": False, "enable_model_summary": False}
SCALARS = ("converged_", "num_iter_", "nll_", "inertia_")


def is_one(folder: Path) -> bool:
    """Whether PyCave or torchgmm wrote this directory."""
    if not (folder / PARAMS).is_file():
        return (folder / PICKLED_PARAMS).is_file()
    try:
        params = read_json(folder / PARAMS)
    except ValueError:
        return _model_folder(folder) is not None
    return isinstance(params, dict) and not params.keys().isdisjoint(CLASSES)


def load(cls: type[Any], folder: Path, allow_pickle: bool) -> Any:
    """Read an estimator of this class; its arrays are torch tensors on the CPU."""
    params = _params(cls, folder, allow_pickle)
    try:
        estimator = cls(**params)
    except TypeError as error:
        raise damaged(folder, error) from error
    model = _model_folder(folder)
    if model is not None:
        vars(estimator).update(_fitted(model, params) | _attributes(folder, allow_pickle))
        if "num_components" in params:
            estimator.covariances_ = estimator.covariances_  # derived from the factor, and from now on kept
    elif there := [name for name in (ATTRIBUTES, PICKLED_ATTRIBUTES) if (folder / name).is_file()]:
        raise damaged(folder, f"{there[0]} is there, but no model")
    return estimator


def _model_folder(folder: Path) -> Path | None:
    # A link to nothing is no estimator that was not fitted.
    return next((folder / name for name in MODELS if (folder / name).is_dir() or (folder / name).is_symlink()), None)


def _params(cls: Any, folder: Path, allow_pickle: bool) -> dict[str, Any]:
    """The constructor's parameters."""
    path = folder / PARAMS
    if path.is_file():
        params = read_json(path)
    else:
        path = folder / PICKLED_PARAMS
        if not allow_pickle:
            raise ValueError(
                f"{path} is a pickle, which can run code when it is read; pass allow_pickle=True if you trust whoever "
                "wrote it"
            )
        params = _unpickle(path)
    if not isinstance(params, dict):
        raise damaged(path, "it does not hold the parameters of an estimator")
    known = set(cls._get_param_names())
    for name, title in CLASSES.items():
        if name in params and name not in known:
            raise ValueError(f"{folder} holds a {title} of PyCave or torchgmm; load it with gaussmix.{title}")
    if "num_workers" not in known:  # PyCave's KMeans had it for a while; it changes nothing here
        params.pop("num_workers", None)
    if unknown := sorted(params.keys() - known):
        raise ValueError(
            f"{path} has parameters that gaussmix.{cls.__name__} does not know, {unknown}; remove them from the file, "
            "or update gaussmix"
        )
    settings = params.get("trainer_params")
    if isinstance(settings, dict):
        kept = {name: value for name, value in settings.items() if name not in ADDED or value != ADDED[name]}
        params["trainer_params"] = kept
    return params


def _fitted(folder: Path, params: dict[str, Any]) -> dict[str, Any]:
    """The fitted arrays."""
    try:
        import torch

        from gaussmix.torch import GaussianMixtureModel, KMeansModel
    except ImportError as error:
        raise ImportError(f"{folder} holds torch tensors; run pip install gaussmix[torch] to read them") from error
    model: Any
    if "num_components" in params:
        model = GaussianMixtureModel.load(folder)
        arrays = {
            "weights_": model.component_probs,
            "means_": model.means,
            "precisions_cholesky_": model.precisions_cholesky,
        }
    else:
        model = KMeansModel.load(folder)
        arrays = {"centroids_": model.centroids}
    config = asdict(model.config)
    if differing := sorted(name for name in config.keys() & params.keys() if config[name] != params[name]):
        raise damaged(folder, f"{differing} are not those of the estimator's parameters")
    for name, array in arrays.items():
        if not bool(torch.isfinite(array).all()):
            raise ValueError(f"{folder}: {name} contains NaN or infinity, the fit had failed; fit again")
    return {**arrays, "n_features_in_": model.config.num_features}


def _attributes(folder: Path, allow_pickle: bool) -> dict[str, Any]:
    """How the fit went: what of SCALARS is there and may be read."""
    path = folder / ATTRIBUTES
    if path.is_file():
        values = read_json(path)
    elif (path := folder / PICKLED_ATTRIBUTES).is_file():
        if not allow_pickle:
            warnings.warn(
                f"converged_, num_iter_ and the score of the fit are not loaded: {path} is a pickle, which can run "
                "code when it is read; pass allow_pickle=True if you trust whoever wrote it",
                UserWarning,
                stacklevel=5,
            )
            return {}
        values = _unpickle(path)
    else:
        return {}
    if not isinstance(values, dict):
        raise damaged(path, "it does not hold the attributes of an estimator")
    # Pickles may have scalars of other libraries.
    found = {name: getattr(values[name], "item", lambda n=name: values[n])() for name in SCALARS if name in values}
    try:
        for name, value in found.items():
            REPORTS[name](name, value)
    except (TypeError, ValueError) as error:
        raise damaged(path, error) from error
    return found


class _Unpickler(pickle.Unpickler):
    """Puts stand-ins for what is not installed: beside the scalars, the file holds objects of PyCave's classes."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except UNREADABLE as error:
        raise damaged(path, error) from error
