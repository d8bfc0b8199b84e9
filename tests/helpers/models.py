"""Make small models of every kind, with weights that are all different, so that a mix-up is noticed."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.model.huggingface_config import to_hf_config
from tinytrain_dist.model.transformer import TransformerLM

# The vocabulary is a prime, so that code cannot rely on its divisors.
SMALL = TrainingConfig(vocab_size=67, num_layers=2, num_heads=4, d_model=32, d_ff=48, context_len=64)


KINDS = {
    "plain": SMALL,
    "gqa": dataclasses.replace(SMALL, num_kv_heads=2),
    "tied": dataclasses.replace(SMALL, tie_embeddings=True, norm_eps=1e-3, rope_theta=500_000.0),
    "llama3": dataclasses.replace(
        SMALL, rope_scaling_factor=8.0, rope_original_context_len=32, rope_low_freq_factor=1.0, rope_theta=100.0
    ),
    "linear": dataclasses.replace(SMALL, rope_type="linear", rope_scaling_factor=4.0),
    "dynamic": dataclasses.replace(
        SMALL, rope_type="dynamic", rope_scaling_factor=2.0, rope_original_context_len=16, rope_theta=100.0
    ),
    "yarn": dataclasses.replace(
        SMALL, rope_type="yarn", rope_scaling_factor=4.0, rope_original_context_len=16, rope_theta=100.0
    ),
    "yarn qwen3": dataclasses.replace(
        SMALL,
        qk_norm=True,
        head_dim=16,
        rope_type="yarn",
        rope_scaling_factor=2.0,
        rope_original_context_len=32,
        rope_beta_fast=4.0,
        rope_beta_slow=0.5,
        rope_attention_factor=1.5,
    ),
    "qwen3": dataclasses.replace(SMALL, qk_norm=True, head_dim=16, num_kv_heads=1),
    "qwen3 tied": dataclasses.replace(SMALL, qk_norm=True, tie_embeddings=True),
    "wide heads": dataclasses.replace(SMALL, head_dim=12, d_model=30, num_heads=5),
}


def random_model(config: TrainingConfig) -> TransformerLM:
    """Return a model in which all weights differ, those of norms included, so that a mix-up is noticed."""
    model = TransformerLM(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.1 + (1.0 if param.ndim == 1 else 0.0))
    return model


def some_ids(config: TrainingConfig, batch: int = 3, length: int = 20) -> torch.Tensor:
    assert config.vocab_size is not None
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(12))


def write_folder(folder: Path, model: TransformerLM) -> Path:
    (folder / "config.json").write_text(json.dumps(to_hf_config(model.config)))
    save_file(
        {name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder
