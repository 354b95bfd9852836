"""Processes that fit together: a torch.distributed process group, whose members fail together."""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from array_api_compat import is_torch_array

from gaussmix._typing import Array

T = TypeVar("T")


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
        atexit.register(leave)
    if device == "cpu" and dist.get_backend(group) == "nccl":
        device = "cuda"  # the current device: NCCL knows no other memory
    return Group(device, group)


def leave() -> None:
    """Leave the process group."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
