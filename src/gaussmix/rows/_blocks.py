"""Data that is read block by block: files, loaders, data sets, anything that gives blocks when it is iterated over."""

import mmap
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from array_api_compat import is_array_api_obj
from numpy.lib.array_utils import byte_bounds
from scipy.sparse import issparse

from gaussmix._arrays import plain
from gaussmix._typing import Array
from gaussmix.rows._data import slices

T = TypeVar("T")

# Bytes of a block of a file: a few of them are in memory at a time.
BLOCK_BYTES = 2**26

# Rows of a block of a torch Dataset, which are fetched one by one.
BATCH_ROWS = 2**14
# What h5py's and zarr's arrays have, and no data frame.
SLICED = ("shape", "dtype", "ndim", "chunks", "__getitem__")
# What arrays, data frames and tables offer; they are converted whole.
WHOLE = ("__array__", "__array_interface__", "__dataframe__", "__arrow_c_stream__")


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows, anew in each pass."""

    source: Iterable[Any]

    def raw(self) -> Iterator[Array]:
        """The blocks as the source gives them; the first part of those that are tuples."""
        for item in self.source:
            block = item[0] if isinstance(item, (tuple, list)) and len(item) else item
            if not is_array_api_obj(block):
                raise TypeError(
                    f"the data gives blocks of type {type(item).__name__}; pass an object that gives 2-d arrays, or "
                    "tuples that begin with one"
                )
            yield plain(block)

    def ahead(self, blocks: Iterator[T]) -> Iterator[T]:
        """What is made of the blocks: by another thread, and a block ahead, where they lie in a file."""
        return read_ahead(blocks) if isinstance(self.source, Slices) else blocks


@dataclass(frozen=True)
class Slices:
    """Rows of what lies in a file and is sliced: numpy.memmap, h5py.Dataset, zarr.Array.

    The size of a block is a function of the shape of the data and of `batch_size` alone.
    """

    source: Any
    batch_size: int | None

    def __iter__(self) -> Iterator[Array]:
        return (_read(self.source, rows) for rows in slices(self.source.shape[0], self._size))

    @property
    def _size(self) -> int:
        _, d = self.source.shape
        size = self.batch_size or max(1, BLOCK_BYTES // max(1, d * self.source.dtype.itemsize))
        # A chunk of zarr or h5py is read whole, whatever is asked of it.
        chunk = (getattr(self.source, "chunks", None) or (1,))[0]
        return -(-size // chunk) * chunk


def _read(source: Any, rows: slice) -> Array:
    block = np.array(source[rows])
    if isinstance(source, np.memmap) and source.mode != "c":  # what was written to a private mapping would be lost
        _give_back(source[rows])
    return block


def _give_back(block: Array) -> None:
    """Take pages out of the process's memory; they stay in the system's cache, which makes room where it is needed."""
    base: Any = block
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.base
    if base is None or not hasattr(base, "madvise"):
        return
    # From the first to the last byte: of columns, and of every second row, there is more between them.
    first, last = (address - np.frombuffer(base, np.uint8).ctypes.data for address in byte_bounds(block))
    first -= first % mmap.PAGESIZE
    base.madvise(mmap.MADV_DONTNEED, first, last - first)


def read_ahead(blocks: Iterator[T]) -> Iterator[T]:
    """The blocks, of which another thread reads the next one while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        before: list[T] = []
        while True:
            try:
                coming = pool.submit(next, blocks, None)
            except RuntimeError:  # no more threads: the interpreter shuts down, or the system has none left
                yield from chain(before, blocks)
                return
            yield from before
            if (block := coming.result()) is None:
                return
            before = [block]


def readable(X: Any, batch_size: int | None, num_workers: int) -> Any:
    """X as an array or a table, or else as `Blocks`."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(X, torch.utils.data.Dataset):
        if isinstance(X, torch.utils.data.TensorDataset):
            return X.tensors[0]  # fetching its rows one by one would take most of the time
        X = torch.utils.data.DataLoader(X, batch_size=batch_size or BATCH_ROWS, num_workers=num_workers)
    is_array = is_array_api_obj(X)
    if isinstance(X, np.memmap) or (not is_array and all(hasattr(X, name) for name in SLICED)):
        # What has no rows or other dimensions than two is refused as any array of its shape is, unread.
        return Blocks(Slices(X, batch_size)) if X.ndim == 2 and X.shape[0] else np.broadcast_to(0.0, X.shape)
    is_whole = is_array or issparse(X) or any(hasattr(X, name) for name in WHOLE)
    if is_whole or isinstance(X, (list, tuple, str, bytes, dict, set, type)) or not hasattr(X, "__iter__"):
        return X
    return Blocks(X)
