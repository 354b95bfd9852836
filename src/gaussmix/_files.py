"""Files of saved estimators and models: written whole or not at all, and read with a word for damage."""

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

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


def read_json(path: Path) -> Any:
    """What a file of JSON says."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise damaged(path, error) from error


def damaged(path: Path, why: object) -> ValueError:
    """The error for a file or directory that can not be read."""
    return ValueError(f"{path} is damaged: {why}; save it again")


def _umask() -> int:
    """The process's mask; mkstemp makes files that only their owner reads."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
