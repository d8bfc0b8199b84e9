"""Define the network: a Llama-style decoder with Hugging Face's parameter names, and its initial weights.

Must not know ranks, meshes or optimizers; parallelism is applied to the finished model elsewhere.

The suffix of a tensor's name gives its axes: b batch, t position, d model width, e head width, v vocabulary.

Every layer casts its float32 weight to the type of its input, and computes in that type. So one place decides the
precision: the output of the embedding. The result is the same if a wrapper has already cast the weights.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.sections import Precision
from tinytrain_dist.config.weight_phases import keeps_source_losses
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.model.attention import Attention, RotaryEmbedding
from tinytrain_dist.model.document_mask import attention_mask, positions_in_documents
from tinytrain_dist.model.layers import Embedding, Linear, LMHead, RMSNorm, SwiGLU

if TYPE_CHECKING:
    from tinytrain_dist.model.document_mask import AttentionMask

INIT_STD = 0.02
# "auto" is still there only if no run has resolved it, as in a training loop of your own
COMPUTE_DTYPES = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


class TransformerBlock(nn.Module):
    """Attention, then feed-forward. Each normalizes its input and adds its output to the residual stream."""

    def __init__(self, config: ModelConfig | TrainingConfig) -> None:
        super().__init__()
        model_config = _model_config_of(config)
        self.self_attn = Attention(model_config)
        self.mlp = SwiGLU(model_config.d_model, model_config.ffn_dim)
        self.input_layernorm = RMSNorm(model_config.d_model, model_config.norm_eps)
        self.post_attention_layernorm = RMSNorm(model_config.d_model, model_config.norm_eps)

    def forward(self, x_btd: Tensor, cos_te: Tensor, sin_te: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """x: [b, t, d]; cos, sin: [t, e] or [b, 1, t, e] of the positions; mask: of attention within documents.

        Returns [b, t, d].
        """
        x_btd = x_btd + self.self_attn(self.input_layernorm(x_btd), cos_te, sin_te, mask)
        y_btd: Tensor = x_btd + self.mlp(self.post_attention_layernorm(x_btd))
        return y_btd


class Decoder(nn.Module):
    """Embedding, blocks and final norm: everything but the output head. dtype: type in which the blocks compute.

    `sequence_part`: 0, or which of several equal parts of each sequence the IDs are. It decides their positions.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocab_size, config.d_model, dtype)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.sequence_part = 0
        self.rotary = RotaryEmbedding.of_model(config)

    def forward(self, ids_bt: Tensor, documents_bt: Tensor | None = None) -> Tensor:
        """ids: [b, t]; documents: [b, t of the whole sequence], see TransformerLM; returns hidden states [b, t, d]."""
        x_btd = self.embed_tokens(ids_bt)
        t = ids_bt.shape[1]
        start = self.sequence_part * t
        mask: AttentionMask | None = None
        if documents_bt is None:
            cos_te, sin_te = self.rotary(torch.arange(start, start + t, device=ids_bt.device))
        else:
            positions_bt = positions_in_documents(documents_bt)[:, start : start + t]
            cos_te, sin_te = self.rotary(torch.arange(documents_bt.shape[1], device=ids_bt.device))
            # [b, 1, t, e]: each window has its own positions, which are the same for all heads
            cos_te, sin_te = cos_te[positions_bt].unsqueeze(1), sin_te[positions_bt].unsqueeze(1)
            mask = attention_mask(documents_bt, x_btd, self.rotary.dim)
        for layer in self.layers:
            x_btd = layer(x_btd, cos_te, sin_te, mask)
        y_btd: Tensor = self.norm(x_btd)
        return y_btd


class TransformerLM(nn.Module):
    """A Llama (with qk_norm: Qwen3) language model, initialized unless it is created on the meta device.

    config: the architecture, or a whole TrainingConfig, which then also gives the defaults of the other arguments.
    seed: seed of the initial weights (default 0).
    precision: type in which the blocks compute: "fp32" (default for a ModelConfig), "bf16" or a torch type. Weights are
        float32.
        "fp8" is "bf16" with the matrix products of the blocks in float8. "auto", the default of a TrainingConfig,
        means "fp32" here.
    loss_chunk_tokens: tokens per chunk of output head and loss (None: see `head_loss_sum`).
    Errors: ConfigError for sizes that do not fit together; ValueError if the configuration has no vocab_size.
    """

    def __init__(
        self,
        config: ModelConfig | TrainingConfig,
        *,
        seed: int | None = None,
        precision: Precision | torch.dtype | None = None,
        loss_chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(config, TrainingConfig):
            seed = config.seed if seed is None else seed
            precision = precision or config.precision
            loss_chunk_tokens = loss_chunk_tokens or config.loss_chunk_tokens
        model_config = _model_config_of(config)
        if model_config.vocab_size is None:
            raise ValueError("TransformerLM: vocab_size is not set; set it, or take it from the data's meta.json")
        problems = model_config.shape_problems() + model_config.rope_problems()
        if precision == "fp8":
            problems += model_config.fp8_problems()
        if problems:  # not with a TrainingConfig, which was checked when it was created
            raise ConfigError(problems, "the model's configuration")
        dtype = precision if isinstance(precision, torch.dtype) else COMPUTE_DTYPES[precision or "fp32"]
        self.config = config  # as passed: a TrainingConfig in a training run
        self.model_config = model_config
        self.seed = seed or 0
        self.model = Decoder(model_config, model_config.vocab_size, dtype)
        keep_row_losses = isinstance(config, TrainingConfig) and keeps_source_losses(config)
        self.lm_head = LMHead(
            model_config.d_model,
            model_config.vocab_size,
            loss_chunk_tokens,
            keep_row_losses,
            soft_cap=model_config.logit_soft_cap,
            z_loss=config.z_loss if isinstance(config, TrainingConfig) else None,
        )
        if precision == "fp8":
            for module in self.model.layers.modules():
                if isinstance(module, Linear):
                    module.fp8 = True
        self.tie_weights()
        if self.lm_head.weight.device.type != "meta":
            self.init_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight if tie_embeddings is set."""
        if self.model_config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter to its initial value."""
        for name, param in self.named_parameters():
            param.copy_(self.initial_weight(name, param.shape))

    def initial_weight(self, name: str, shape: torch.Size) -> Tensor:
        """Return the initial value of one parameter. It depends on the seed and the name, not on ranks or machine.

        Matrices have standard deviation 0.02, or 0.02 / sqrt(2 num_layers) if they write to the residual stream (as
        in GPT-2). Vectors are ones. The numbers come from numpy's Philox generator, because torch's normal numbers
        depend on the device and on the SIMD width of the CPU.
        """
        if len(shape) < 2:
            return torch.ones(shape)
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        writes_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = INIT_STD / math.sqrt(2 * self.model_config.num_layers) if writes_to_residual else INIT_STD
        values = generator.standard_normal(tuple(shape), dtype=np.float32)
        return torch.from_numpy(values * np.float32(std))

    def forward(self, ids_bt: Tensor, targets_bt: Tensor | None = None, documents_bt: Tensor | None = None) -> Tensor:
        """Return logits [b, t, v], or with targets the float32 sum of their losses.

        ids, targets: [b, t]. documents: int [b, t], the document of each token within its window, in ascending order.
        Attention does not cross documents, and positions restart in each. None: a window is one document.
        """
        y: Tensor = self.lm_head(self.model(ids_bt, documents_bt), targets_bt)
        return y

    def flops_per_token(self) -> float:
        """Return the floating-point operations of forward and backward for one token at context_len.

        A matrix costs 6 per weight; the embedding is a look-up and costs nothing. Attention costs
        12 x layers x heads x head width x context_len, halved because it is causal, and not reduced for documents.
        Source: Chowdhery et al. 2022, PaLM appendix B (without the halving).
        """
        config = self.model_config
        matrices = [param for name, param in self.named_parameters() if param.ndim >= 2 and "embed_tokens" not in name]
        matrix_weights = sum(param.numel() for param in matrices)
        if config.tie_embeddings:  # then named_parameters does not list the head
            matrix_weights += self.lm_head.weight.numel()
        attention = 6.0 * config.num_layers * config.num_heads * config.head_width * config.context_len
        return 6.0 * matrix_weights + attention


def _model_config_of(config: ModelConfig | TrainingConfig) -> ModelConfig:
    """Return the architecture in `config`."""
    return config.model if isinstance(config, TrainingConfig) else config
