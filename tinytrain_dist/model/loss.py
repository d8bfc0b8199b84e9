"""Softmax cross-entropy over token IDs, alone and fused with the output head.

Must not know ranks, models or configurations. Every sum is taken in float32 (float64 stays float64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytrain_dist.model.matmul import matmul_dtype

IGNORE_INDEX = -100
MAX_CHUNK_LOGITS = (
    1 << 24
)  # logits that exist at once if loss_chunk_tokens is not set; in float32 on a CPU half as many
ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
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


def chunk_loss_and_grad(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of some tokens, a float32 scalar, and its gradient [N, V] in the type of the logits."""
    kept, ids = (targets != IGNORE_INDEX).unsqueeze(1), targets.clamp_min(0).unsqueeze(1)
    wide = logits.float()
    # one exp for both results, in place where nothing is compiled; the target's own entry by expm1, since p - 1 in the
    # type of the logits would lose what a confident token has left (measured, 1,024 x 10,000: 15 ms, eager 24; with
    # logsumexp, a second exp and a comparison with every id 25 and 65)
    top = wide.amax(dim=1, keepdim=True)
    powers = (wide - top).exp_()
    z = powers.sum(dim=1, keepdim=True)
    log_p = wide.gather(1, ids) - top - z.log()
    grad = powers.mul_(kept / z).to(logits.dtype)
    return -(log_p * kept).sum(), grad.scatter_(1, ids, (log_p.expm1() * kept).to(grad.dtype))


def head_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int | None = None,
    piece: ChunkLoss = chunk_loss_and_grad,
) -> Tensor:
    """Return the summed cross-entropy of `targets` under softmax(hidden @ weight.T), without range checks.

    hidden: [N, D]; weight: [V, D], used in hidden's type; targets: [N]. The [N, V] logits never exist: each piece of
    `chunk_tokens` tokens makes its logits, their loss and both gradients at once, so that the memory is
    chunk_tokens x V, for one matrix product less than recomputing them in backward. None: the batch is halved until
    a piece has at most CHUNK_LOGITS logits; equal pieces are compiled once. `piece`: loss_piece, or what torch.compile
    made of it. Returns a float32 scalar.
    """
    most = MAX_CHUNK_LOGITS >> (hidden.device.type == "cpu" and matmul_dtype(hidden).itemsize > 2)
    chunk = chunk_tokens or len(hidden)
    while chunk_tokens is None and chunk > 1 and chunk * weight.shape[0] > most:
        chunk = -(-chunk // 2)
    want_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _ChunkedHeadLoss.apply(hidden, weight, targets, chunk, piece, want_grad)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedHeadLoss(torch.autograd.Function):
    """Head and loss in pieces; the gradients for a unit loss are made in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, piece: ChunkLoss, want_grad: bool
    ) -> Tensor:
        dtype = matmul_dtype(hidden)
        narrow = weight.to(hidden.dtype).to(dtype)
        losses, grads_hidden = [], []
        grad_weight: Tensor | None = None
        for x, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            x = x.to(dtype)
            loss, grad = piece(F.linear(x, narrow), ids)
            losses.append(loss)
            if want_grad:
                grads_hidden.append((grad @ narrow).to(hidden.dtype))
                if grad_weight is None:
                    grad_weight = (grad.T @ x).to(weight.dtype)
                elif grad.dtype == x.dtype == grad_weight.dtype:  # not so under somebody's autocast
                    grad_weight.addmm_(grad.T, x)
                else:
                    grad_weight.add_(grad.T @ x)
        if want_grad:
            ctx.save_for_backward(torch.cat(grads_hidden), grad_weight)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        # in place: a second [V, D] would be the largest tensor of the step (autograd refuses to come here twice)
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None, None, None
