"""Recompute activations in backward instead of keeping them, for whole blocks or all but matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def apply_activation_checkpointing(block: nn.Module, how: str) -> None:
    """Let `block` recompute in backward: everything (block), or all but matrix products (selective).

    The method is replaced and no module is put around it, so that parameter names stay as they are.
    """
    if how == "none":
        return
    kwargs: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_matmuls)
    plain: Callable[..., Tensor] = block.forward

    def forward(*args: Any) -> Any:
        return checkpoint(plain, *args, **kwargs)

    block.forward = forward


def _keep_matmuls(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
    }
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE
