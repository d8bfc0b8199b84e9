"""Compute causal self-attention with rotary positions, grouped queries and optional query/key norms.

Must not know ranks or training. The suffix of a tensor's name gives its axes: b batch, t position, d model width,
h query head, k key/value head, e head width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.config.rope_scaling import attention_factor, static_rope_theta
from tinytrain_dist.model.document_mask import attention_with_block_mask
from tinytrain_dist.model.layers import Linear, RMSNorm
from tinytrain_dist.model.matmul import is_fake, matmul_dtype, runs_on_cuda
from tinytrain_dist.model.rope_frequencies import llama3_frequencies, yarn_frequencies

if TYPE_CHECKING:
    from tinytrain_dist.model.document_mask import AttentionMask

ATTENTION_BLOCK_ROWS = 128  # query positions per block
BLOCKWISE_MAX_POSITIONS = 512  # longest sequence whose attention is computed in blocks
MAX_SCORES = 1 << 24  # that `largest_score` computes at once


class RotaryEmbedding(nn.Module):
    """Rotary position angles, optionally scaled for longer contexts. No parameters and no buffers.

    dim: head width, even. theta: base of the frequencies. rope_type: "linear", "yarn" or "llama3", each with the
    keyword arguments that it uses (None: "llama3" if both scaling_factor and original_context_len are given, else no
    scaling). attention_factor: factor of cosines and sines. Errors: ValueError for an odd dim.
    Source: Su et al. 2021 (arXiv 2104.09864).
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
        rope_type: str | None = None,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"RotaryEmbedding: dim must be even, got {dim}")
        is_scaled = scaling_factor is not None and original_context_len is not None
        self.dim = dim
        self.theta = theta
        self.rope_type = rope_type or ("llama3" if is_scaled else "default")
        self.scaling_factor = scaling_factor or 1.0
        self.original_context_len = original_context_len or 1
        self.low_freq_factor = low_freq_factor
        self.high_freq_factor = high_freq_factor
        self.beta_fast = beta_fast
        self.beta_slow = beta_slow
        self.attention_factor = attention_factor

    @classmethod
    def of_model(cls, config: ModelConfig) -> RotaryEmbedding:
        """Return the rotary embedding of a model. With `dynamic`, its base is that of a sequence of context_len."""
        return cls(
            config.head_width,
            static_rope_theta(config),
            scaling_factor=config.rope_scaling_factor,
            original_context_len=config.rope_original_context_len,
            low_freq_factor=config.rope_low_freq_factor,
            high_freq_factor=config.rope_high_freq_factor,
            rope_type="default" if config.resolved_rope_type == "dynamic" else config.resolved_rope_type,
            beta_fast=config.rope_beta_fast,
            beta_slow=config.rope_beta_slow,
            attention_factor=attention_factor(config),
        )

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Return the angle in radians per position for each of the dim / 2 pairs: [dim / 2], float32."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.int64, device=device).float() / self.dim
        powers = self.theta**exponent
        frequencies = 1.0 / powers
        factor, original = self.scaling_factor, self.original_context_len
        if self.rope_type == "linear":
            return frequencies / factor
        if self.rope_type == "yarn":
            return yarn_frequencies(powers, self.theta, factor, original, self.beta_fast, self.beta_slow)
        if self.rope_type == "llama3":
            return llama3_frequencies(frequencies, factor, original, self.low_freq_factor, self.high_freq_factor)
        return frequencies

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [t] integers; returns cos and sin, each [t, dim] float32 with two equal halves along dim."""
        angles = positions.float()[:, None] * self.frequencies(positions.device)[None, :]
        angles = torch.cat([angles, angles], dim=-1)
        if self.attention_factor == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor


def apply_rotary_pos_emb(q_bhte: Tensor, k_bkte: Tensor, cos_te: Tensor, sin_te: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries [b, h, t, e] and keys [b, k, t, e] by their positions; cos, sin: [t, e] or [b, 1, t, e].

    Element i is paired with element i + e/2, as in Hugging Face's models. The rotation is computed in float32 and
    returned in the type of the input.
    """

    def rotate(x: Tensor) -> Tensor:
        x_float = x.float()
        first, second = x_float.chunk(2, dim=-1)
        return (x_float * cos_te + torch.cat([-second, first], dim=-1) * sin_te).to(x.dtype)

    return rotate(q_bhte), rotate(k_bkte)


def causal_attention(q_bhte: Tensor, k_bkte: Tensor, v_bkte: Tensor, mask: AttentionMask | None = None) -> Tensor:
    """Return softmax attention of each position to itself and earlier ones: [b, h, t, e], as q.

    Keys and values may have fewer heads, k instead of h; then each of them serves h / k consecutive query heads.
    mask: of `document_mask.attention_mask`, for attention within documents (None: the window is one document).
    """
    if mask is not None and not isinstance(mask, Tensor):
        if is_fake(q_bhte):
            simulated: Tensor = _SimulatedAttention.apply(q_bhte, k_bkte, v_bkte)  # type: ignore[no-untyped-call]
            return simulated
        return attention_with_block_mask(q_bhte, k_bkte, v_bkte, mask)
    t = q_bhte.shape[2]
    dtype = matmul_dtype(q_bhte)
    on_cuda = runs_on_cuda(q_bhte)
    groups = q_bhte.shape[1] // k_bkte.shape[1]
    if groups > 1 and on_cuda and dtype.itemsize == 2 and mask is None:
        if is_fake(q_bhte):
            y: Tensor = _SimulatedAttention.apply(q_bhte, k_bkte, v_bkte)  # type: ignore[no-untyped-call]
            return y
        # measured (H200, 2026-11-27), [8, 32, 2048, 64] with 8 key heads, forward and backward: cuDNN 1.44 ms, with
        # repeated keys and values 1.72 ms
        return F.scaled_dot_product_attention(q_bhte, k_bkte, v_bkte, is_causal=True, enable_gqa=True)
    # Elsewhere keys and values are repeated: the kernels of the CPU, and those for float32 on a GPU, need it.
    k_bhte = k_bkte.repeat_interleave(groups, dim=1) if groups > 1 else k_bkte
    v_bhte = v_bkte.repeat_interleave(groups, dim=1) if groups > 1 else v_bkte
    in_blocks = not on_cuda and dtype == torch.bfloat16 and t <= BLOCKWISE_MAX_POSITIONS
    if not (in_blocks and torch.compiler.is_compiling()):
        y_bhte = F.scaled_dot_product_attention(
            q_bhte.to(dtype), k_bhte.to(dtype), v_bhte.to(dtype), attn_mask=mask, is_causal=mask is None
        )
        return y_bhte if dtype == q_bhte.dtype else y_bhte.to(q_bhte.dtype)
    # Compute attention as compiled matmuls over blocks of rows, because torch's bf16 attention kernel on a CPU reaches
    # only a fifteenth of the rate of a matmul. At 1,024 positions the kernel is nevertheless faster.
    # measured (2-core x86 VM, 2026-11-25), [4, 8, 256, 32], forward and backward: blocks 7.6 ms, kernel 16 ms
    scale = 1 / math.sqrt(q_bhte.shape[3])
    blocks = []
    for start in range(0, t, ATTENTION_BLOCK_ROWS):
        stop = min(t, start + ATTENTION_BLOCK_ROWS)
        scores = q_bhte[:, :, start:stop] @ k_bhte[:, :, :stop].transpose(2, 3)
        mask_of_block = None if mask is None else mask[:, :, start:stop, :stop]
        weights: Tensor = _CausalSoftmax.apply(scores, start, scale, mask_of_block)  # type: ignore[no-untyped-call]
        blocks.append(weights @ v_bhte[:, :, :stop])
    return torch.cat(blocks, dim=2)


class _SimulatedAttention(torch.autograd.Function):
    """Take the memory that a GPU's kernel for grouped queries takes, for tensors that have a shape but no values."""

    @staticmethod
    def forward(ctx: Any, q_bhte: Tensor, k_bkte: Tensor, v_bkte: Tensor) -> Tensor:
        groups = q_bhte.shape[1] // k_bkte.shape[1]
        k_bhte = k_bkte.repeat_interleave(groups, dim=1) if groups > 1 else k_bkte
        v_bhte = v_bkte.repeat_interleave(groups, dim=1) if groups > 1 else v_bkte
        # an operator of attention, because activation_checkpointing = selective keeps the results of those
        y_bhte = F.scaled_dot_product_attention(q_bhte, k_bhte, v_bhte, is_causal=True)
        log_sums = torch.empty(q_bhte.shape[:3], dtype=torch.float32, device=q_bhte.device)
        ctx.save_for_backward(q_bhte, k_bkte, v_bkte, y_bhte, log_sums)
        return y_bhte

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _CausalSoftmax(torch.autograd.Function):
    """Softmax of scaled scores [b, h, rows, keys], for each row over the keys up to its own position.

    start: position of row 0. mask: what is added to the scaled scores (None: nothing). The softmax is computed in
    float32. Only the result, in the type of the scores, is kept for backward; this is a third of what torch would keep.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, start: int, scale: float, mask: Tensor | None) -> Tensor:
        # int32 is faster; measured (2-core x86 VM, 2026-11-25): int64 takes 1 ms longer
        positions = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
        scaled = scores.float() * scale
        if mask is not None:
            scaled = scaled + mask
        is_later = positions > positions[start:, None]  # [rows, keys]
        masked = scaled.masked_fill(is_later, -math.inf)
        weights = masked.softmax(dim=-1).to(scores.dtype)
        ctx.save_for_backward(weights)
        ctx.scale = scale
        return weights

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        (weights,) = ctx.saved_tensors
        # the derivative of a softmax: weights * (grad - sum(grad * weights)), with the second factor multiplied out
        product = grad.float() * weights.float()
        grad_scores = product - weights.float() * product.sum(dim=-1, keepdim=True)
        return (grad_scores * ctx.scale).to(grad.dtype), None, None, None


@torch.no_grad()
def largest_score(q_bhte: Tensor, k_bkte: Tensor, documents_bt: Tensor | None = None) -> Tensor:
    """Return the largest scaled score before the softmax, over all heads and pairs that attend: a float32 scalar.

    q, k: rotated, as in `causal_attention`; documents: [b, t], see TransformerLM. At most MAX_SCORES scores exist at
    once.
    """
    _, h, t, e = q_bhte.shape
    groups = h // k_bkte.shape[1]
    rows = max(1, MAX_SCORES // (h * t))
    positions = torch.arange(t, device=q_bhte.device)
    largest = torch.full((), -math.inf, device=q_bhte.device)
    for index, (q_hte, k_kte) in enumerate(zip(q_bhte.float(), k_bkte.float(), strict=True)):
        k_hte = k_kte.repeat_interleave(groups, dim=0)
        for start in range(0, t, rows):
            stop = min(t, start + rows)
            scores = q_hte[:, start:stop] @ k_hte[:, :stop].transpose(1, 2) / math.sqrt(e)
            does_not_attend = positions[:stop] > positions[start:stop, None]
            if documents_bt is not None:
                does_not_attend |= documents_bt[index, :stop] != documents_bt[index, start:stop, None]
            largest = torch.maximum(largest, scores.masked_fill(does_not_attend, -math.inf).amax())
    return largest


class CausalAttention(nn.Module):
    """`causal_attention` as a module without weights, which can be replaced or observed."""

    def forward(self, q_bhte: Tensor, k_bkte: Tensor, v_bkte: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """q, k, v, mask: see `causal_attention`. Returns [b, h, t, e]."""
        return causal_attention(q_bhte, k_bkte, v_bkte, mask)


class Attention(nn.Module):
    """Causal self-attention with grouped queries and optional query/key norms.

    `core_attention` is the only part in which positions meet. If a process has only some positions of each sequence,
    it is replaced by a module that sees the others.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        query_width = config.num_heads * self.head_width
        key_width = config.kv_heads * self.head_width
        self.q_proj = Linear(config.d_model, query_width)
        self.k_proj = Linear(config.d_model, key_width)
        self.v_proj = Linear(config.d_model, key_width)
        self.o_proj = Linear(query_width, config.d_model)
        self.q_norm: nn.Module = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.core_attention: nn.Module = CausalAttention()

    def forward(self, x_btd: Tensor, cos_te: Tensor, sin_te: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """x: [b, t, d]; cos, sin: [t, e] or [b, 1, t, e] of the positions; mask: see `causal_attention`.

        Returns [b, t, d].
        """
        b, t, _ = x_btd.shape
        q_bhte, k_bkte = self.queries_and_keys(x_btd)
        v_bkte = self.v_proj(x_btd).view(b, t, -1, self.head_width).transpose(1, 2)
        q_bhte, k_bkte = apply_rotary_pos_emb(q_bhte, k_bkte, cos_te, sin_te)
        y_bhte: Tensor = self.core_attention(q_bhte, k_bkte, v_bkte, mask)
        y_btd: Tensor = self.o_proj(y_bhte.transpose(1, 2).reshape(b, t, -1))
        return y_btd

    def queries_and_keys(self, x_btd: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries [b, h, t, e] and keys [b, k, t, e], before they are rotated."""
        b, t, _ = x_btd.shape
        q_bhte = self.q_norm(self.q_proj(x_btd).view(b, t, -1, self.head_width)).transpose(1, 2)
        k_bkte = self.k_norm(self.k_proj(x_btd).view(b, t, -1, self.head_width)).transpose(1, 2)
        return q_bhte, k_bkte
