"""Update all parameters of a run: clip the gradients, and let the optimizer of each parameter group do its step.

Must not know configurations, schedules or any particular optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tinytrain_dist.config.parameter_groups import ResolvedGroup
from tinytrain_dist.distributed.dtensor import local_tensor
from tinytrain_dist.optim.base import Optimizer, StateTensor, call_closure
from tinytrain_dist.optim.clipping import CLIP_EPS
from tinytrain_dist.optim.weight_average import WeightAverage


class RunOptimizer(Optimizer):
    """The parameter groups of several optimizers as one optimizer, which checkpoints and estimates see.

    * `parts`: the optimizers. They share their state and their groups with this one.
    * `groups`: what each of `param_groups` was resolved from, in the same order. step_settings.py sets their values.
    * `clips_in_kernel`: whether the optimizers divide the gradients to clip them, which saves a pass over them. On a
      CPU the two ways round differently, and neither is faster.
    * `average`: the moving average of the weights; build.py replaces it if the run has one.
    """

    def __init__(self, parts: Sequence[Optimizer], groups: Sequence[ResolvedGroup], *, clips_in_kernel: bool) -> None:
        """Join the parts. `groups`: those of all parts, one after the other."""
        super().__init__([group for part in parts for group in part.param_groups], {})
        assert len(groups) == len(self.param_groups)
        self.parts = list(parts)
        self.groups = list(groups)
        self.clips_in_kernel = clips_in_kernel
        self.average = WeightAverage(self)
        for part in parts:
            part.state = self.state  # each parameter is in one part only

    def state_tensors(self, param: Tensor) -> tuple[StateTensor, ...]:
        """Return what the optimizer of this parameter keeps for it."""
        owner = next(
            part for part in self.parts if any(param is own for group in part.param_groups for own in group["params"])
        )
        return owner.state_tensors(param)

    def materialize(self) -> None:
        """Create the state of every parameter as zeros."""
        for part in self.parts:
            part.materialize()

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        skip: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> Any:
        """Let each optimizer update its parameters; see `Optimizer.step`."""
        loss = call_closure(closure)
        for part in self.parts:
            part.step(skip=skip, grad_scale=grad_scale)
        return loss

    def clip_and_step(self, norm: Tensor, max_norm: float | None, skip: Tensor) -> None:
        """Clip the gradients by their global norm, update unless `skip` is 1, and free the gradients.

        norm: of the whole gradient, a scalar on the device. max_norm: the limit (None: no clipping). Does not wait for
        the device.
        """
        grad_scale = None
        if max_norm is not None and self.clips_in_kernel:
            # at least 1: gradients below the limit are divided by 1, which is exact
            grad_scale = ((norm + CLIP_EPS) / max_norm).clamp(min=1.0).float()
        elif max_norm is not None:
            factor = (max_norm / (norm + CLIP_EPS)).clamp(max=1.0).float()
            params = [param for group in self.param_groups for param in group["params"]]
            torch._foreach_mul_([local_tensor(param.grad) for param in params if param.grad is not None], factor)
        self.step(skip=skip, grad_scale=grad_scale)
        self.zero_grad(set_to_none=True)
