"""Lightning Fabric, which launches the processes that `trainer_params` asks for."""

import atexit
import os
import pickle
from collections.abc import Callable
from functools import partial
from multiprocessing import parent_process
from typing import Any, TypeVar

from gaussmix.rows._group import Group, leave

T = TypeVar("T")


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
        atexit.register(leave)
    try:
        group = Group(str(fabric.device))
        with group.together():
            return pickle.dumps(function(group))
    finally:
        if is_own and is_spawned:
            leave()
