"""Files of saved estimators and models: written whole or not at all, and read with a word for damage."""

import hashlib
import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

SAVE_AGAIN = "save it again"
# What reading a damaged pickle raises.
UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The directory `path`; made where it does not exist."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; pass the path of a directory")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def replace(path: Path, content: bytes) -> None:
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


def with_arrays(arrays: dict[str, Any], metadata: dict[str, Any]) -> bytes:
    """A safetensors file of NumPy arrays and of JSON, for `read_arrays`."""
    return serialize(arrays, {"gaussmix": json.dumps(metadata | {"sha256": _digest(arrays)})})


def read_arrays(path: Path, remedy: str = SAVE_AGAIN) -> tuple[dict[str, Any], Any]:
    """The arrays and the JSON of a safetensors file; raises where they are not those that were written."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get("gaussmix", "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError) as error:
        raise damaged(path, error, remedy) from error
    if isinstance(metadata, dict) and metadata.get("sha256") != _digest(arrays):
        raise damaged(path, "its arrays are not those that were saved", remedy)
    return arrays, metadata


def _digest(arrays: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """What a file of JSON says."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise damaged(path, error) from error


def damaged(path: Path, why: object, remedy: str = SAVE_AGAIN) -> ValueError:
    """The error for a file or directory that can not be read."""
    return ValueError(f"{path} is damaged: {why}; {remedy}")


def _umask() -> int:
    """The process's mask; mkstemp makes files that only their owner reads."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
