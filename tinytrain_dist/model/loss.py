"""Compute softmax cross-entropy over token ids, alone and fused with the output head.

Must not know ranks, models or configurations. Every sum is taken in float32; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytrain_dist.data.training_windows import IGNORE_INDEX as IGNORE_INDEX
from tinytrain_dist.model.matmul import add_product, matmul_dtype, runs_on_cuda

# Largest number of logits in a chunk if loss_chunk_tokens is not set. In float32 on a CPU it is half of this.
MAX_CHUNK_LOGITS = 1 << 24
# On a GPU, small chunks read the weight too often for the matrix units to be busy.
# measured (H200, 2026-11-27), 16,384 tokens, d_model 2048, 50,304 logits each, forward and backward: chunks of 256
# tokens (2^24 logits) 44 ms, 2,048 tokens (2^27) 19 ms, 8,192 tokens 17 ms with 1.8 GB more memory
MAX_CHUNK_LOGITS_ON_CUDA = 1 << 27
ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Losses of single windows are logged in whole numbers of this unit, whose sums do not depend on their order.
LOSS_UNIT = 2.0**-16


def cross_entropy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Return the cross-entropy of `targets` under softmax(`logits`), in nats.

    logits: [..., V] of any float type (bf16 and fp16 are widened to float32 first).
    targets: [...] of integers in 0 .. V-1; entries equal to `ignore_index` count neither in the sum nor in the mean.
    Returns a scalar, or [...] for reduction="none".
    Errors: ValueError for other shapes or types, and on CPU for ids outside 0 .. V-1 (on an accelerator the
    kernel reports those).
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
        outside = (targets < 0) | (targets >= vocab_size)
        bad_targets = targets[outside & (targets != ignore_index)]
        if bad_targets.numel():
            raise ValueError(f"cross_entropy_loss: target {int(bad_targets[0])} is not in 0 .. {vocab_size - 1}")
    rows = logits.reshape(-1, vocab_size)
    if rows.dtype in (torch.bfloat16, torch.float16):
        rows = rows.float()
    loss = F.cross_entropy(rows, targets, ignore_index=ignore_index, reduction=reduction)
    return loss.reshape(logits.shape[:-1]) if reduction == "none" else loss


def chunk_loss_and_grad(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of some tokens, and its gradient with respect to their logits.

    logits: [N, V]; targets: [N] of integers in 0 .. V-1 or IGNORE_INDEX. Returns a float32 scalar and [N, V] in the
    type of the logits.
    """
    log_p, grad = _log_p_and_grad(logits, targets)
    return -log_p.sum(), grad


def chunk_token_losses_and_grad(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each of some tokens, float32 [N], and the gradient of their sum; see `chunk_loss_and_grad`."""
    log_p, grad = _log_p_and_grad(logits, targets)
    return -log_p.squeeze(1), grad


def _log_p_and_grad(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target (0 for IGNORE_INDEX), [N, 1], and the gradient of the summed loss."""
    kept = (targets != IGNORE_INDEX).unsqueeze(1)
    ids = targets.clamp_min(0).unsqueeze(1)  # any valid ID in place of IGNORE_INDEX
    logits_float = logits.float()
    # A single exp serves both loss and gradient. In eager mode it works in place.
    # measured (2-core x86 VM, 2026-11-25), [1,024, 10,000]: compiled 15 ms, eager 24 ms; with logsumexp, a second exp
    # and a comparison of all IDs with the target: compiled 25 ms, eager 65 ms
    row_max = logits_float.amax(dim=1, keepdim=True)
    powers = (logits_float - row_max).exp_()
    row_sum = powers.sum(dim=1, keepdim=True)
    target_log_p = logits_float.gather(1, ids) - row_max - row_sum.log()
    grad = powers.mul_(kept / row_sum).to(logits.dtype)
    # The gradient at the target is p - 1. It is computed with expm1 before the cast, because p itself would round to 1
    # in the type of the logits for a confident token.
    target_grad = (target_log_p.expm1() * kept).to(grad.dtype)
    # measured (2-core x86 VM, 2026-11-27), this assignment in bfloat16 [1,024, 10,000]: 0.03 ms; scatter_ 19 ms
    rows = torch.arange(len(ids), device=ids.device)
    grad.index_put_((rows, ids.squeeze(1)), target_grad.squeeze(1))
    return target_log_p * kept, grad


def head_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int | None = None,
    chunk_loss: ChunkLoss = chunk_loss_and_grad,
    token_losses: list[Tensor] | None = None,
) -> Tensor:
    """Return the summed cross-entropy of `targets` under softmax(hidden @ weight.T), without range checks.

    The [N, V] logits never exist at once. For each chunk of tokens, forward computes the logits, their loss and both
    gradients. So only chunk_tokens x V logits are in memory, and backward does not recompute them.

    hidden: [N, D]; weight: [V, D], used in hidden's type; targets: [N] of integers, IGNORE_INDEX allowed.
    chunk_tokens: tokens per chunk. None: N, halved until a chunk has at most `max_chunk_logits` logits. Halving gives
    chunks of equal size, which torch.compile compiles only once.
    chunk_loss: chunk_loss_and_grad, or its compiled version.
    token_losses: filled with the losses of the tokens, chunk by chunk, if chunk_loss is chunk_token_losses_and_grad.
    Returns a float32 scalar.
    """
    chunk = chunk_tokens or len(hidden)
    if chunk_tokens is None:
        while chunk > 1 and chunk * weight.shape[0] > max_chunk_logits(hidden):
            chunk = (chunk + 1) // 2
    want_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _ChunkedHeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, chunk, chunk_loss, want_grad, token_losses
    )
    return loss


def max_chunk_logits(hidden: Tensor) -> int:
    """Return how many logits of one chunk may exist at once, if loss_chunk_tokens is not set."""
    if runs_on_cuda(hidden):
        return MAX_CHUNK_LOGITS_ON_CUDA
    return MAX_CHUNK_LOGITS // 2 if matmul_dtype(hidden).itemsize > 2 else MAX_CHUNK_LOGITS


class _ChunkedHeadLoss(torch.autograd.Function):
    """Head and loss in chunks. Forward computes the gradients of the loss; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        chunk_loss: ChunkLoss,
        want_grad: bool,
        token_losses: list[Tensor] | None,
    ) -> Tensor:
        dtype = matmul_dtype(hidden)
        rounded_weight = weight.to(hidden.dtype).to(dtype)
        losses: list[Tensor] = []
        grads_hidden: list[Tensor] = []
        grad_weight: Tensor | None = None
        for hidden_chunk, target_chunk in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            hidden_chunk = hidden_chunk.to(dtype)
            loss, grad = chunk_loss(F.linear(hidden_chunk, rounded_weight), target_chunk)
            if token_losses is not None:
                token_losses.append(loss)
                loss = loss.sum()
            losses.append(loss)
            if not want_grad:
                continue
            grads_hidden.append((grad @ rounded_weight).to(hidden.dtype))
            grad_weight = add_product(grad_weight, grad.T, hidden_chunk, weight.dtype)
        if want_grad:
            ctx.save_for_backward(torch.cat(grads_hidden), grad_weight)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place, because a second [V, D] tensor would be the largest of the step. Autograd then refuses a second
        # backward.
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None, None, None, None
