"""Describe the architecture of a model: `ModelConfig`, the value that a model is built from.

Must not know torch, training settings, files or ranks. A training run takes it from `TrainingConfig.model`. A program
with its own training loop creates a ModelConfig directly. Fields have the same names as the settings of TrainingConfig.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and variants of a Llama-style decoder (with `qk_norm`: Qwen3); a frozen dataclass.

    If num_kv_heads, head_dim or d_ff is None, it follows from other sizes: use the properties `kv_heads`, `head_width`
    and `ffn_dim`. Sizes are in elements, context lengths in tokens.
    """

    vocab_size: int | None = None
    num_layers: int = 4
    num_heads: int = 16
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_model: int = 512
    d_ff: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling_factor: float | None = None
    rope_original_context_len: int | None = None
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    tie_embeddings: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-5
    context_len: int = 256

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads: num_kv_heads, or num_heads if that is None."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head: head_dim, or d_model / num_heads if that is None."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer: d_ff, or 8/3 d_model rounded up to a multiple of 64 if that is None."""
        return self.d_ff or 64 * math.ceil(8 * self.d_model / (3 * 64))

    @property
    def approximate_parameter_count(self) -> int:
        """Number of parameters, not counting the few thousand of the norms.

        It counts the embedding, the output head (unless it shares the embedding's weight) and the matrices of the
        blocks.
        """
        embedding = (self.vocab_size or 0) * self.d_model
        embedding_and_head = embedding * (1 if self.tie_embeddings else 2)
        attention = 2 * self.d_model * self.head_width * (self.num_heads + self.kv_heads)
        feed_forward = 3 * self.d_model * self.ffn_dim
        return embedding_and_head + self.num_layers * (attention + feed_forward)

    def shape_problems(self) -> list[str]:
        """Return a sentence for each pair of sizes that do not fit together. All sizes must be at least 1."""
        problems = []
        if self.head_dim is None and self.d_model % self.num_heads:
            problems.append(
                f"d_model: {self.d_model} is not a multiple of num_heads {self.num_heads}; change one, or set head_dim"
            )
        elif self.head_width % 2:
            problems.append(
                f"d_model: head width {self.head_width} is odd, but rotary embeddings need an even one; "
                "change d_model or num_heads, or set head_dim to an even number"
            )
        if self.num_heads % self.kv_heads:
            problems.append(
                f"num_kv_heads: {self.kv_heads} does not divide num_heads {self.num_heads}; change one of them"
            )
        return problems

    def fp8_problems(self) -> list[str]:
        """Return a sentence for each size of a block's matrices that float8 units cannot multiply."""
        heads, key_heads = self.num_heads * self.head_width, self.kv_heads * self.head_width
        sizes = {"d_model": self.d_model, "d_ff": self.ffn_dim, "num_heads": heads, "num_kv_heads": key_heads}
        return [
            f"{name}: precision = fp8 needs matrices whose sizes are multiples of 16, but this makes one of {size}; "
            "change it, or set precision = bf16"
            for name, size in sizes.items()
            if size % 16
        ]

    def rope_problems(self) -> list[str]:
        """Return a sentence for each setting of the rotary embedding that contradicts another or has no effect."""
        problems = []
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if (self.rope_scaling_factor is None) != (self.rope_original_context_len is None):
            problems.append("rope_scaling_factor: needs rope_original_context_len, and vice versa; set both")
        if self.rope_scaling_factor is None and (low, high) != (1.0, 4.0):
            problems.append("rope_low_freq_factor: has no effect without rope_scaling_factor; leave it out")
        if low >= high:
            problems.append(f"rope_low_freq_factor: {low} must be below rope_high_freq_factor {high}; change one")
        return problems


MODEL_SETTINGS = tuple(field.name for field in dataclasses.fields(ModelConfig))
