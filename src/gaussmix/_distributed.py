"""EM in several processes that each take a share of the rows: one sum over all of them in an iteration.

Processes and their communication are torch.distributed's; Lightning Fabric launches them where `trainer_params` asks
for several devices. Every process takes the same decisions, since all see the same sums.
"""

import atexit
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import parent_process
from typing import Any, TypeVar

import numpy as np
from array_api_compat import is_torch_array
from sklearn.utils.random import sample_without_replacement

from gaussmix._arrays import asarray_like, to_numpy, working_dtype
from gaussmix._data import Rows, Stream, slices
from gaussmix._engine import Block, Draw, Passes
from gaussmix._parameters import CENTRED_PRECISION, SufficientStatistics
from gaussmix._typing import Array, DType

T = TypeVar("T")

# Rows of a block that is only looked at.
BLOCK_ROWS = 2**13


class Group:
    """The processes of a torch.distributed process group, which within `together` fail together.

    Where one of them raises, it says so in what the others sum or gather next: all sums are equally long, so that it
    need not know which.
    """

    _length = 0  # numbers in each sum, of which not all are always used; 0 before the first
    _can_tell = False  # whether the others will hear of an error

    def __init__(self, device: str = "cpu", group: Any = None) -> None:
        import torch

        self._torch, self._dist, self._group, self.device = torch, torch.distributed, group, device
        self.rank, self.size = self._dist.get_rank(group), self._dist.get_world_size(group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it, what one process raises ends all of them: the others raise RuntimeError with its message."""
        self._length, self._can_tell = 0, True
        try:
            yield
            self._meet()  # a process may have failed since what was summed last
        except Exception as error:
            if self._can_tell:
                self._meet(f"{type(error).__name__}: {error}")
            raise

    def sum(self, *values: Array) -> list[Array]:
        """The sums of all processes' arrays, float64 on the host: the same bits in each of them."""
        ends = np.cumsum([value.size for value in values])
        if ends[-1] > self._length:
            self._meet()  # in the length that a process which failed knows
            self._length = int(ends[-1])
        parts = np.split(self._sum(values), ends)
        return [part.reshape(value.shape) for part, value in zip(parts, values, strict=False)]

    def each(self, value: T) -> list[T]:
        """Every process's value."""
        if self._length:
            self._meet()
        return self._gather(value)

    def from_first(self, value: T) -> T:
        """What the first process has."""
        return self.each(value if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def compare(self, told: dict[str, Any]) -> None:
        """Raise ValueError where two processes were told different things.

        Random states have to be the same where they are integers: of others, that of the first process counts.
        """
        values = self.each(told)
        for name in told:
            known = [(rank, value.get(name)) for rank, value in enumerate(values)]
            if name == "random_state":
                known = [(rank, value) for rank, value in known if value is not None]
            for rank, value in known:
                first, expected = known[0]
                if value != expected and repr(value) != repr(expected):  # a NaN is not equal to itself
                    raise ValueError(
                        f"{name} is {expected!r} in process {first} and {value!r} in process {rank}; all {self.size} "
                        "processes need the same"
                    )

    def agreed(self, callback: Callable[..., Any] | None) -> Callable[..., bool] | None:
        """A callback whose answer is true in all processes where it is in one; None where none of them has any."""
        if not any(self.each(callback is not None)):
            return None
        return lambda *args: bool(self.sum(np.array(callback is not None and bool(callback(*args))))[0])

    def _meet(self, message: str | None = None) -> None:
        """Whether a process has failed, with this message: the others then raise."""
        if self._length:
            self._sum((), message)
        else:
            self._gather(None, message)

    def _sum(self, values: Sequence[Array], message: str | None = None) -> Array:
        unused = np.zeros(self._length - sum(value.size for value in values))
        vector = np.concatenate([*map(np.ravel, values), unused, [message is not None]], dtype=np.float64)
        self._can_tell = False  # of what the communication raises, the others can not be told by it
        total = self._all_reduce(vector)
        if total[-1]:
            self._gather(None, message)
        self._can_tell = True
        return total[:-1]

    def _gather(self, value: T, message: str | None = None) -> list[T]:
        self._can_tell = False
        found = self._all_gather((value, message))
        for rank, (_, failure) in enumerate(found):
            if failure is not None and message is None:
                raise RuntimeError(f"process {rank} of {self.size} failed, and with it the fit: {failure}")
        self._can_tell = True
        return [value for value, _ in found]

    def _all_reduce(self, vector: Array) -> Array:
        tensor = self._torch.as_tensor(vector, device=self.device)
        self._dist.all_reduce(tensor, group=self._group)
        return tensor.cpu().numpy()

    def _all_gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value, group=self._group)
        return values


def process_group(distributed: Any, X: Any, device: str | None = None) -> Group:
    """The group that `fit(distributed=...)` names: "torch" for all processes that torchrun started, or a ProcessGroup.

    Sums travel from where rows are computed: on `device`, or else where a tensor X is. A group that is made here lasts
    as long as its process, for the reasons that `launch` has.
    """
    if isinstance(distributed, str) and distributed != "torch":
        raise ValueError(f"distributed must be 'torch' or a torch.distributed process group, got {distributed!r}")
    try:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous
    except ImportError as error:
        raise ImportError("distributed='torch' needs torch; install gaussmix[torch]") from error
    device = device or (str(X.device) if is_torch_array(X) else "cpu")
    group = None if isinstance(distributed, str) else distributed
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"distributed must be 'torch' or a torch.distributed process group, got {distributed!r}")
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ValueError(
                "distributed='torch' finds no processes to work with; start the script with torchrun, or initialise "
                "torch.distributed first"
            )
        store, rank, size = next(rendezvous("env://"))
        # The store of a torchrun that restarted its processes still has the addresses of those before.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # type: ignore[attr-defined]
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"  # what is no tensor travels by gloo
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        atexit.register(_leave)
    if device == "cpu" and dist.get_backend(group) == "nccl":
        device = "cuda"  # the current device: NCCL knows no other memory
    return Group(device, group)


@dataclass(frozen=True)
class Share:
    """A process's rows of a data set that lies in several: one process's after the other's, in the order of ranks.

    What is said of the rows, apart from `rows`, is said of all of them, and is the same in every process.
    """

    rows: Rows | Stream
    group: Group
    counts: tuple[int, ...]  # rows of positive weight in each process
    shape: tuple[int, int]
    like: Array
    middle: Array  # (d,)

    @classmethod
    def of(cls, rows: Rows | Stream, group: Group) -> "Share":
        """The share that these rows are."""
        if type(rows) not in (Rows, Stream):
            raise TypeError("a Dask array has workers of its own; pass distributed=None, or this process's rows")
        (n, d), like = rows.shape, rows.like
        group.compare({"the number of features": d, "the dtype of X": str(like.dtype).rpartition(".")[2]})
        weight = rows.sample_weight
        own = n if weight is None else int(np.count_nonzero(to_numpy(weight) > 0))
        total = float(n) if weight is None else float(to_numpy(weight).sum(dtype=np.float64))
        middle = total * to_numpy(rows.mean(BLOCK_ROWS)) if own else np.zeros(d)
        counts, middle = group.sum(np.array([n, total]), middle)
        return cls(
            rows,
            group,
            tuple(group.each(own)),
            (int(counts[0]), d),
            like,
            asarray_like(middle / (counts[1] or 1), like, working_dtype(like)),
        )

    def computed(self, like: Array) -> "Share":
        """The same in the library that computes."""
        return replace(self, like=like, middle=asarray_like(self.middle, like, working_dtype(like)))

    @property
    def dtype(self) -> DType:
        """The dtype that sums are in."""
        return working_dtype(self.like)

    @property
    def n_positive(self) -> int:
        """Number of rows of positive weight."""
        return sum(self.counts)

    @property
    def before(self) -> int:
        """How many rows of positive weight the processes before this one have."""
        return sum(self.counts[: self.group.rank])

    def fingerprint(self) -> int:
        """What `fingerprint` makes of the rows and weights of all processes."""
        return sum(self.group.each(self.rows.fingerprint())) % 2**64

    def mean(self, size: int) -> Array:
        """Weighted mean of the rows: (d,), in the working dtype."""
        return self.middle

    def sample(self, size: int, random_state: np.random.RandomState) -> Rows:
        """As `Rows.sample`: the rows that a single process would draw, in every process."""
        chosen = np.arange(self.n_positive)
        if chosen.size > size:
            chosen = np.sort(sample_without_replacement(chosen.size, size, random_state=random_state))
        own = self.counts[self.group.rank]
        here = chosen[(chosen >= self.before) & (chosen < self.before + own)] - self.before
        weight = self.rows.sample_weight
        if weight is not None:
            weight = to_numpy(weight).astype(np.float64)
            here = np.flatnonzero(weight)[here]
            weight = weight[here]
        found = self.rows.take(here) if here.size else np.empty((0, self.shape[1]))
        parts = self.group.each((found, weight))
        weights = [part for _, part in parts if part is not None]
        return Rows(np.concatenate([part for part, _ in parts]), np.concatenate(weights) if weights else None)


class InProcesses:
    """Rows of which every process has a share, and takes it in the sums."""

    def __init__(self, group: Group, share: Passes | None, everything: Passes | None = None, before: int = 0) -> None:
        # `share` is None in a process without rows. `before` rows are those of the processes before this one.
        self._group, self._share, self._everything, self._before = group, share, everything, before

    def reduce(self, step: Callable[..., T], nothing: Callable[[], T], draw: Draw | None = None) -> T:
        """The sum of `step(block)` over the blocks of all processes."""
        if draw is not None:
            for part in slices(self._before, BLOCK_ROWS):
                draw(part.stop - part.start)  # those of other processes' rows
        own: Any = nothing() if self._share is None else self._share.reduce(step, nothing, draw)
        if not isinstance(own, SufficientStatistics):
            (total,) = self._group.sum(to_numpy(own))
            return asarray_like(total, own)
        # What is exact in all processes is so in the sum.
        inexact = np.array(self._share is not None and own.precision != CENTRED_PRECISION, dtype=np.float64)
        *summed, inexact = self._group.sum(*map(to_numpy, own.sums), inexact)
        found: Any = own.summed(asarray_like(value, own.origin) for value in summed)
        return replace(found, precision="" if inexact else CENTRED_PRECISION)

    def map(self, step: Callable[[Block], Array]) -> Array:
        """`step(block)` for all rows, where every process has them."""
        assert self._everything is not None
        return self._everything.map(step)


def share_of(rows: Rows, group: Group) -> slice:
    """The rows that are this process's."""
    n = rows.shape[0]
    return slice(n * group.rank // group.size, n * (group.rank + 1) // group.size)


def launch(fabric_params: dict[str, Any], function: Callable[[Group], T]) -> T:
    """`function` in every process that Lightning Fabric makes of these parameters."""
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise ImportError(
            "trainer_params asks for several processes, which Lightning Fabric launches; install gaussmix[lightning]"
        ) from error
    if "devices" not in fabric_params and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Under torchrun, Fabric would take each process for the only one.
        fabric_params = fabric_params | {"devices": int(os.environ["LOCAL_WORLD_SIZE"])}
    import torch.distributed

    call = partial(_in_group, function=function, is_own=not torch.distributed.is_initialized())
    # Lightning takes apart what travels between processes and refuses frozen dataclasses: it gets a callable and bytes.
    found: T = pickle.loads(Fabric(**fabric_params).launch(call))
    return found


def _in_group(fabric: Any, function: Callable[[Group], Any], is_own: bool) -> bytes:
    import torch.distributed

    if not torch.distributed.is_initialized():
        raise ValueError(
            f"trainer_params started a single process with strategy {type(fabric.strategy).__name__}; pass devices of "
            "at least 2, or strategy='ddp'"
        )
    # A process that ends with its group may abort. One that goes on keeps it: a process that is ahead of the others in
    # leaving it and making another would meet them in the old one.
    is_spawned = parent_process() is not None
    if is_own and not is_spawned:
        atexit.register(_leave)
    try:
        group = Group(str(fabric.device))
        with group.together():
            return pickle.dumps(function(group))
    finally:
        if is_own and is_spawned:
            _leave()


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
