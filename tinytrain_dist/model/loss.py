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
ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # see chunk_loss_and_grad
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


def soft_cap_logits(logits: Tensor, soft_cap: float) -> Tensor:
    """Return soft_cap * tanh(logits / soft_cap), computed in float32, in the type of the logits.

    Source: Gemma 2 (arXiv 2408.00118), section 2.
    """
    return ((logits.float() / soft_cap).tanh() * soft_cap).to(logits.dtype)


def chunk_loss_and_grad(
    logits: Tensor, targets: Tensor, soft_cap: float | None = None, z_loss: float | None = None
) -> tuple[Tensor, ...]:
    """Return the summed loss of some tokens, and its gradient with respect to their logits.

    logits: [N, V]; targets: [N] of integers in 0 .. V-1 or IGNORE_INDEX. soft_cap: see `soft_cap_logits` (None: no
    cap). Returns a float32 scalar and [N, V] in the type of the logits.

    z_loss: a third value is returned, the sum of z_loss * log(Z)^2, where Z is the sum of the exponentials of a token's
    logits. The gradient is then that of both sums. Source: PaLM (Chowdhery et al. 2022), section 5.
    """
    log_p, grad, *z_sum = _log_p_and_grad(logits, targets, soft_cap, z_loss)
    return -log_p.sum(), grad, *z_sum


def chunk_token_losses_and_grad(
    logits: Tensor, targets: Tensor, soft_cap: float | None = None, z_loss: float | None = None
) -> tuple[Tensor, ...]:
    """Return the loss of each of some tokens, float32 [N], and the rest as `chunk_loss_and_grad`."""
    log_p, grad, *z_sum = _log_p_and_grad(logits, targets, soft_cap, z_loss)
    return -log_p.squeeze(1), grad, *z_sum


def choose_chunk_loss(keep_token_losses: bool, soft_cap: float | None, z_loss: float | None) -> ChunkLoss:
    """Return the function of a chunk's logits and targets that computes the loss which the settings choose."""
    plain = chunk_token_losses_and_grad if keep_token_losses else chunk_loss_and_grad
    if soft_cap is None and z_loss is None:
        return plain

    def chunk_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return plain(logits, targets, soft_cap, z_loss)

    return chunk_loss


def _log_p_and_grad(
    logits: Tensor, targets: Tensor, soft_cap: float | None, z_loss: float | None
) -> tuple[Tensor, ...]:
    """Return the log-probability of each target (0 for IGNORE_INDEX), [N, 1], and the gradient of the summed loss.

    With z_loss, also the sum of z_loss * log(Z)^2.
    """
    kept = (targets != IGNORE_INDEX).unsqueeze(1)
    ids = targets.clamp_min(0).unsqueeze(1)  # any valid ID in place of IGNORE_INDEX
    logits_float = logits.float()
    if soft_cap is not None:
        ratio = (logits_float / soft_cap).tanh()
        logits_float = ratio * soft_cap
        slope = 1 - ratio.square()  # the derivative of the capped logits
    # A single exp serves both loss and gradient. In eager mode it works in place.
    # measured (2-core x86 VM, 2026-11-25), [1,024, 10,000]: compiled 15 ms, eager 24 ms; with logsumexp, a second exp
    # and a comparison of all IDs with the target: compiled 25 ms, eager 65 ms
    row_max = logits_float.amax(dim=1, keepdim=True)
    powers = (logits_float - row_max).exp_()
    row_sum = powers.sum(dim=1, keepdim=True)
    target_log_p = logits_float.gather(1, ids) - row_max - row_sum.log()
    # The gradient at the target is p - 1. It is computed with expm1 before the cast, because p itself would round to 1
    # in the type of the logits for a confident token.
    target_grad = target_log_p.expm1() * kept
    factor = kept / row_sum
    z_sum: tuple[Tensor, ...] = ()
    if z_loss is not None:
        log_z = (row_max + row_sum.log()) * kept
        z_sum = ((z_loss * log_z.square()).sum(),)
        # the derivative of log(Z) is p, for every ID
        factor = factor * (1 + 2 * z_loss * log_z)
        target_grad = target_grad + 2 * z_loss * log_z * target_log_p.exp()
    grad = powers.mul_(factor)
    if soft_cap is not None:
        grad = grad.mul_(slope)
        target_grad = target_grad * slope.gather(1, ids)
    grad = grad.to(logits.dtype)
    # measured (2-core x86 VM, 2026-11-27), this assignment in bfloat16 [1,024, 10,000]: 0.03 ms; scatter_ 19 ms
    rows = torch.arange(len(ids), device=ids.device)
    grad.index_put_((rows, ids.squeeze(1)), target_grad.to(grad.dtype).squeeze(1))
    return target_log_p * kept, grad, *z_sum


def head_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int | None = None,
    chunk_loss: ChunkLoss = chunk_loss_and_grad,
    token_losses: list[Tensor] | None = None,
    z_losses: list[Tensor] | None = None,
) -> Tensor:
    """Return the summed cross-entropy of `targets` under softmax(hidden @ weight.T), without range checks.

    The [N, V] logits never exist at once. For each chunk of tokens, forward computes the logits, their loss and both
    gradients. So only chunk_tokens x V logits are in memory, and backward does not recompute them.

    hidden: [N, D]; weight: [V, D], used in hidden's type; targets: [N] of integers, IGNORE_INDEX allowed.
    chunk_tokens: tokens per chunk. None: N, halved until a chunk has at most `max_chunk_logits` logits. Halving gives
    chunks of equal size, which torch.compile compiles only once.
    chunk_loss: chunk_loss_and_grad, or its compiled version.
    token_losses: filled with the losses of the tokens, chunk by chunk, if chunk_loss is chunk_token_losses_and_grad.
    z_losses: filled with the z-loss of each chunk, if chunk_loss computes it.
    Returns a float32 scalar. A z-loss is not part of it, but of its gradient.
    """
    chunk = chunk_tokens or len(hidden)
    if chunk_tokens is None:
        while chunk > 1 and chunk * weight.shape[0] > max_chunk_logits(hidden):
            chunk = (chunk + 1) // 2
    want_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _ChunkedHeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, chunk, chunk_loss, want_grad, token_losses, z_losses
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
        z_losses: list[Tensor] | None,
    ) -> Tensor:
        dtype = matmul_dtype(hidden)
        rounded_weight = weight.to(hidden.dtype).to(dtype)
        losses: list[Tensor] = []
        grads_hidden: list[Tensor] = []
        grad_weight: Tensor | None = None
        for hidden_chunk, target_chunk in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            hidden_chunk = hidden_chunk.to(dtype)
            loss, grad, *z_sum = chunk_loss(F.linear(hidden_chunk, rounded_weight), target_chunk)
            if z_losses is not None:
                z_losses += z_sum
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
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None, None, None, None, None
