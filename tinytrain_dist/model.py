"""Owns the network: a Llama-style decoder whose parameter names are Hugging Face's, and its initial weights.

Must not know ranks, meshes or optimizers; parallelism is applied to the finished model elsewhere.

Shapes in names: b batch, t position, d model width, h head, k key/value head, e head width, v vocabulary.
Every layer computes in the type of its input and casts its float32 weight to it, so precision is decided in one place
(the embedding's output), and the same numbers come out whether a wrapper has cast the weights before or not.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytrain_dist.config import TrainingConfig
from tinytrain_dist.losses import head_loss_sum, loss_piece
from tinytrain_dist.products import linear, product_type

INIT_STD = 0.02
ATTENTION_ROWS = 128


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the mean is taken in float32. Source: Zhang & Sennrich 2019."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim] of any float type; returns the same shape and type."""
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class Linear(nn.Linear):
    """A matrix without bias, used in the type of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features] in x's type."""
        return linear(x, self.weight)


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
    t, scale, dtype = q_bhte.shape[2], 1 / math.sqrt(q_bhte.shape[3]), product_type(q_bhte)
    short = t <= 512 and q_bhte.device.type == "cpu" and dtype == torch.bfloat16
    if not (short and torch.compiler.is_compiling()):
        y_bhte = F.scaled_dot_product_attention(q_bhte.to(dtype), k_bhte.to(dtype), v_bhte.to(dtype), is_causal=True)
        return y_bhte if dtype == q_bhte.dtype else y_bhte.to(q_bhte.dtype)
    # torch's CPU kernel reaches a fifteenth of the matmul rate in bf16; compiled, products of short blocks took
    # 7.6 ms instead of 16 at 4 x 8 heads x 256 x 32, forward and backward (at 1,024 positions the kernel is ahead)
    pieces = []
    for start in range(0, t, ATTENTION_ROWS):
        stop = min(t, start + ATTENTION_ROWS)
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


class TransformerBlock(nn.Module):
    """Attention, then feed-forward; each normed before and added to the residual stream."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.d_model, config.ffn_dim)
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x_btd: Tensor, cos_te: Tensor, sin_te: Tensor) -> Tensor:
        """x: [b, t, d]; returns [b, t, d]."""
        x_btd = x_btd + self.self_attn(self.input_layernorm(x_btd), cos_te, sin_te)
        y_btd: Tensor = x_btd + self.mlp(self.post_attention_layernorm(x_btd))
        return y_btd


class Embedding(nn.Embedding):
    """Token ids to vectors of the compute type."""

    def __init__(self, vocab_size: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__(vocab_size, dim)
        self.compute_dtype = dtype

    def forward(self, ids_bt: Tensor) -> Tensor:
        """ids: [b, t]; returns [b, t, d]. The gradient is summed in the weight's own type, float32."""
        return F.embedding(ids_bt, self.weight).to(self.compute_dtype)


class Head(Linear):
    """The output matrix; with targets it returns the summed loss, so that the logits may stay in pieces."""

    def __init__(self, d_model: int, vocab_size: int, chunk_tokens: int | None) -> None:
        super().__init__(d_model, vocab_size)
        self.chunk_tokens, self.loss_piece = chunk_tokens, loss_piece

    def forward(self, x_btd: Tensor, targets_bt: Tensor | None = None) -> Tensor:
        """x: [b, t, d]; returns logits [b, t, v], or the float32 sum of the losses of targets [b, t]."""
        if targets_bt is None:
            return super().forward(x_btd)
        hidden, targets = x_btd.flatten(0, 1), targets_bt.flatten()
        return head_loss_sum(hidden, self.weight, targets, self.chunk_tokens, self.loss_piece)


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: everything below the head."""

    def __init__(self, config: TrainingConfig, vocab_size: int) -> None:
        super().__init__()
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.embed_tokens = Embedding(vocab_size, config.d_model, dtype)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.rotary = RotaryEmbedding(
            config.head_width,
            config.rope_theta,
            scaling_factor=config.rope_scaling_factor,
            original_context_len=config.rope_original_context_len,
            low_freq_factor=config.rope_low_freq_factor,
            high_freq_factor=config.rope_high_freq_factor,
        )

    def forward(self, ids_bt: Tensor) -> Tensor:
        """ids: [b, t]; returns hidden states [b, t, d]."""
        x_btd = self.embed_tokens(ids_bt)
        cos_te, sin_te = self.rotary(torch.arange(ids_bt.shape[1], device=ids_bt.device))
        for layer in self.layers:
            x_btd = layer(x_btd, cos_te, sin_te)
        y_btd: Tensor = self.norm(x_btd)
        return y_btd


class TransformerLM(nn.Module):
    """A Llama (with qk_norm: Qwen3) language model of the configuration's sizes; weights set by `init_weights`.

    Errors: ValueError if the configuration has no vocab_size.
    """

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("TransformerLM: vocab_size is not set; set it, or take it from the data's meta.json")
        self.config = config
        self.model = Decoder(config, config.vocab_size)
        self.lm_head = Head(config.d_model, config.vocab_size, config.loss_chunk_tokens)
        self.tie_weights()
        if self.lm_head.weight.device.type != "meta":
            self.init_weights()

    def tie_weights(self) -> None:
        """Let the head share the embedding's weight where the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter to its initial value."""
        for name, param in self.named_parameters():
            param.copy_(self.initial_weight(name, param.shape))

    def initial_weight(self, name: str, shape: torch.Size) -> Tensor:
        """The initial value of one parameter: a function of (seed, name) alone, the same on every machine.

        Drawn with numpy's Philox, whose normal numbers do not depend on vector width or device as torch's do. Matrices
        have standard deviation 0.02, those that write to the residual stream 0.02 / sqrt(2 num_layers) (GPT-2).
        """
        if len(shape) < 2:
            return torch.ones(shape)
        digest = hashlib.blake2b(f"{self.config.seed}/{name}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = INIT_STD / math.sqrt(2 * self.config.num_layers) if residual else INIT_STD
        values = generator.standard_normal(tuple(shape), dtype=np.float32)
        return torch.from_numpy(values * np.float32(std))

    def forward(self, ids_bt: Tensor, targets_bt: Tensor | None = None) -> Tensor:
        """ids: [b, t]; returns logits [b, t, v], or with targets [b, t] the float32 sum of their losses."""
        y: Tensor = self.lm_head(self.model(ids_bt), targets_bt)
        return y

    def flops_per_token(self) -> float:
        """Floating-point operations of forward and backward for one token at context_len.

        6 per matrix weight (the embedding's look-up is none) plus 12 x layers x heads x head width x context_len / 2
        for causal attention. Source: Chowdhery et al. 2022, PaLM appendix B, with the causal half.
        """
        c = self.config
        matrices = sum(p.numel() for n, p in self.named_parameters() if p.ndim >= 2 and "embed_tokens" not in n)
        if c.tie_embeddings:
            matrices += self.lm_head.weight.numel()
        return 6.0 * matrices + 6.0 * c.num_layers * c.num_heads * c.head_width * c.context_len
