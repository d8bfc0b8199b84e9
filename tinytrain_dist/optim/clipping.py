"""Clip gradients by their global norm.

Must not know the optimizer or the training loop. A run clips in `RunOptimizer`, which never reads the norm from the
device. This function is for training loops that users write themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tinytrain_dist.distributed.dtensor import is_dtensor, local_tensor

CLIP_EPS = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ does


@torch.no_grad()
def clip_gradients(
    params: Iterable[Tensor] | Tensor, max_norm: float, eps: float = CLIP_EPS, *, error_if_nonfinite: bool = True
) -> Tensor:
    """Scale all gradients by max_norm / (norm + eps) if their global L2 norm is larger than `max_norm`.

    params: an iterable of parameters (also a generator), or one tensor. The norm of sharded gradients is taken over
    all their ranks, so every rank must call this function.
    error_if_nonfinite: read the norm from the device, and raise if it is not finite. If False, gradients with a
    non-finite norm are left as they are, and the caller must check the norm.
    Returns the norm before clipping, a scalar tensor, the same on every rank.
    Errors: ValueError if max_norm <= 0, or if the norm is not finite (see error_if_nonfinite).
    """
    if not max_norm > 0:
        raise ValueError(f"clip_gradients: max_norm must be greater than 0, got {max_norm}")
    params = [params] if isinstance(params, Tensor) else list(params)
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = [_total_norm(group) for group in _group_by_mesh(grads)]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if error_if_nonfinite and not norm.isfinite():
        raise ValueError(
            f"clip_gradients: the gradient norm is {norm.item()}; skip this step or lower the learning rate"
        )
    factor = torch.where(norm.isfinite(), (max_norm / (norm + eps)).clamp(max=1.0), 1.0)
    for grad in grads:
        local_tensor(grad).mul_(factor)
    return norm


def _group_by_mesh(grads: list[Tensor]) -> list[list[Tensor]]:
    """Return a group of the plain gradients and one of each mesh, because torch cannot mix them in one call."""
    groups: dict[Any, list[Tensor]] = {}
    for grad in grads:
        groups.setdefault(grad.device_mesh if is_dtensor(grad) else None, []).append(grad)
    return list(groups.values())


def _total_norm(grads: list[Tensor]) -> Tensor:
    """Return the L2 norm of all `grads` over all ranks of their mesh."""
    norm: Tensor = torch.nn.utils.get_total_norm(grads)
    full_norm: Tensor = norm.full_tensor() if is_dtensor(norm) else norm
    return full_norm
