"""EM, k-means and predictions on Dask arrays: one task for each block of rows, and a tree of tasks that adds them up.

Data, tasks and their order are Dask's, on whatever scheduler is active: threads of this process, or a cluster. No block
is sent anywhere: tasks run where it is, on one thread each, and what comes back is statistics. Each block goes through
the implementation that its array would have on its own, as in `_streaming`.

This module imports dask; it is imported where the data is a Dask array, and nowhere else.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, TypeVar

import dask
import dask.array as da
import numpy as np
from dask.delayed import delayed
from sklearn.utils.random import sample_without_replacement

from gaussmix._arrays import array_namespace, asarray_like, device, to_numpy, working_dtype
from gaussmix._parameters import SufficientStatistics
from gaussmix._threads import on_one_thread
from gaussmix._typing import Array
from gaussmix._warnings import warn_user
from gaussmix.rows._data import Mapping, Rows, Stream, fingerprint, slices
from gaussmix.rows._passes import Block, Draw

# Results that one task of the tree adds up.
SPLIT_EVERY = 8
# Rows whose responsibilities are drawn at a time.
DRAWN_ROWS = 2**12
# A task takes Dask 2 to 4 ms. So many of them, on blocks smaller than this, take longer than their work.
MANY_BLOCKS, SMALL_BYTES, GOOD_BYTES = 200, 2**20, 2**26
# Statistics of all blocks, in bytes, that a cluster may not have room for where the data itself is smaller.
STATISTICS_BYTES = 2**30


T = TypeVar("T")


@dataclass(frozen=True)
class _Call:
    """What the tasks of a pass have in common. It travels to each worker once, and is not to be changed there."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    moves: tuple[Callable[[Array], Array], ...] = ()
    each: Sequence[Any] | None = None
    seen: Sequence[tuple[tuple[int, int], int]] | None = None  # shape and fingerprint of each block in the first pass

    @property
    def name(self) -> str:
        """What Dask's dashboard shows."""
        return f"gaussmix{self.function.__name__}"

    def __call__(self, x: Array, weight: Array | None, block: int) -> Any:
        if weight is not None:
            weight = asarray_like(weight[:, 0], x, working_dtype(x))
        if self.seen is not None:
            _check_same(x, weight, block, *self.seen[block])
        for move in self.moves:
            x = move(x)
        own = () if self.each is None else (self.each[block],)
        if weight is not None:
            weight = asarray_like(weight, x, working_dtype(x))
        with on_one_thread():
            return self.function(x, weight, *self.args, *own)


def _check_same(x: Array, weight: Array | None, block: int, shape: tuple[int, int], seen: int) -> None:
    if tuple(x.shape) != shape:
        how = f"has shape {tuple(x.shape)} in a later pass, and had {shape} in the first one"
    elif fingerprint(x, weight) != seen:
        how = f"has other rows{'' if weight is None else ' or weights'} in a later pass than in the first one"
    else:
        return
    raise ValueError(
        f"block {block} of the Dask array {how}; pass an array that is computed to the same each time, or X.persist()"
    )


def _run(x: Array, weight: Array | None, call: _Call, block_id: tuple[int, int]) -> Any:
    return call(x, weight, block_id[0])


def _tasks(x: Any, weight: Any, call: _Call) -> Any:
    """The call for each block of x (n, d), or (n,), as an array of what need not be arrays."""
    return da.map_blocks(
        _run,
        x if x.ndim == 2 else x[:, None],
        None if weight is None else weight[:, None],
        call=delayed(call, traverse=False),
        dtype=object,
        token=call.name,
        chunks=((1,) * x.numblocks[0], (1,)),
        meta=np.empty((0, 0), dtype=object),
    )


def _listed(tasks: Any) -> list[Any]:
    return list(tasks.to_delayed().ravel())


def _sum(tasks: list[Any], function: Callable[[list[Any]], Any], *, quiet: bool) -> Any:
    """`function` of what all tasks give, by a tree of tasks."""
    while True:
        tasks = [delayed(function)(tasks[part]) for part in slices(len(tasks), SPLIT_EVERY)]
        if len(tasks) == 1:
            return _computed(tasks, quiet=quiet)[0]


def _computed(tasks: list[Any], *, quiet: bool) -> Any:
    # The cluster warns of large graphs, which it should do once for the data, and not in each iteration.
    threshold = {"distributed.admin.large-graph-warning-threshold": "1 TiB"} if quiet else {}
    with dask.config.set(threshold):
        return dask.base.compute(*tasks)


def _add(parts: list[Any]) -> Any:
    return reduce(add, parts)


def _add_each(parts: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(reduce(add, values) for values in zip(*parts, strict=True))


@dataclass(frozen=True, kw_only=True)
class DaskRows(Stream):
    """The rows of a Dask array whose chunks hold whole rows; finite, and never all in this process.

    `sample_weight` is a Dask array (n,) with the same chunks of rows.
    """

    array: Any  # (n, d)
    counts: Array  # rows of positive weight of each block, on the host
    seen: tuple[tuple[tuple[int, int], int], ...]  # shape and fingerprint of each block
    moves: tuple[Callable[[Array], Array], ...] = ()  # what takes a block to where it is computed

    @property
    def n_positive(self) -> int:
        """Number of rows of positive weight: those that count."""
        return int(self.counts.sum())

    def mapped(self, function: Callable[[Array], Array], mapping: Mapping = map) -> "DaskRows":
        """`function` of each block, by the worker that has it."""
        like = function(self.like)
        middle = asarray_like(self.middle, like, working_dtype(like))
        return replace(self, moves=(*self.moves, function), like=like, middle=middle)

    def sum(self, function: Callable[..., Any], *args: Any, each: Sequence[Any] | None = None) -> Any:
        """`function(x, weight, *args, own)`, summed over the blocks that have rows of positive weight."""
        return _sum(self._of_blocks(self.counts > 0, function, args, each), _add, quiet=True)

    def average(self, values: Any) -> float:
        """Weighted mean of a value for each row (n,)."""
        weight = self.sample_weight
        call = _Call(_total_of_values, ())
        total, weights = _sum(_listed(_tasks(values, weight, call)), _add_each, quiet=True)
        return total / weights

    def largest(self, values: Any, m: int) -> tuple[Array, Array]:
        """Indices of the m largest of a value for each row, among those of positive weight, and those values."""
        starts = np.cumsum([0, *self.array.chunks[0]])
        call = _Call(_largest_of_values, (m,), each=starts.tolist())
        merge = _Merge(m)
        return _sum(_listed(_tasks(values, self.sample_weight, call)), merge, quiet=True)

    def take(self, indices: Array) -> Array:
        """The rows of these increasing `indices`, in float64 on the host: (m, d)."""
        bounds = np.cumsum([0, *self.array.chunks[0]])
        return self._taken(indices, bounds, _take_positions).array

    def sample(self, size: int, random_state: np.random.RandomState) -> Rows:
        """As `Rows.sample`: the same rows where the data is the same."""
        total = int(self.counts.sum())
        if total > size:
            drawn = np.sort(sample_without_replacement(total, size, random_state=random_state))
        else:
            drawn = np.arange(total)
        return self._taken(drawn, np.cumsum([0, *self.counts]), _take_positive)

    def _taken(self, indices: Array, bounds: Array, function: Callable[..., Any]) -> Rows:
        """The rows of increasing `indices`, of which each block has those between its `bounds`."""
        cuts: Array = np.searchsorted(indices, bounds)
        own = [indices[i:j] - start for i, j, start in zip(cuts[:-1], cuts[1:], bounds[:-1], strict=True)]
        found = _computed(self._of_blocks(cuts[1:] > cuts[:-1], function, (), own), quiet=True)
        rows = np.concatenate([np.empty((0, self.shape[1])), *(x for x, _ in found)])
        return Rows(rows, None if self.sample_weight is None else np.concatenate([weight for _, weight in found]))

    def _of_blocks(
        self, chosen: Array, function: Callable[..., Any], args: tuple[Any, ...], each: Sequence[Any] | None
    ) -> list[Any]:
        """One task for each of the chosen blocks."""
        tasks = _tasks(self.array, self.sample_weight, _Call(function, args, self.moves, each, self.seen))
        # Those that nobody asks for are not run, nor are their blocks read.
        return [task for task, is_chosen in zip(_listed(tasks), chosen, strict=True) if is_chosen]


def _total_of_values(values: Array, weight: Array | None) -> tuple[float, float]:
    values = to_numpy(values)[:, 0]
    if weight is None:
        return float(values.sum()), len(values)
    weight = to_numpy(weight)
    return float(values @ weight), float(weight.sum())


def _largest_of_values(values: Array, weight: Array | None, m: int, start: int) -> tuple[Array, Array]:
    values = to_numpy(values)[:, 0]
    if weight is not None:
        values = np.where(to_numpy(weight) > 0, values, 0)
    order = np.argsort(-values, stable=True)[:m]
    return start + order, values[order]


@dataclass(frozen=True)
class _Merge:
    """The m largest of what has been found in several parts, the first of equals."""

    m: int

    def __call__(self, parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        indices, values = (np.concatenate(found) for found in zip(*parts, strict=True))
        order = np.argsort(-values, stable=True)[: self.m]
        return indices[order], values[order]


def _take_positions(x: Array, weight: Array | None, positions: Array) -> tuple[Array, Array | None]:
    return Rows(x).take(positions), None if weight is None else to_numpy(weight)[positions].astype(np.float64)


def _take_positive(x: Array, weight: Array | None, ranks: Array) -> tuple[Array, Array | None]:
    """Rows by their ranks among those of positive weight."""
    return _take_positions(x, weight, ranks if weight is None else np.flatnonzero(to_numpy(weight))[ranks])


# The first pass


@dataclass(frozen=True)
class _Seen:
    """What the first pass found in some blocks."""

    error: Exception | None
    counts: tuple[int, ...]
    prints: tuple[int, ...]
    like: Array | None
    total: Array | None  # (d,): weighted sum of the rows
    weight: float

    def __add__(self, other: "_Seen") -> "_Seen":
        like, total = self.like, self.total
        if like is None:
            like, total = other.like, other.total
        elif other.total is not None:
            total = total + other.total
        error = self.error or other.error
        counts, prints = self.counts + other.counts, self.prints + other.prints
        return _Seen(error, counts, prints, like, total, self.weight + other.weight)


def rows_of(X: Any, sample_weight: Any, check: Callable[[Array, Array | None, int], None]) -> DaskRows:
    """The rows of a Dask array (n, d) of known, whole-row chunks, after one pass over it.

    `check(block, weight, first row)` raises for what is wrong with a block.
    """
    sizes = X.chunks[0]
    _warn_of_small_blocks(X)
    weight = sample_weight
    if isinstance(weight, da.Array):
        weight = weight.rechunk((sizes,))
    elif weight is not None:
        # Sent to the workers once, and not in each iteration.
        weight = da.from_array(weight, chunks=(sizes,)).persist()
    starts = np.cumsum([0, *sizes])[:-1].tolist()
    d = X.shape[1]
    call = _Call(_look, (check, d), each=list(zip(starts, sizes, strict=True)))
    seen = _sum(_listed(_tasks(X, weight, call)), _add, quiet=False)
    if seen.error is not None:
        raise seen.error
    if not seen.weight:
        raise ValueError("sample_weight is zero for every row; at least one row needs a positive weight")
    return DaskRows(
        read=lambda: (block.compute() for block in X.blocks),
        shape=X.shape,
        like=seen.like,
        middle=seen.total / seen.weight,
        fingerprint=lambda: sum(seen.prints) % 2**64,
        sample_weight=weight,
        array=X,
        counts=np.asarray(seen.counts),
        seen=tuple(((size, d), found) for size, found in zip(sizes, seen.prints, strict=True)),
    )


def _look(x: Array, weight: Array | None, check: Callable[..., None], d: int, place: tuple[int, int]) -> _Seen:
    start, size = place
    try:
        if x.shape[0] != size:
            raise ValueError(
                f"the block after row {start} has {x.shape[0]} rows, and {size} as the Dask array has it; correct its "
                "chunks"
            )
        if size:
            check(x, weight, start)
            if x.shape[1] != d:
                raise ValueError(
                    f"the block after row {start} has {x.shape[1]} features, and {d} as the Dask array has it; correct "
                    "what makes it"
                )
    except (ValueError, TypeError) as error:
        # Not raised here: of several it is that of the first row, whichever task ends first.
        return _Seen(error, (0,), (0,), None, None, 0.0)
    if not size:
        return _Seen(None, (0,), (0,), None, None, 0.0)
    found = (fingerprint(x, weight),)
    xp = array_namespace(x)
    values = xp.astype(x, working_dtype(x), copy=False)
    if weight is None:
        return _Seen(None, (size,), found, x[:1, :], xp.sum(values, axis=0), float(size))
    count = int(xp.sum(xp.astype(weight > 0, xp.int64)))
    return _Seen(None, (count,), found, x[:1, :], xp.sum(weight[:, None] * values, axis=0), float(xp.sum(weight)))


def _warn_of_small_blocks(X: Any) -> None:
    n_blocks, size = X.numblocks[0], X.nbytes / max(1, X.numblocks[0])
    if n_blocks >= MANY_BLOCKS and size < SMALL_BYTES:
        rows = max(1, GOOD_BYTES // max(1, X.shape[1] * X.dtype.itemsize))
        warn_user(
            f"the Dask array has {n_blocks} blocks of about {size / 2**10:.0f} KiB, and Dask takes longer for a block "
            f"than the work on it; pass X.rechunk(({min(rows, X.shape[0])}, -1))",
            UserWarning,
        )


class InTasks:
    """The blocks of a Dask array, by the workers that have them."""

    def __init__(self, rows: DaskRows, make: Callable[[Rows], Block]) -> None:
        self._rows, self._make = rows, make
        self._has_warned = False

    def reduce(self, step: Callable[..., T], nothing: Callable[[], T], draw: Draw | None = None) -> T:
        """The sum of `step(block)` over all blocks."""
        each = None if draw is None else self._draws(draw)
        self._warn_of_memory(nothing())
        found: T = self._rows.sum(_of_block, self._make, step, each=each)
        return found

    def map(self, step: Callable[[Block], Array]) -> Any:
        """`step(block)` for all rows, of weight 0 or not, as a Dask array."""
        rows = self._rows
        meta = step(self._make(Rows(rows.like)))[:0]
        call = _Call(_of_rows, (self._make, step, meta), rows.moves, seen=rows.seen)
        return _by_block(rows.array, call, meta, rows.sample_weight)

    def _draws(self, draw: Draw) -> list[Draw]:
        """For each block a copy of `draw` in the state that it has by then."""
        own = []
        for count in self._rows.counts.tolist():
            own.append(copy.deepcopy(draw))
            for part in slices(count, DRAWN_ROWS):
                draw(part.stop - part.start)
        return own

    def _warn_of_memory(self, nothing: Any) -> None:
        if self._has_warned or not isinstance(nothing, SufficientStatistics):
            return
        size = 8 * math.prod(nothing.second_moments.shape) * len(self._rows.counts)
        if size < max(STATISTICS_BYTES, self._rows.array.nbytes):
            return
        self._has_warned = True
        warn_user(
            f"the statistics of all {len(self._rows.counts)} blocks take {size / 2**30:.1f} GiB, more than the data; "
            "rechunk to fewer and larger blocks, or choose a covariance_type with fewer parameters",
            UserWarning,
        )


def _of_block(x: Array, weight: Array | None, make: Callable[[Rows], Block], step: Callable[..., T], *draw: Draw) -> T:
    # What is drawn changes the generator, which threads of one process share.
    return step(make(Rows(x, weight)), *copy.deepcopy(draw))


def _of_rows(
    x: Array, weight: Array | None, make: Callable[[Rows], Block], step: Callable[[Block], Array], meta: Array
) -> Array:
    return step(make(Rows(x))) if x.shape[0] else meta


# Predictions


def predictions(estimator: Any, method: str, X: Any) -> Any:
    """What a method of a fitted estimator gives for each row, as a Dask array that is computed when it is asked for."""
    # A row stands for all to tell the dtype, the library and the shape, and what is wrong with either of the two.
    xp = array_namespace(X._meta)
    meta = getattr(estimator, method)(xp.zeros((1, X.shape[1]), dtype=X.dtype, device=device(X._meta)))[:0]
    # As it is now: another fit changes nothing.
    call = _Call(_predict, (copy.copy(estimator), method, meta, X.chunks[0]), each=range(X.numblocks[0]))
    return _by_block(X, call, meta)


def total_of(estimator: Any, method: str, X: Any) -> tuple[float, int]:
    """The sum over all rows of what `method` gives the mean of, and the number of rows."""
    call = _Call(_score, (copy.copy(estimator), method, X.chunks[0]), each=range(X.numblocks[0]))
    return _sum(_listed(_tasks(X, None, call)), _add_each, quiet=False)


def _predict(
    x: Array, weight: None, estimator: Any, method: str, meta: Array, sizes: tuple[float, ...], block: int
) -> Array:
    return _named(getattr(estimator, method), x, sizes, block) if x.shape[0] else meta


def _score(
    x: Array, weight: None, estimator: Any, method: str, sizes: tuple[float, ...], block: int
) -> tuple[float, int]:
    n = x.shape[0]
    return (n * _named(getattr(estimator, method), x, sizes, block), n) if n else (0.0, 0)


def _named(function: Callable[[Array], Any], x: Array, sizes: tuple[float, ...], block: int) -> Any:
    """The function of a block, of which an error names the place."""
    try:
        return function(x)
    except ValueError as error:
        before = sum(sizes[:block])
        place = f"block {block}" if math.isnan(before) else f"block {block}, which begins after row {before}"
        raise ValueError(f"in {place}: {error}") from error


def _by_block(X: Any, call: _Call, meta: Array, weight: Any = None) -> Any:
    """The call for each block of X as a Dask array of the shape of `meta`."""
    columns = {"drop_axis": 1} if meta.ndim == 1 else {"chunks": (X.chunks[0], (meta.shape[1],))}
    return da.map_blocks(
        _run,
        X,
        None if weight is None else weight[:, None],
        call=delayed(call, traverse=False),
        dtype=meta.dtype,
        meta=meta,
        token=call.name,
        **columns,
    )
