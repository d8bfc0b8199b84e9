"""Run collectives that send nothing: for simulations and memory trials of a single process."""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinytrain_dist.distributed.context import DistributedContext


class NoCommunication(TorchDispatchMode):
    """While it is on, collectives move nothing and end at once, so that no rank waits for another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run anything but a collective; of one, hand back its buffers as they are."""
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        place = next(i for i, argument in enumerate(func._schema.arguments) if argument.name == "process_group")
        group = dist.ProcessGroup.unbox(args[place])
        tensors = [leaf for leaf in tree_leaves(args[:place]) if isinstance(leaf, Tensor)]
        self.message(func.__name__, tensors, tuple(dist.get_process_group_ranks(group)))
        from torch._C._distributed_c10d import FakeWork

        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    def message(self, name: str, tensors: list[Tensor], ranks: tuple[int, ...]) -> None:
        """Receive the operation and its buffers instead of sending them; subclasses record them."""


def fake_context(world_size: int, local_world_size: int) -> DistributedContext:
    """Rank 0 of a world that is not there: groups and meshes can be made, nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    return DistributedContext(0, 0, world_size, local_world_size, socket.gethostname(), torch.device("cpu"))
