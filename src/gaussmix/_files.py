"""Files of saved estimators and models: written whole or not at all, and read with a word for damage."""

import hashlib
import json
import os
import pickle
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize_numpy

from gaussmix._warnings import warn_user

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


def as_path(path: str | bytes | os.PathLike[str]) -> Path:
    """The path, which may be one of bytes."""
    return Path(os.fsdecode(path))


def make_folder(path: str | bytes | os.PathLike[str]) -> Path:
    """The directory `path`; made where it does not exist."""
    folder = as_path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; pass the path of a directory")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def replace(path: Path, content: bytes) -> None:
    """Write a file aside, then rename it into place; what others left aside long ago is removed."""
    # A file that is replaced keeps its permissions, whoever may read it; a new one gets those of the process's mask,
    # which the kernel applies: to ask for the mask is to lift it, for all threads.
    kept = stat.S_IMODE(path.stat().st_mode) & 0o777 if path.exists() else None
    prefix, suffix = f".{path.name}.", ".aside"
    aside = path.with_name(f"{prefix}{os.urandom(4).hex()}{suffix}")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    descriptor = os.open(aside, flags, 0o666 if kept is None else kept)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if kept is not None:
                os.chmod(aside, kept)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            now = os.fstat(file.fileno()).st_mtime  # as the file system counts, which may not be here
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


def with_arrays(
    arrays: dict[str, Any],
    metadata: dict[str, Any],
    serialize: Callable[[dict[str, Any], dict[str, str]], bytes] = serialize_numpy,
) -> bytes:
    """A safetensors file of arrays and of JSON, for `read_arrays`, with a digest of all that it says.

    `serialize` is that of the arrays' library; torch's for tensors, of which NumPy does not have all dtypes.
    """
    metadata = _as_read(metadata)
    # One entry: safetensors puts several in any order, and the same fit is to give the same file.
    return serialize(arrays, {"gaussmix": json.dumps(metadata | {"sha256": _digest(arrays, metadata)}, sort_keys=True)})


def read_arrays(path: Path, remedy: str = SAVE_AGAIN, framework: str = "numpy") -> tuple[dict[str, Any], Any]:
    """The arrays and the JSON of a safetensors file; raises where they are not those that were written."""
    if not path.is_file():
        raise damaged(path, "it is no file, or a link to nothing", remedy)
    try:
        with safe_open(path, framework=framework) as file:
            texts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        # Version 0.1.0 wrote the config of torch modules, without a digest.
        is_config = "gaussmix" not in texts and "config" in texts
        metadata = _parse(texts["config"] if is_config else texts.get("gaussmix", "null"))
        said = metadata.pop("sha256", None) if isinstance(metadata, dict) else None
        digest = _digest(arrays, metadata)
    # Dtypes that a library does not have are errors of many kinds.
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise damaged(path, error, remedy) from error
    if isinstance(metadata, dict) and said != digest:
        # Its digests of estimators were of the arrays alone.
        if not is_config and said != _digest(arrays):
            raise damaged(path, "it is not what was saved", remedy)
        _warn_no_digest(path, remedy)
    return arrays, metadata


def with_digest(content: dict[str, Any]) -> bytes:
    """JSON for people, with a digest for `check_digest`."""
    content = _as_read(content)
    return json.dumps(content | {"sha256": _digest({}, content)}, indent=2).encode()


def check_digest(path: Path, content: dict[str, Any]) -> None:
    """Raise unless the content of a file of JSON is what its digest says."""
    if "sha256" not in content:
        _warn_no_digest(path)
        return
    said = content.pop("sha256")
    try:
        digest = _digest({}, content)
    except RecursionError as error:
        raise damaged(path, error) from error
    if said != digest:
        raise damaged(path, "it is not what was saved", f"{SAVE_AGAIN}, or remove its sha256 if you have edited it")


def _warn_no_digest(path: Path, remedy: str = SAVE_AGAIN) -> None:
    """Of a file that gaussmix 0.1.0 wrote, or somebody edited."""
    warn_user(f"{path} carries no digest of its metadata, whose damage goes unnoticed; {remedy}", UserWarning)


def _as_read(content: dict[str, Any]) -> Any:
    """What will be read, of which the digest is: keys become strings."""
    return _parse(json.dumps(content))


def _digest(arrays: dict[str, Any], metadata: dict[str, Any] | None = None) -> str:
    """Of all that arrays and JSON say, however a file says it."""
    digest = hashlib.sha256(b"" if metadata is None else json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {tuple(arrays[name].shape)}".encode())
        digest.update(_bytes(arrays[name]))
    return digest.hexdigest()


def _bytes(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array)
    import torch  # whose tensor it is

    return array.flatten().view(torch.uint8).numpy()


def read_json(path: Path) -> Any:
    """What a file of JSON says."""
    try:
        return _parse(path.read_bytes())
    except ValueError as error:
        raise damaged(path, error) from error


def _parse(text: str | bytes) -> Any:
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _integer(digits: str) -> int:
    # Every integer that is saved has at most 64 bits.
    if len(digits) > 20:
        raise ValueError(f"it has an integer of {len(digits)} digits")
    return int(digits)


def damaged(path: Path, why: object, remedy: str = SAVE_AGAIN) -> ValueError:
    """The error for a file or directory that can not be read."""
    reason = str(why)
    reason = reason if len(reason) <= 400 else f"{reason[:400]}..."  # what a file says may be long
    return ValueError(f"{path} is damaged: {reason}; {remedy}")
