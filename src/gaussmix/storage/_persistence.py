"""Estimators as directories: `params.json` and, once fitted, `model.safetensors`.

The safetensors file holds the fitted arrays and, in its metadata, everything else, the constructor's parameters
included. It is complete on its own, so that its renaming is the moment at which a save happens: whatever interrupts a
save, what is loaded is wholly the old or wholly the new estimator. `params.json` states the parameters for people, says
whether there is a model beside it, and is what an unfitted estimator consists of.

Both carry a digest of all that they say, for damage. Whoever means harm can compute one too: names, types, shapes and
values are checked as well, on saving by the same function, so that what is written can be read.
"""

import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from array_api_compat import is_array_api_obj
from sklearn import config_context
from sklearn.utils.validation import check_is_fitted

from gaussmix._arrays import to_numpy
from gaussmix._checks import (
    REPORTS,
    check_covariance_type,
    check_integer,
    check_mixture,
    check_type,
    random_generator,
    validate_array,
)
from gaussmix._files import (
    as_path,
    check_digest,
    damaged,
    make_folder,
    read_arrays,
    read_json,
    replace,
    with_arrays,
    with_digest,
)
from gaussmix.storage import _old_models

# 1, which version 0.1.0 wrote, has digests of the arrays alone, and in `params.json` no word of a model.
FORMAT = 2
PARAMS, MODEL = "params.json", "model.safetensors"
MIXTURE, CLUSTERING = ("weights_", "means_", "covariances_", "precisions_cholesky_"), ("centroids_",)
DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
NAMES = ("object",)  # the dtype of feature_names_in_, which are a list of strings in JSON
# What values of another kind than is expected raise.
INVALID = (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)

E = TypeVar("E")


def save(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write the estimator to the directory `path`."""
    params = _statement(estimator)
    model = _model(estimator, params) if _is_fitted(estimator) else None
    folder = make_folder(path)
    if model is not None:
        replace(folder / MODEL, model)
    _write_statement(folder, params, fitted=model is not None)
    if model is None:
        (folder / MODEL).unlink(missing_ok=True)


def save_parameters(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write the constructor's parameters to the directory `path`."""
    params = _statement(estimator)
    folder = make_folder(path)
    _write_statement(folder, params, fitted=os.path.lexists(folder / MODEL))


def save_attributes(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write the fitted attributes to the directory `path`."""
    check_is_fitted(estimator)
    params = _statement(estimator)
    model = _model(estimator, params)
    folder = make_folder(path)
    replace(folder / MODEL, model)
    if (folder / PARAMS).is_file():
        _write_statement(folder, params, fitted=True)


def load(cls: type[E], path: str | os.PathLike[str], allow_pickle: bool = False) -> E:
    """Read an estimator of this class from the directory `path`."""
    folder = as_path(path)
    if not os.path.lexists(folder / MODEL) and _old_models.is_one(folder):
        estimator = _old_models.load(cls, folder, allow_pickle)
        try:
            _check_parameters(estimator)
        except INVALID as error:
            raise damaged(folder, error) from error
        return estimator
    estimator, attributes = _read(cls, folder, as_a_whole=True)
    vars(estimator).update(attributes)
    return estimator


def load_parameters(cls: type[E], path: str | os.PathLike[str]) -> E:
    """Read an estimator of this class, without its fitted attributes, from the directory `path`."""
    return _read(cls, as_path(path))[0]


def load_attributes(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Read the fitted attributes of an estimator of this class from the directory `path`."""
    folder = as_path(path)
    if not os.path.lexists(folder / MODEL):
        raise FileNotFoundError(f"{folder} holds no fitted attributes: {MODEL} is not there; fit the estimator first")
    saved, attributes = _read(type(estimator), folder)
    types = [getattr(each, "covariance_type", None) for each in (saved, estimator)]
    if "covariance_type_" not in attributes and types[0] != types[1]:
        raise ValueError(
            f"{folder} holds attributes of covariance_type={types[0]!r}, and the estimator has {types[1]!r}; set the "
            "parameter, or load the whole estimator"
        )
    for name in estimator.persistent_attributes:  # those of another fit, which the file may not have
        vars(estimator).pop(name, None)
    vars(estimator).update(attributes)


def _read(cls: type[E], folder: Path, *, as_a_whole: bool = False) -> tuple[E, dict[str, Any]]:
    """An unfitted estimator, and its fitted attributes."""
    if os.path.lexists(folder / MODEL):
        arrays, metadata = read_arrays(folder / MODEL)
        _check_header(cls, metadata, folder)
    elif (folder / PARAMS).is_file():
        arrays, metadata = None, read_json(folder / PARAMS)
        _check_header(cls, metadata, folder)
        check_digest(folder / PARAMS, metadata)
        if as_a_whole and metadata.get("fitted", False) is not False:
            raise damaged(folder, f"{PARAMS} says that the estimator was fitted, but {MODEL} is not there")
    else:
        raise FileNotFoundError(f"{folder} holds no saved estimator: neither {MODEL} nor {PARAMS} is there")
    try:
        estimator = _unfitted(cls, metadata["params"])
        attributes = {}
        if arrays is not None:
            decoded = {name: _decode(value, NAMES) for name, value in metadata["attributes"].items()}
            attributes = decoded | arrays
            _check_attributes(estimator, attributes)
    except INVALID as error:
        raise damaged(folder, f"{error}, so that it is no {cls.__name__}") from error
    return estimator, attributes


def _unfitted(cls: type[E], params: dict[str, Any]) -> E:
    """An estimator with these parameters, as JSON has them."""
    estimator = cls(**{name: _decode(value) for name, value in params.items()})
    _check_parameters(estimator)
    return estimator


def _statement(estimator: Any) -> dict[str, Any]:
    """What both files say: the class and its parameters."""
    params = _parameters(estimator)
    _unfitted(type(estimator), params)
    return {"format": FORMAT, "class": _class_name(type(estimator)), "params": params}


def _write_statement(folder: Path, params: dict[str, Any], *, fitted: bool) -> None:
    """Write `params.json`."""
    replace(folder / PARAMS, with_digest(params | {"fitted": fitted}))


def _model(estimator: Any, params: dict[str, Any]) -> bytes:
    """What `model.safetensors` holds."""
    names = estimator.persistent_attributes
    if "means_" in names and "covariances_" not in names:
        names.append("covariances_")  # derived, where attributes were set by hand
    fitted = {name: getattr(estimator, name) for name in names}
    arrays = {name: _native(to_numpy(value)) for name, value in fitted.items() if _is_numeric(value)}
    attributes = {name: _encode(name, value) for name, value in fitted.items() if name not in arrays}
    _check_attributes(estimator, arrays | {name: _decode(value, NAMES) for name, value in attributes.items()})
    return with_arrays(arrays, params | {"attributes": attributes})


def _native(array: Any) -> Any:
    """The array as the file has it: contiguous, in the byte order of the machine."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _is_fitted(estimator: Any) -> bool:
    """Whether there is a model to save: a fit that failed leaves the number of features alone."""
    return not set(estimator.persistent_attributes).isdisjoint({*MIXTURE, *CLUSTERING})


def _class_name(cls: type) -> str:
    """The class that the files are of: of those that `gaussmix.accel` puts in PyCave's place, the one that they are."""
    cls = getattr(cls, "_stands_for", cls)
    return f"{cls.__module__}.{cls.__qualname__}"


def _check_header(cls: type, metadata: Any, folder: Path) -> None:
    if not (
        isinstance(metadata, dict)
        and isinstance(metadata.get("format"), int)
        and isinstance(metadata.get("class"), str)
    ):
        raise ValueError(f"{folder} was not written by gaussmix; files of other libraries can not be loaded")
    if metadata["format"] not in range(1, FORMAT + 1):
        raise ValueError(
            f"{folder} has format {metadata['format']}, this version reads formats up to {FORMAT}; update gaussmix"
        )
    expected = _class_name(cls)
    if metadata["class"] != expected:
        raise ValueError(f"{folder} holds a {metadata['class']:.200}, not a {expected}; load it with that class")


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


def _decode(value: Any, others: tuple[str, ...] = ()) -> Any:
    if not (isinstance(value, dict) and value.keys() == {"array", "dtype"}):
        return value
    if value["dtype"] not in (*DTYPES, *others):
        raise ValueError(f"an array has dtype {value['dtype']!r}")
    with np.errstate(over="ignore"):  # what has no room is not finite, which is found
        return np.asarray(value["array"], dtype=value["dtype"])


def _check_parameters(estimator: Any) -> None:
    """Raise for parameters of the constructor that are none, or mean nothing."""
    with config_context(skip_parameter_validation=False):
        estimator._check_parameters()
    for name, value in estimator.get_params(deep=False).items():
        if name in PARAMETERS:
            PARAMETERS[name](name, value)


def _check_attributes(estimator: Any, attributes: dict[str, Any]) -> None:
    """Raise unless these are the attributes that a fit of the estimator leaves."""
    declared = {name for cls in type(estimator).__mro__ for name in getattr(cls, "__annotations__", ())}
    known = {name for name in declared if name[-1] == "_" and name[0] != "_"} | {"feature_names_in_"}
    if unknown := sorted(attributes.keys() - known):
        raise TypeError(f"{unknown} are no fitted attributes of {type(estimator).__name__}; a class annotates its own")
    names = MIXTURE if "means_" in known else CLUSTERING
    if missing := [name for name in names if name not in attributes]:
        raise ValueError(f"{missing} are not there")
    for name, value in attributes.items():
        if name in ATTRIBUTES:
            ATTRIBUTES[name](name, value)
    points = attributes["means_" if names is MIXTURE else "centroids_"]
    k, d = points.shape
    if names is MIXTURE:
        covariance = check_covariance_type(attributes.get("covariance_type_", estimator.covariance_type))
        check_mixture(attributes["weights_"], points, attributes["precisions_cholesky_"], covariance)
        for name in {"covariances_", "precisions_"} & attributes.keys():
            matrices = validate_array(name, attributes[name], covariance.shape(k, d))
            if (covariance.variances(matrices) < 0).any():
                raise ValueError(f"{name} has a negative value on its diagonal")
    else:
        validate_array("centroids_", points, (k, d))
    if 0 in (k, d) or attributes.get("n_features_in_", d) != d:
        raise ValueError(f"there are {k} components of {d} features, and n_features_in_ is another")
    if len(attributes.get("feature_names_in_", range(d))) != d:
        raise ValueError(f"feature_names_in_ has not {d} names")


def _names(name: str, value: Any) -> None:
    check_type(name, value, np.ndarray)
    if value.ndim != 1 or not all(isinstance(each, str) for each in value.tolist()):
        raise TypeError(f"{name} must be strings, got {value!r}")


def _numbers(name: str, value: Any) -> None:
    array = np.asarray(to_numpy(value) if is_array_api_obj(value) else value, dtype=np.float64)
    if array.ndim == 0 or not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be an array of finite numbers, got {value!r}")


def _optional(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    return lambda name, value: None if value is None else check(name, value)


# What the parameters of constructors may be, beside what `_check_parameters` of their estimators says.
PARAMETERS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("init_means", "weights_init", "means_init", "precisions_init"), _optional(_numbers)),
    "batch_size": _optional(lambda name, value: check_integer(name, value, 1)),
    "num_workers": lambda name, value: check_integer(name, value, 0),
    "random_state": lambda name, value: random_generator(value),
    "trainer_params": _optional(partial(check_type, kind=dict)),
}
# What fitted attributes may be.
ATTRIBUTES: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys((*MIXTURE, "precisions_", *CLUSTERING), partial(check_type, kind=np.ndarray)),
    **REPORTS,
    "covariance_type_": lambda name, value: check_covariance_type(value),
    "feature_names_in_": _names,
    "n_features_in_": lambda name, value: check_integer(name, value, 1),
}
