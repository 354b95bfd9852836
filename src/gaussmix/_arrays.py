"""What the array API standard leaves to its users: host copies, working precision, moving between libraries."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace as _namespace
from array_api_compat import (
    device,
    is_array_api_obj,
    is_array_api_strict_namespace,
    is_cupy_array,
    is_torch_array,
    to_device,
)
from array_api_compat import numpy as _numpy

from gaussmix._typing import Array, DType

__all__ = [
    "array_namespace",
    "as_host",
    "asarray_like",
    "device",
    "floating_dtype",
    "integer_dtype",
    "is_on_host",
    "plain",
    "to_numpy",
    "working_dtype",
]

# DLPack's number for the memory of a CPU.
DLPACK_CPU = 1


def array_namespace(x: Array) -> Any:
    """The array API namespace of an array's library."""
    if type(x) is np.ndarray:  # what array_api_compat finds as well, but not before it has asked for all others
        return _numpy
    if type(x).__module__ == "torch":
        # What array_api_compat caches, torch.compile looks through with a warning.
        from array_api_compat import torch

        return torch
    return _namespace(x)


def plain(x: Array) -> Array:
    """The same values as memory has them: without a gradient, a pending sign or conjugate, or a mask of nothing."""
    if is_torch_array(x):
        return x.detach().resolve_conj().resolve_neg()
    return x.data if isinstance(x, np.ma.MaskedArray) and not np.ma.is_masked(x) else x


def is_on_host(x: Array) -> bool:
    """Whether an array of the standard is in host memory, where NumPy can read it, as DLPack says.

    Not array_api_strict's, whose devices are played in host memory: it is there to test the code for all others.
    """
    if isinstance(x, np.ndarray):
        return True
    if is_torch_array(x):
        return bool(x.device.type == "cpu")
    if not is_array_api_obj(x):
        return False
    try:
        kind, _ = x.__dlpack_device__()
    except (AttributeError, BufferError):  # no DLPack, or nothing that it could export: an array in several parts
        return False
    return bool(kind == DLPACK_CPU and not is_array_api_strict_namespace(array_namespace(x)))


def as_host(x: Array) -> Array:
    """An array in host memory as NumPy's, of the same memory and maybe read-only; any other as it is."""
    return to_numpy(x) if is_on_host(x) else x


def to_numpy(x: Array) -> Array:
    """A small array, or anything NumPy understands, on the host and in its own dtype; a view where one will do.

    It may be read-only.
    """
    if type(x) is np.ndarray:
        return x
    if is_torch_array(x):
        x = plain(x).cpu()
        try:
            return x.numpy()
        except TypeError:  # bfloat16 and dtypes of 8 bits, which NumPy does not have
            return x.float().numpy()
    if is_cupy_array(x):  # CuPy refuses implicit copies to the host
        return x.get()
    if is_on_host(x) and not isinstance(x, np.ndarray):
        try:
            return np.from_dlpack(x)
        except (BufferError, RuntimeError):  # a dtype that NumPy or DLPack does not have, such as bfloat16
            return np.asarray(x)
    try:
        return np.asarray(x)
    except RuntimeError:  # an accelerator that has to be left first (array_api_strict's devices)
        return np.asarray(to_device(x, array_namespace(x).__array_namespace_info__().default_device()))


def asarray_like(value: Array, like: Array, dtype: DType | None = None) -> Array:
    """`value` in the library and on the device of `like`, and in its dtype unless another is named."""
    dtype = like.dtype if dtype is None else dtype
    if type(value) is type(like) is np.ndarray:
        return value.astype(dtype, copy=False)
    xp = array_namespace(like)
    if type(value) is type(like) and device(value) == device(like):
        return xp.astype(value, dtype, copy=False)
    # Straight to the target dtype: a device without float64 could not hold the value in between.
    return xp.asarray(to_numpy(value), dtype=dtype, device=device(like))


def working_dtype(x: Array) -> DType:
    """float64 wherever the device of `x` has it: EM then runs in float64 whatever the precision of the data."""
    return _of_64_bits(x, "real floating", "float")


def integer_dtype(x: Array) -> DType:
    """int64, the dtype of labels, wherever the device of `x` has it: without JAX's x64 it is int32."""
    return _of_64_bits(x, "signed integer", "int")


def _of_64_bits(x: Array, kind: str, name: str) -> DType:
    """The dtype of this kind with 64 bits where the device of `x` has it, else the one with 32."""
    if isinstance(x, np.ndarray):
        return np.dtype(f"{name}64")
    xp = array_namespace(x)
    dtypes = xp.__array_namespace_info__().dtypes(device=device(x), kind=kind)
    return dtypes.get(f"{name}64", getattr(xp, f"{name}32"))


def floating_dtype(x: Array) -> DType:
    """The dtype of what comes back for `x`: its own if float32 or float64, float32 for half precision, else float64."""
    xp = array_namespace(x)
    if x.dtype in (xp.float32, xp.float64):
        return x.dtype
    return xp.float32 if "float16" in str(x.dtype) else working_dtype(x)
