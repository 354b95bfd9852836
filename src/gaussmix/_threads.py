"""Threads: slabs of rows on as many as BLAS would use, each with one thread of BLAS, also across forks."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

T = TypeVar("T")


def run(function: Callable[[slice], T], slabs: list[slice]) -> list[T]:
    """`function` of each slab, in order: on as many threads as BLAS may use, each with one thread of BLAS."""

    def quietly(slab: slice) -> T:
        # What overflows is not finite, and computed again in a form with more room.
        with np.errstate(over="ignore", invalid="ignore"):
            return function(slab)

    with one_blas_thread() as threads:
        if min(threads, len(slabs)) == 1:
            return [quietly(slab) for slab in slabs]
        with ThreadPoolExecutor(min(threads, len(slabs))) as pool:
            try:
                found = pool.map(quietly, slabs)
            except RuntimeError:  # no more threads: the interpreter shuts down, or the system has none left
                pool.shutdown(cancel_futures=True)
                found = map(quietly, slabs)
            return list(found)


@contextmanager
def one_blas_thread() -> Iterator[int]:
    """Within it, BLAS runs on the calling thread alone; gives the number of threads that it would have used.

    That is 1 within `on_one_thread`. The setting belongs to the process: where several threads are inside at once, the
    last to leave restores it.
    """
    own = _blas.of_this_thread
    with _blas.lock:
        if _blas.inside == 0:
            _blas.before = [library.num_threads for library in _controller().lib_controllers]
            _set_blas_threads([1] * len(_blas.before))
        _blas.inside += 1
        own.inside += 1
        threads = max(_blas.before, default=1)
    try:
        yield 1 if own.is_one_of_many else threads
    finally:
        with _blas.lock:
            own.inside -= 1
            _blas.inside -= 1
            if _blas.inside == 0:
                _set_blas_threads(_blas.before)


def _set_blas_threads(numbers: list[int]) -> None:
    for library, number in zip(_controller().lib_controllers, numbers, strict=True):
        # In threadpoolctl 3.8 the first thread that sets it keeps all others from doing so. Of ours, one sets it and
        # another one restores it.
        release = getattr(library, "clear_controlling_thread", None)
        if release is not None:
            release(force=True)
        library.set_num_threads(number)
        if release is not None:
            release(force=True)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Within it, the calling thread starts no others: it is one of many already."""
    before = _blas.of_this_thread.is_one_of_many
    _blas.of_this_thread.is_one_of_many = True
    try:
        with one_blas_thread():
            yield
    finally:
        _blas.of_this_thread.is_one_of_many = before


class _OfThread(threading.local):
    inside = 0
    is_one_of_many = False


class _Blas:
    """Who is inside `one_blas_thread`."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.RLock(), 0
        self.before: list[int] = []  # threads of each library before that
        self.of_this_thread = _OfThread()

    def forked(self) -> None:
        """In the child of a fork, which has none of the other threads: they are not inside, and do not leave."""
        were_inside, self.inside = self.inside, self.of_this_thread.inside
        self.lock = threading.RLock()
        if were_inside and not self.inside:
            _set_blas_threads(self.before)


_blas = _Blas()
if hasattr(os, "register_at_fork"):
    # With the lock, no other thread is about to change the setting or the numbers.
    os.register_at_fork(
        before=lambda: _blas.lock.acquire(),
        after_in_parent=lambda: _blas.lock.release(),
        after_in_child=_blas.forked,
    )


@cache
def _controller() -> Any:
    return ThreadpoolController().select(user_api="blas")
