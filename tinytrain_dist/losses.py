"""Owns the loss: softmax cross-entropy over token ids, alone and fused with the output head.

Must not know ranks, models or configurations; every sum is taken in float32 (float64 stays float64).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def cross_entropy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Cross-entropy of `targets` under softmax(`logits`), in nats.

    logits: [..., V] of any float type (bf16 and fp16 are widened to float32 first). targets: [...] of integers in
    0 .. V-1; entries equal to `ignore_index` count neither in the sum nor in the mean. Returns a scalar, or [...]
    for reduction="none". Errors: ValueError for other shapes or types, and on CPU for ids outside 0 .. V-1 (an
    accelerator reports those from its kernel).
    """
    if logits.ndim < 1 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"cross_entropy_loss: logits {list(logits.shape)} need targets of shape {list(logits.shape[:-1])}, "
            f"got {list(targets.shape)}"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"cross_entropy_loss: targets must be integer token ids, got {targets.dtype}")
    vocab_size = logits.shape[-1]
    targets = targets.reshape(-1).long()
    if targets.device.type == "cpu":
        bad = targets[((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)]
        if bad.numel():
            raise ValueError(f"cross_entropy_loss: target {int(bad[0])} is not in 0 .. {vocab_size - 1}")
    rows = logits.reshape(-1, vocab_size)
    if rows.dtype in (torch.bfloat16, torch.float16):
        rows = rows.float()
    loss = F.cross_entropy(rows, targets, ignore_index=ignore_index, reduction=reduction)
    return loss.reshape(logits.shape[:-1]) if reduction == "none" else loss


def head_loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Summed cross-entropy of `targets` under softmax(hidden @ weight.T), without range checks: the hot path.

    hidden: [N, D]; weight: [V, D], used in hidden's type; targets: [N]. With `chunk_tokens` the [N, V] logits never
    exist: each piece of that many tokens makes its logits, their loss and both gradients at once, so that the memory is
    chunk_tokens x V instead of N x V, for one more matrix product less than recomputing them in backward.
    Returns a float32 scalar.
    """
    if chunk_tokens is None or chunk_tokens >= hidden.shape[0]:
        logits = F.linear(hidden, weight.to(hidden.dtype))
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    loss: Tensor = _ChunkedHeadLoss.apply(hidden, weight, targets, chunk_tokens)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedHeadLoss(torch.autograd.Function):
    """Head and loss in pieces; the gradients for a unit loss are made in forward and scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        want_grad = hidden.requires_grad or weight.requires_grad
        narrow = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_grad else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            piece = slice(start, start + chunk_tokens)
            ids = targets[piece]
            kept = (ids != IGNORE).unsqueeze(1)
            column = ids.clamp_min(0).unsqueeze(1)
            logits = F.linear(hidden[piece], narrow).float()
            log_z = logits.logsumexp(dim=1, keepdim=True)
            loss += ((log_z - logits.gather(1, column)) * kept).sum()
            if grad_hidden is not None and grad_weight is not None:
                probabilities = logits.sub_(log_z).exp_()
                probabilities.scatter_add_(1, column, torch.full_like(column, -1, dtype=torch.float32))
                probabilities = (probabilities * kept).to(hidden.dtype)
                grad_hidden[piece] = probabilities @ narrow
                grad_weight += (probabilities.T @ hidden[piece]).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (scale,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale.to(grad_hidden.dtype), (grad_weight * scale).to(ctx.weight_dtype), None, None
