"""Files of saved estimators and models: written whole or not at all, and read with a word for damage."""

import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

# Seconds after which a file that was written aside, and not renamed, has lost its writer.
ABANDONED = 3600
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
    """Write a file aside, then rename it into place; what others left aside long ago is removed."""
    prefix, suffix = f".{path.name}.", ".aside"
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=suffix)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            now = os.fstat(file.fileno()).st_mtime  # as the file system counts, which may not be here
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
    for other in path.parent.iterdir():
        if other.name.startswith(prefix) and other.name.endswith(suffix):
            with suppress(OSError):
                if now - other.lstat().st_mtime > ABANDONED:
                    other.unlink()


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether the file `path` is this process's alone for now, as far as others ask: by a lock on a file beside it.

    The system takes the lock from a process that dies, and what is left of it hinders nobody.
    """
    if fcntl is None:
        yield True
        return
    beside = path.with_name(f".{path.name}-lock")
    while True:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            yield False
            return
        except OSError:  # a file system without locks
            pass
        # Between opening and locking, the one who had it may have removed it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(beside)):
                break
        os.close(descriptor)
    try:
        yield True
    finally:
        with suppress(OSError):
            os.unlink(beside)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for processes that were forked meanwhile
        os.close(descriptor)


def with_arrays(arrays: dict[str, Any], metadata: dict[str, Any]) -> bytes:
    """A safetensors file of NumPy arrays and of JSON, for `read_arrays`."""
    return serialize(arrays, {"gaussmix": json.dumps(metadata | {"sha256": _digest(arrays)})})


def read_arrays(path: Path, remedy: str = SAVE_AGAIN) -> tuple[dict[str, Any], Any]:
    """The arrays and the JSON of a safetensors file; raises where they are not those that were written."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get("gaussmix", "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, RecursionError) as error:
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
