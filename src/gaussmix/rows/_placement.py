"""Where rows are computed, and in which precision: as they are, unless a device or a precision is asked for."""

import os
import re
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import overload

from array_api_compat import is_cupy_array, is_torch_array

from gaussmix._arrays import array_namespace, is_on_host
from gaussmix._typing import Array
from gaussmix.rows._data import Rows, Stream
from gaussmix.rows._processes import Share

VARIABLE = "GAUSSMIX_DEVICE"


@dataclass(frozen=True)
class Placement:
    """Where rows go before they are computed, and in which precision."""

    device: str | None = None  # "cpu", "cuda:0"; None for where they are
    dtype: str | None = None  # "float32", "float64"; None for that of the rows

    @overload
    def placed(self, rows: Rows | Stream) -> Rows | Stream: ...

    @overload
    def placed(self, rows: Share) -> Share: ...

    def placed(self, rows: Rows | Stream | Share) -> Rows | Stream | Share:
        """The rows there: copies, or what copies each block as it is read."""
        if self.device is None and self.dtype is None:
            return rows
        if isinstance(rows, Share):
            own = self.placed(rows.rows)
            return replace(rows, rows=own).computed(own.like)
        self._check_device()
        some = rows.like[: min(1, rows.like.shape[0]), :]
        if self._place(some) is some:
            return rows
        if self.device in (None, "cpu") or not is_on_host(some):
            return rows.mapped(self._place)
        # Imports torch, which only those who ask for a GPU pay for.
        from gaussmix.rows import _gpu

        if isinstance(rows, Rows):
            size = rows.batch_size or _gpu.block_rows(rows.array, self.device)
            if size is None:
                return rows.mapped(self._place)
            rows = rows.in_blocks(size)
        return rows.mapped(self._place, partial(_gpu.sent, self.device))

    def rounded(self, x: Array) -> Array:
        """The array in the precision that is asked for."""
        if self.dtype is None:
            return x
        xp = array_namespace(x)
        return xp.astype(x, getattr(xp, self.dtype), copy=False)

    def _place(self, x: Array) -> Array:
        # A GPU rounds faster than the host, and copies what is in page-locked memory by itself.
        return self.rounded(x if self.device is None else _moved(x, self.device))

    def _check_device(self) -> None:
        if self.device in (None, "cpu"):
            return
        n, number = _n_gpus(), int(self.device.partition(":")[2] or 0)
        if number >= n:
            found = "none" if n == 0 else f"{n}, cuda:0 to cuda:{n - 1}" if n > 1 else "one, cuda:0"
            raise ValueError(
                f"trainer_params or {VARIABLE} asks for a GPU, {self.device}, and torch finds {found}; pass "
                f"accelerator='cpu', set {VARIABLE}=cpu, or leave it out"
            )


def environment() -> Placement:
    """The placement that the environment asks for: by default, rows are computed where they are."""
    device = os.environ.get(VARIABLE)
    if not device:
        return Placement()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"{VARIABLE}={device!r} is no device; set cpu, cuda, cuda:1 and so on, or unset it")
    return Placement("cuda:0" if device == "cuda" else device)


def _n_gpus() -> int:
    if find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count()


def _moved(x: Array, where: str) -> Array:
    """The array on this device: a torch tensor on a GPU; CuPy's in host memory are NumPy's."""
    if is_torch_array(x):
        return x.to(where, non_blocking=where != "cpu")
    if where == "cpu":
        return x.get() if is_cupy_array(x) else x
    # Imports torch, which only those who ask for a GPU pay for.
    from gaussmix.rows import _gpu

    return _gpu.as_tensor(x).to(where, non_blocking=True)
