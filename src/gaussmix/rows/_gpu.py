"""Rows of host memory on a GPU: whole where they have room, otherwise block by block.

The next block is copied while the caller works on one: from page-locked memory, which the GPU reads by itself, on a
stream of its own. torch's allocator keeps the page-locked buffers and gives one back when its copy has left it.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from array_api_compat import is_cupy_array, is_torch_array

from gaussmix._arrays import to_numpy
from gaussmix._typing import Array
from gaussmix.rows._blocks import read_ahead

# Bytes of a block where none are asked for: long enough that calls of kernels do not count beside its copy.
BLOCK_BYTES = 2**27
# Free memory for each byte of rows with which they are taken whole: the rows, the kernels' copy, scratch.
ROOM = 3


def as_tensor(x: Array) -> torch.Tensor:
    """An array as a tensor of the same memory, where there can be one."""
    if is_torch_array(x):
        return x.detach()
    if is_cupy_array(x):
        return torch.utils.dlpack.from_dlpack(x)
    array = to_numpy(x)
    # What torch has no tensors for: memory that is read-only or runs backwards.
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()
    return torch.from_numpy(array)


def block_rows(x: Array, where: str) -> int | None:
    """Rows of the blocks in which x goes to this GPU; None where all of it has room there."""
    n, d = x.shape
    free, _ = torch.cuda.mem_get_info(where)
    # What torch's allocator holds and nobody uses is free as well.
    free += torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    row_bytes = d * x.dtype.itemsize
    return None if ROOM * n * row_bytes <= free else max(1, BLOCK_BYTES // row_bytes)


def sent(where: str, place: Callable[[Array], Array], blocks: Iterable[Array]) -> Iterator[Array]:
    """`map(place, blocks)` for a `place` that takes blocks to this GPU: one is on its way while another is in use."""
    copies = torch.cuda.Stream(where)

    def started() -> Iterator[tuple[torch.Tensor, torch.cuda.Event]]:
        for block in blocks:
            with torch.cuda.stream(copies):
                there = place(as_tensor(block).contiguous().pin_memory())
                arrived = copies.record_event()
            yield there, arrived

    worked_on = None
    for there, arrived in read_ahead(started()):
        stream = torch.cuda.current_stream(where)
        stream.wait_event(arrived)
        # Its memory belongs to the stream of copies, which may not take it again while this one reads it.
        there.record_stream(stream)
        yield there
        # The host stays within a block of the GPU, or blocks would pile up there.
        if worked_on is not None:
            worked_on.synchronize()
        worked_on = stream.record_event()
