"""Estimators as directories: `params.json` and, once fitted, `model.safetensors`.

The safetensors file holds the fitted arrays and, in its metadata, everything else, the constructor's parameters
included. It is complete on its own, so that its renaming is the moment at which a save happens: whatever interrupts a
save, what is loaded is wholly the old or wholly the new estimator. `params.json` states the parameters for people, and
is what an unfitted estimator consists of.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from array_api_compat import is_array_api_obj
from sklearn.utils.validation import check_is_fitted

from gaussmix import _old_models
from gaussmix._arrays import to_numpy
from gaussmix._files import damaged, make_folder, read_arrays, read_json, replace, with_arrays

FORMAT = 1
PARAMS, MODEL = "params.json", "model.safetensors"

E = TypeVar("E")


def save(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write the estimator to the directory `path`."""
    params = _statement(estimator)
    model = _model(estimator, params) if estimator.persistent_attributes else None
    folder = make_folder(path)
    if model is not None:
        replace(folder / MODEL, model)
    replace(folder / PARAMS, json.dumps(params, indent=2).encode())
    if model is None:
        (folder / MODEL).unlink(missing_ok=True)


def save_parameters(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write the constructor's parameters to the directory `path`."""
    params = _statement(estimator)
    replace(make_folder(path) / PARAMS, json.dumps(params, indent=2).encode())


def save_attributes(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write the fitted attributes to the directory `path`."""
    check_is_fitted(estimator)
    model = _model(estimator, _statement(estimator))
    replace(make_folder(path) / MODEL, model)


def load(cls: type[E], path: str | os.PathLike[str], allow_pickle: bool = False) -> E:
    """Read an estimator of this class from the directory `path`."""
    folder = Path(path)
    if not (folder / MODEL).is_file() and _old_models.is_one(folder):
        return _old_models.load(cls, folder, allow_pickle)
    estimator, attributes = _read(cls, folder)
    vars(estimator).update(attributes)
    return estimator


def load_parameters(cls: type[E], path: str | os.PathLike[str]) -> E:
    """Read an estimator of this class, without its fitted attributes, from the directory `path`."""
    return _read(cls, Path(path))[0]


def load_attributes(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Read the fitted attributes of an estimator of this class from the directory `path`."""
    folder = Path(path)
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(f"{folder} holds no fitted attributes: {MODEL} is not there; fit the estimator first")
    vars(estimator).update(_read(type(estimator), folder)[1])


def _read(cls: type[E], folder: Path) -> tuple[E, dict[str, Any]]:
    """An unfitted estimator, and its fitted attributes."""
    if (folder / MODEL).is_file():
        arrays, metadata = read_arrays(folder / MODEL)
    elif (folder / PARAMS).is_file():
        arrays, metadata = {}, read_json(folder / PARAMS)
    else:
        raise FileNotFoundError(f"{folder} holds no saved estimator: neither {MODEL} nor {PARAMS} is there")
    _check_header(cls, metadata, folder)
    try:
        estimator = cls(**{name: _decode(value) for name, value in metadata["params"].items()})
        attributes = {name: _decode(value) for name, value in metadata.get("attributes", {}).items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"{error}, so that it is no {cls.__name__}") from error
    return estimator, attributes | arrays


def _statement(estimator: Any) -> dict[str, Any]:
    """What `params.json` says."""
    return {"format": FORMAT, "class": _class_name(type(estimator)), "params": _parameters(estimator)}


def _model(estimator: Any, params: dict[str, Any]) -> bytes:
    """What `model.safetensors` holds."""
    fitted = {name: getattr(estimator, name) for name in estimator.persistent_attributes}
    arrays = {name: np.ascontiguousarray(to_numpy(value)) for name, value in fitted.items() if _is_numeric(value)}
    attributes = {name: _encode(name, value) for name, value in fitted.items() if name not in arrays}
    return with_arrays(arrays, params | {"attributes": attributes})


def _class_name(cls: type) -> str:
    """The class that the files are of: of those that `gaussmix.accel` puts in PyCave's place, the one that they are."""
    cls = getattr(cls, "_stands_for", cls)
    return f"{cls.__module__}.{cls.__qualname__}"


def _check_header(cls: type, metadata: Any, folder: Path) -> None:
    if not isinstance(metadata, dict) or "format" not in metadata or "class" not in metadata:
        raise ValueError(f"{folder} was not written by gaussmix; files of other libraries can not be loaded")
    if metadata["format"] != FORMAT:
        raise ValueError(
            f"{folder} has format {metadata['format']}, this version reads format {FORMAT}; update gaussmix"
        )
    expected = _class_name(cls)
    if metadata["class"] != expected:
        raise ValueError(f"{folder} holds a {metadata['class']}, not a {expected}; load it with that class")


def _parameters(estimator: Any) -> dict[str, Any]:
    params = estimator.get_params(deep=False)
    if isinstance(params.get("random_state"), np.random.RandomState):
        warnings.warn(
            "random_state is a generator, which is not saved; the loaded estimator has random_state=None (pass an "
            "integer to keep it)",
            UserWarning,
            stacklevel=5,
        )
        params["random_state"] = None
    return {name: _encode(name, value) for name, value in params.items()}


def _is_numeric(value: Any) -> bool:
    return is_array_api_obj(value) and getattr(value.dtype, "kind", "f") not in "OUS" and value.ndim > 0


def _encode(name: str, value: Any) -> Any:
    """A value as JSON has it; arrays keep their dtype."""
    if is_array_api_obj(value) and not isinstance(value, np.generic):
        value = to_numpy(value)
        return {"array": value.tolist(), "dtype": value.dtype.name}
    if isinstance(value, np.generic):
        value = value.item()
    try:
        json.dumps(value)
    except TypeError as error:
        raise TypeError(f"{name}={value!r} can not be saved: it is no JSON value ({error})") from error
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"array", "dtype"}:
        return np.asarray(value["array"], dtype=value["dtype"])
    return value
