"""What the array API standard leaves to its users: host copies, working precision, moving between libraries."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace as _namespace
from array_api_compat import device, is_cupy_array, is_torch_array, to_device
from array_api_compat import numpy as _numpy

from gaussmix._typing import Array, DType

__all__ = ["array_namespace", "asarray_like", "device", "floating_dtype", "plain", "to_numpy", "working_dtype"]


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


def to_numpy(x: Array) -> Array:
    """A small array, or anything NumPy understands, on the host and in its own dtype; a view where one will do."""
    if is_torch_array(x):
        x = plain(x).cpu()
        try:
            return x.numpy()
        except TypeError:  # bfloat16 and dtypes of 8 bits, which NumPy does not have
            return x.float().numpy()
    if is_cupy_array(x):  # CuPy refuses implicit copies to the host
        return x.get()
    try:
        return np.asarray(x)
    except RuntimeError:  # an accelerator that has to be left first (array_api_strict's devices)
        return np.asarray(to_device(x, array_namespace(x).__array_namespace_info__().default_device()))


def asarray_like(value: Array, like: Array, dtype: DType | None = None) -> Array:
    """`value` in the library and on the device of `like`, and in its dtype unless another is named."""
    xp = array_namespace(like)
    dtype = like.dtype if dtype is None else dtype
    if type(value) is type(like) and device(value) == device(like):
        return xp.astype(value, dtype, copy=False)
    # Straight to the target dtype: a device without float64 could not hold the value in between.
    return xp.asarray(to_numpy(value), dtype=dtype, device=device(like))


def working_dtype(x: Array) -> DType:
    """float64 wherever the device of `x` has it: EM then runs in float64 whatever the precision of the data."""
    xp = array_namespace(x)
    dtypes = xp.__array_namespace_info__().dtypes(device=device(x), kind="real floating")
    return dtypes.get("float64", xp.float32)


def floating_dtype(x: Array) -> DType:
    """The dtype of what comes back for `x`: its own if float32 or float64, float32 for half precision, else float64."""
    xp = array_namespace(x)
    if x.dtype in (xp.float32, xp.float64):
        return x.dtype
    return xp.float32 if "float16" in str(x.dtype) else working_dtype(x)
