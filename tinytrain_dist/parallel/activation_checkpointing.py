"""Recompute activations in backward instead of keeping them, for whole blocks or for all except matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tinytrain_dist.distributed.torch_internals import float8_matmul_ops, fused_attention_ops

_MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
_MATMULS |= float8_matmul_ops()
_SAVED_OPS = _MATMULS | fused_attention_ops()  # operators whose results `selective` keeps


def apply_activation_checkpointing(block: nn.Module, how: str) -> None:
    """Make `block` recompute its activations in backward.

    `how`: block (recompute all), selective (keep the results of matrix products and attention), none (keep all).
    `block.forward` must not use random numbers. This replaces it, instead of wrapping the block in another module, so
    that parameter names do not change.
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
    """Return whether the result of an operator is kept or recomputed. Torch calls this for every operator."""
    return CheckpointPolicy.MUST_SAVE if op in _SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE
