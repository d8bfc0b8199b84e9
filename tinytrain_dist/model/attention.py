"""Rotary position embeddings and causal self-attention with grouped queries."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.model.layers import Linear, RMSNorm
from tinytrain_dist.model.matmul import matmul_dtype

ATTENTION_BLOCK_ROWS = 128


class RotaryEmbedding(nn.Module):
    """Rotary position angles, optionally stretched as in Llama 3. No parameters and no buffers.

    dim: head width; theta: base of the frequencies. Source: Su et al. 2021 (arXiv 2104.09864).
    """

    def __init__(
        self,
        dim: int,
        theta: float = 10_000.0,
        *,
        scaling_factor: float | None = None,
        original_context_len: int | None = None,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"RotaryEmbedding: dim must be even, got {dim}")
        self.dim, self.theta, self.scaling_factor = dim, theta, scaling_factor
        self.original_context_len = original_context_len
        self.low_freq_factor, self.high_freq_factor = low_freq_factor, high_freq_factor

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Angle per position of each of the dim / 2 pairs: [dim / 2], float32."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.int64, device=device).float() / self.dim
        frequencies = 1.0 / (self.theta**exponent)
        if self.scaling_factor is None or self.original_context_len is None:
            return frequencies
        # Llama 3: long waves are stretched by the factor, short ones kept, those between blended
        turns = self.original_context_len * frequencies / (2 * math.pi)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return (1 - blend) * frequencies / self.scaling_factor + blend * frequencies

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [t] integers; returns cos and sin, each [t, dim] float32, the halves repeated."""
        angles = positions.float()[:, None] * self.frequencies(positions.device)[None, :]
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def apply_rotary_pos_emb(q_bhte: Tensor, k_bkte: Tensor, cos_te: Tensor, sin_te: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions; element i pairs with i + e/2, as Hugging Face orders the halves."""

    def rotate(x: Tensor) -> Tensor:
        wide = x.float()
        first, second = wide.chunk(2, dim=-1)
        return (wide * cos_te + torch.cat([-second, first], dim=-1) * sin_te).to(x.dtype)

    return rotate(q_bhte), rotate(k_bkte)


def causal_attention(q_bhte: Tensor, k_bhte: Tensor, v_bhte: Tensor) -> Tensor:
    """Softmax attention in which a position sees itself and what is before it; all and the result are [b, h, t, e]."""
    t, scale, dtype = q_bhte.shape[2], 1 / math.sqrt(q_bhte.shape[3]), matmul_dtype(q_bhte)
    short = t <= 512 and q_bhte.device.type == "cpu" and dtype == torch.bfloat16
    if not (short and torch.compiler.is_compiling()):
        y_bhte = F.scaled_dot_product_attention(q_bhte.to(dtype), k_bhte.to(dtype), v_bhte.to(dtype), is_causal=True)
        return y_bhte if dtype == q_bhte.dtype else y_bhte.to(q_bhte.dtype)
    # torch's CPU kernel reaches a fifteenth of the matmul rate in bf16; compiled, products of short blocks took
    # 7.6 ms instead of 16 at 4 x 8 heads x 256 x 32, forward and backward (at 1,024 positions the kernel is ahead)
    pieces = []
    for start in range(0, t, ATTENTION_BLOCK_ROWS):
        stop = min(t, start + ATTENTION_BLOCK_ROWS)
        scores = q_bhte[:, :, start:stop] @ k_bhte[:, :, :stop].transpose(2, 3)
        pieces.append(_CausalSoftmax.apply(scores, start, scale) @ v_bhte[:, :, :stop])  # type: ignore[no-untyped-call]
    return torch.cat(pieces, dim=2)


class _CausalSoftmax(torch.autograd.Function):
    """Softmax of scaled scores [b, h, rows, keys] over the keys up to each row's own; row 0 is position `start`.

    Computed in float32, and kept for backward in the type of the scores alone, a third of what torch would keep.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, start: int, scale: float) -> Tensor:
        positions = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)  # int64 takes 1 ms more
        masked = (scores.float() * scale).masked_fill(positions > positions[start:, None], -math.inf)
        weights = masked.softmax(dim=-1).to(scores.dtype)
        ctx.save_for_backward(weights)
        ctx.scale = scale
        return weights

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weights,) = grad_outputs, ctx.saved_tensors
        product = grad.float() * weights.float()
        wide = product - weights.float() * product.sum(dim=-1, keepdim=True)
        return (wide * ctx.scale).to(grad.dtype), None, None


class Attention(nn.Module):
    """Causal self-attention with grouped queries and optional query/key norms."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        query_width, key_width = config.num_heads * self.head_width, config.kv_heads * self.head_width
        self.groups = config.num_heads // config.kv_heads
        self.q_proj = Linear(config.d_model, query_width)
        self.k_proj = Linear(config.d_model, key_width)
        self.v_proj = Linear(config.d_model, key_width)
        self.o_proj = Linear(query_width, config.d_model)
        self.q_norm: nn.Module = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_btd: Tensor, cos_te: Tensor, sin_te: Tensor) -> Tensor:
        """x: [b, t, d]; returns [b, t, d]."""
        b, t, _ = x_btd.shape
        q_bhte = self.q_norm(self.q_proj(x_btd).view(b, t, -1, self.head_width)).transpose(1, 2)
        k_bkte = self.k_norm(self.k_proj(x_btd).view(b, t, -1, self.head_width)).transpose(1, 2)
        v_bkte = self.v_proj(x_btd).view(b, t, -1, self.head_width).transpose(1, 2)
        q_bhte, k_bkte = apply_rotary_pos_emb(q_bhte, k_bkte, cos_te, sin_te)
        if self.groups > 1:
            # repeated by hand: scaled_dot_product_attention(enable_gqa=True) has no fused kernel on CPU
            k_bkte = k_bkte.repeat_interleave(self.groups, dim=1)
            v_bkte = v_bkte.repeat_interleave(self.groups, dim=1)
        y_bhte = causal_attention(q_bhte, k_bkte, v_bkte)
        y_btd: Tensor = self.o_proj(y_bhte.transpose(1, 2).reshape(b, t, -1))
        return y_btd
