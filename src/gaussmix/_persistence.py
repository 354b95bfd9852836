"""Estimators as directories: `params.json` and, once fitted, `model.safetensors`.

The safetensors file holds the fitted arrays and, in its metadata, everything else, the constructor's parameters
included. It is complete on its own, so that its renaming is the moment at which a save happens: whatever interrupts a
save, what is loaded is wholly the old or wholly the new estimator. `params.json` states the parameters for people, and
is what an unfitted estimator consists of.
"""

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from array_api_compat import is_array_api_obj
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from gaussmix._arrays import to_numpy

FORMAT = 1
PARAMS, MODEL = "params.json", "model.safetensors"

E = TypeVar("E")


def save(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write the estimator to the directory `path`."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; pass the path of a directory")
    params = _header(estimator) | {"params": _parameters(estimator)}
    fitted = {name: value for name, value in vars(estimator).items() if name.endswith("_") and name[0] != "_"}
    arrays = {name: np.ascontiguousarray(to_numpy(value)) for name, value in fitted.items() if _is_numeric(value)}
    attributes = {name: _encode(name, value) for name, value in fitted.items() if name not in arrays}

    folder.mkdir(parents=True, exist_ok=True)
    statement = json.dumps(params, indent=2).encode()
    if fitted:
        metadata = params | {"attributes": attributes, "sha256": _digest(arrays)}
        _replace(folder / MODEL, serialize(arrays, {"gaussmix": json.dumps(metadata)}))
    _replace(folder / PARAMS, statement)
    if not fitted:
        (folder / MODEL).unlink(missing_ok=True)


def load(cls: type[E], path: str | os.PathLike[str]) -> E:
    """Read an estimator of this class from the directory `path`."""
    folder = Path(path)
    if (folder / MODEL).is_file():
        arrays, metadata = _read_model(folder / MODEL)
    elif (folder / PARAMS).is_file():
        arrays, metadata = {}, _read_params(folder / PARAMS)
    else:
        raise FileNotFoundError(f"{folder} holds no saved estimator: neither {MODEL} nor {PARAMS} is there")
    _check_header(cls, metadata, folder)
    try:
        estimator = cls(**{name: _decode(value) for name, value in metadata["params"].items()})
        attributes = {name: _decode(value) for name, value in metadata.get("attributes", {}).items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is damaged or not a saved {cls.__name__} ({error}); save it again") from error
    vars(estimator).update(attributes | arrays)
    return estimator


def _header(estimator: Any) -> dict[str, Any]:
    cls = type(estimator)
    return {"format": FORMAT, "class": f"{cls.__module__}.{cls.__qualname__}"}


def _check_header(cls: type, metadata: Any, folder: Path) -> None:
    if not isinstance(metadata, dict) or "format" not in metadata or "class" not in metadata:
        raise ValueError(f"{folder} was not written by gaussmix; files of other libraries can not be loaded")
    if metadata["format"] != FORMAT:
        raise ValueError(
            f"{folder} has format {metadata['format']}, this version reads format {FORMAT}; update gaussmix"
        )
    expected = f"{cls.__module__}.{cls.__qualname__}"
    if metadata["class"] != expected:
        raise ValueError(f"{folder} holds a {metadata['class']}, not a {expected}; load it with that class")


def _parameters(estimator: Any) -> dict[str, Any]:
    params = estimator.get_params(deep=False)
    if isinstance(params.get("random_state"), np.random.RandomState):
        warnings.warn(
            "random_state is a generator, which is not saved; the loaded estimator has random_state=None (pass an "
            "integer to keep it)",
            UserWarning,
            stacklevel=4,
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


def _digest(arrays: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _read_model(path: Path) -> tuple[dict[str, Any], Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get("gaussmix", "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; save the estimator again") from error
    if isinstance(metadata, dict) and metadata.get("sha256") != _digest(arrays):
        raise ValueError(f"{path} is damaged: its arrays are not those that were saved; save the estimator again")
    return arrays, metadata


def _read_params(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; save the estimator again") from error


def _replace(path: Path, content: bytes) -> None:
    """Write a file aside, then rename it into place."""
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def _umask() -> int:
    """The process's mask; mkstemp makes files that only their owner reads."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
