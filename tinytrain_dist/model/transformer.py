"""A Llama-style decoder with the parameter names of Hugging Face, and its initial weights.

Must not know ranks, meshes or optimizers: parallelism is applied to the finished model elsewhere.

Shapes in names: b batch, t position, d model width, h head, k key/value head, e head width, v vocabulary.

Every layer computes in the type of its input and casts its float32 weight to it. So precision is decided in one place,
the embedding's output. The same numbers come out whether a wrapper has cast the weights before or not.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.model.attention import Attention, RotaryEmbedding
from tinytrain_dist.model.layers import Embedding, LMHead, RMSNorm, SwiGLU

INIT_STD = 0.02


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
        self.lm_head = LMHead(config.d_model, config.vocab_size, config.loss_chunk_tokens)
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
        """Return the initial value of one parameter: a function of (seed, name) alone, the same on every machine.

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


def approximate_parameter_count(config: TrainingConfig) -> int:
    """Weights of the embedding (unless shared), the head and the matrices of the blocks: all but some thousands."""
    embedding = (config.vocab_size or 0) * config.d_model * (1 if config.tie_embeddings else 2)
    attention = 2 * config.d_model * config.head_width * (config.num_heads + config.kv_heads)
    return embedding + config.num_layers * (attention + 3 * config.d_model * config.ffn_dim)
