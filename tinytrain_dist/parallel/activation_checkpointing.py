"""Recompute activations in backward instead of keeping them, for whole blocks or for all but matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tinytrain_dist.distributed.torch_internals import fused_attention_ops

_MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
_SAVED_OPS = _MATMULS | fused_attention_ops()  # what `selective` keeps


def apply_activation_checkpointing(block: nn.Module, how: str) -> None:
    """Let `block` recompute in backward: everything (block), all but matrix products (selective), or nothing (none).

    `block.forward` must use no random numbers. It is replaced, and no module is put around the block, so that
    parameter names stay as they are.
    """
    if how == "none":
        return
    kwargs: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_matmuls)
    original_forward: Callable[..., Tensor] = block.forward

    def forward(*args: Any) -> Any:
        return checkpoint(original_forward, *args, **kwargs)

    block.forward = forward


def _keep_matmuls(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Decide what is kept: the policy function that torch calls with every operator."""
    return CheckpointPolicy.MUST_SAVE if op in _SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE
