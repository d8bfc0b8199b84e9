"""Clip gradients by their global norm.

Must not know the optimizer or the loop. The training step has its own clipping, on the device; this one is for users'
own loops.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tinytrain_dist.distributed.dtensor import local_tensor


@torch.no_grad()
def clip_gradients(
    params: Iterable[Tensor] | Tensor, max_norm: float, eps: float = 1e-6, *, error_if_nonfinite: bool = True
) -> Tensor:
    """Scale all gradients by max_norm / (norm + eps) if their global L2 norm is larger than `max_norm`.

    params: any iterable of parameters, also a generator, or one tensor. Sharded gradients count over all their ranks;
    then this is a collective, and every rank must call it.
    error_if_nonfinite: read the norm from the device and raise if it is not finite. If False, gradients are then left
    as they are, and the caller checks the norm.
    Returns the norm before clipping, a scalar tensor, the same on every rank.
    Errors: ValueError if max_norm <= 0, or if the norm is not finite (see error_if_nonfinite).
    """
    if not max_norm > 0:
        raise ValueError(f"clip_gradients: max_norm must be greater than 0, got {max_norm}")
    params = [params] if isinstance(params, Tensor) else list(params)
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack([_total_norm(group) for group in _by_mesh(grads)]))
    if error_if_nonfinite and not norm.isfinite():
        raise ValueError(f"clip_gradients: the gradient norm is {norm.item()}; skip this step or lower the rate")
    factor = torch.where(norm.isfinite(), (max_norm / (norm + eps)).clamp(max=1.0), 1.0)
    for grad in grads:
        local_tensor(grad).mul_(factor)
    return norm


def _by_mesh(grads: list[Tensor]) -> list[list[Tensor]]:
    """Return the gradients in groups that torch can treat as one list: plain ones, and those of each mesh."""
    groups: dict[Any, list[Tensor]] = {}
    for grad in grads:
        groups.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    return list(groups.values())


def _total_norm(grads: list[Tensor]) -> Tensor:
    """Return the L2 norm of all `grads` over all ranks of their mesh."""
    norm: Tensor = torch.nn.utils.get_total_norm(grads)
    whole: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return whole
