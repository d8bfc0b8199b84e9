"""Define what a run needs of an optimizer: its state by parameter, its sharding rule, and a step that can be skipped.

A further optimizer is a subclass of `Optimizer` in a file of its own, and a line in `build.py`. Must not know
configurations, models or any particular optimizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tinytrain_dist.distributed.dtensor import local_tensor
from tinytrain_dist.distributed.torch_internals import without_loading_compiler


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a parameter's state: its name, and shape and type of the whole tensor.

    A tensor with the parameter's shape is sharded as the parameter is. Any other is whole on every rank.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Optimizer(torch.optim.Optimizer, ABC):
    """An optimizer whose state is known before the first step, and whose step can be skipped without reading a value.

    `updates_whole_matrices` is its sharding rule. False: the update of an element depends on no other element, so each
    rank updates the part of a parameter that it holds, without communication. True: the update of a matrix depends on
    all of it, so one rank computes it for all.
    """

    updates_whole_matrices: ClassVar[bool] = False

    # torch hides these from its compiler, which the first call would import
    add_param_group = without_loading_compiler(torch.optim.Optimizer.add_param_group)
    state_dict = without_loading_compiler(torch.optim.Optimizer.state_dict)
    zero_grad = without_loading_compiler(torch.optim.Optimizer.zero_grad)

    @abstractmethod
    def state_tensors(self, param: Tensor) -> tuple[StateTensor, ...]:
        """Return what the state of a parameter consists of. Estimates and checkpoints need it before the first step."""

    @abstractmethod
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        skip: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> Any:
        """Update all parameters from the gradients in `.grad`. Parameters without a gradient do not change.

        closure: computes the loss again, as for every torch optimizer; its result is returned.
        skip: float32 scalar on the parameters' device; if it is 1, neither weights nor state change, whatever the
        gradients are. It is never read from the device, so that skipping a non-finite step costs no synchronization.
        grad_scale: float32 scalar on the parameters' device. The gradients are divided by it, also those in `.grad`.
        """

    def materialize(self) -> None:
        """Create the state of every parameter as zeros, so that it can be saved or loaded before the first step."""
        for group in self.param_groups:
            for param in group["params"]:
                if not self.state[param]:
                    self.state[param] = {tensor.name: _zeros(param, tensor) for tensor in self.state_tensors(param)}


def _zeros(param: Tensor, tensor: StateTensor) -> Tensor:
    """Return a state tensor of zeros, on the device of `param`, and sharded like it if it has the same shape."""
    if tensor.shape == tuple(param.shape):
        return torch.zeros_like(param, dtype=tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=local_tensor(param).device)


def call_closure(closure: Callable[[], Any] | None) -> Any:
    """Return the loss that a closure computes, with gradients; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
