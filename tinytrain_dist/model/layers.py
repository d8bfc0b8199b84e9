"""Define the layers of the model: norm, matrix product, feed-forward, embedding and output head.

Must not know configurations or ranks. Each layer computes in the type of its input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytrain_dist.model.fp8 import fp8_linear
from tinytrain_dist.model.loss import (
    IGNORE_INDEX,
    choose_chunk_loss,
    head_loss_sum,
    soft_cap_logits,
)
from tinytrain_dist.model.matmul import linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, with the mean taken in float32.

    dim: size of that axis; eps: added to the mean square. Source: Zhang & Sennrich 2019 (arXiv 1910.07467).
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim] of any float type; returns the same shape and type."""
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class Linear(nn.Linear):
    """A linear layer without bias, whose weight is cast to the type of the input, or both to float8 if `fp8` is set."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features] in x's type."""
        return fp8_linear(x, self.weight) if self.fp8 else linear(x, self.weight)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), d_model -> d_ff -> d_model. Source: Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_model]; returns the same shape."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Embedding(nn.Embedding):
    """A table of vectors by token ID. The vectors are cast to `dtype`, the type in which the model computes."""

    def __init__(self, vocab_size: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__(vocab_size, dim)
        self.compute_dtype = dtype

    def reset_parameters(self) -> None:
        """Draw the vectors, unless they have no memory: on the meta device a draw imports torch's compiler."""
        if self.weight.device.type != "meta":
            super().reset_parameters()

    def forward(self, ids_bt: Tensor) -> Tensor:
        """ids: [b, t]; returns [b, t, d]. The weight's gradient is summed over tokens in its own type, float32."""
        return F.embedding(ids_bt, self.weight).to(self.compute_dtype)


class LMHead(Linear):
    """The output head. With targets it returns the summed loss, without ever holding the logits of all tokens.

    keep_row_losses: append the losses of single windows to `row_losses`: float64 [2, b] for each call, the summed loss
    of each window and the number of its targets that count. The caller must clear the list.
    soft_cap: see `soft_cap_logits` (None: no cap).
    z_loss: coefficient of log(Z)^2, see `chunk_loss_and_grad` (None: no such loss). It is part of the gradient, but not
    of the returned loss. Calls with gradients append the summed z-loss to `z_losses`; the caller must clear the list.
    """

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        chunk_tokens: int | None,
        keep_row_losses: bool = False,
        *,
        soft_cap: float | None = None,
        z_loss: float | None = None,
    ) -> None:
        super().__init__(d_model, vocab_size)
        self.chunk_tokens = chunk_tokens
        self.keep_row_losses = keep_row_losses
        self.row_losses: list[Tensor] = []
        self.soft_cap = soft_cap
        self.z_losses: list[Tensor] = []
        # a compiled run replaces it with its compiled version
        self.loss_piece = choose_chunk_loss(keep_row_losses, soft_cap, z_loss)

    def forward(self, x_btd: Tensor, targets_bt: Tensor | None = None) -> Tensor:
        """x: [b, t, d]; returns logits [b, t, v], or the float32 sum of the losses of targets [b, t]."""
        if targets_bt is None:
            logits_btv = super().forward(x_btd)
            return logits_btv if self.soft_cap is None else soft_cap_logits(logits_btv, self.soft_cap)
        hidden, targets = x_btd.flatten(0, 1), targets_bt.flatten()
        token_losses: list[Tensor] | None = [] if self.keep_row_losses else None
        z_losses: list[Tensor] = []
        loss = head_loss_sum(hidden, self.weight, targets, self.chunk_tokens, self.loss_piece, token_losses, z_losses)
        if z_losses and torch.is_grad_enabled():
            self.z_losses.append(torch.stack(z_losses).sum())
        if token_losses is None:
            return loss
        losses_bt = torch.cat(token_losses).view(targets_bt.shape).double()
        self.row_losses.append(torch.stack([losses_bt, (targets_bt != IGNORE_INDEX).double()]).sum(dim=2))
        return loss
