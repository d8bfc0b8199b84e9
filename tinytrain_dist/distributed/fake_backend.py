"""Run distributed code without other ranks: with collectives that send nothing, and a context of simulated ranks.

For simulations of memory and traffic, and for trial steps. Must not know models.
"""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.torch_internals import (
    TorchDispatchMode,
    finished_work,
    functional_group_ranks,
    init_fake_process_group,
    tree_leaves,
)

ACTIVATION_EXCHANGE = "all_to_all_single"  # the operator with which context parallelism exchanges activations


class NoCommunication(TorchDispatchMode):
    """Disable collectives while this mode is on: they send nothing and end at once, so no rank waits for another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the unchanged buffers and a finished handle for a collective; run any other operation."""
        if func.namespace == "_c10d_functional":
            return self._functional(func.__name__.partition(".")[0], *args)
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        argument_names = [argument.name for argument in func._schema.arguments]
        group_position = argument_names.index("process_group")
        group = dist.ProcessGroup.unbox(args[group_position])
        # the buffers are the arguments before the group, for some operations in nested lists
        tensors = [item for item in tree_leaves(args[:group_position]) if isinstance(item, Tensor)]
        self.message(func.__name__, tensors, tuple(dist.get_process_group_ranks(group)))
        returns_only_work = len(func._schema.returns) == 1
        return finished_work() if returns_only_work else (args[0], finished_work())

    def _functional(self, name: str, tensor: Tensor, *args: Any) -> Tensor:
        """Return the result of an operator that torch.compile can trace, as if each rank had sent the same."""
        if name == "wait_tensor":
            return tensor
        assert name == ACTIVATION_EXCHANGE, f"{name} is not used"
        self.message(name, [tensor], functional_group_ranks(args[-1]))
        return torch.empty_like(tensor)

    def message(self, name: str, tensors: list[Tensor], ranks: tuple[int, ...]) -> None:
        """Do nothing; subclasses override this to record each collective that was called.

        `name`: the c10d operator. `tensors`: its buffers. `ranks`: the global ranks of its group.
        """


def fake_context(world_size: int, local_world_size: int, device_type: str = "cpu") -> DistributedContext:
    """Return the context of rank 0 among `world_size` simulated ranks. Its groups and meshes send nothing.

    device_type: of the devices that the simulated ranks have, "cpu" or "cuda".
    """
    init_fake_process_group(world_size)
    return DistributedContext(
        rank=0,
        local_rank=0,
        world_size=world_size,
        local_world_size=local_world_size,
        host=socket.gethostname(),
        device=torch.device("cpu"),
        simulated_type=device_type,
    )
