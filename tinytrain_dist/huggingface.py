"""Owns the translation between TrainingConfig and Hugging Face's config.json, for Llama and Qwen3.

Must not know tensors or ranks. Parameter names need no translation: ours are theirs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinytrain_dist.config import TrainingConfig
from tinytrain_dist.errors import ConfigError

SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}


def huggingface_config(config: TrainingConfig, eos_id: int | None = None) -> dict[str, Any]:
    """The config.json with which transformers loads our weights: a LlamaForCausalLM, or Qwen3 with qk_norm."""
    kind, architecture = ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("llama", "LlamaForCausalLM")
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling_factor is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_context_len,
        }
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.context_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling_factor is not None else None,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def check_fits(config: TrainingConfig, folder: Path) -> None:
    """Hold a Hugging Face folder's config.json against the configuration.

    Errors: ConfigError that names everything our model cannot represent, and every setting that must be another.
    """
    path = folder / "config.json"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"init_from: {path} cannot be read ({error}); give a Hugging Face model folder") from None
    problems = _cannot_represent(theirs)
    wanted, rope = {}, {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
    for key, setting in SETTINGS.items():
        if key in theirs and theirs[key] is not None:
            wanted[setting] = theirs[key]
    wanted.setdefault("head_dim", wanted["d_model"] // wanted["num_heads"])
    wanted["rope_theta"] = rope.get("rope_theta") or theirs.get("rope_theta", 10_000.0)
    wanted["qk_norm"] = theirs.get("model_type") == "qwen3"
    if rope.get("rope_type", rope.get("type", "default")) == "llama3":
        wanted["rope_scaling_factor"] = rope["factor"]
        wanted["rope_original_context_len"] = rope["original_max_position_embeddings"]
        wanted["rope_low_freq_factor"] = rope["low_freq_factor"]
        wanted["rope_high_freq_factor"] = rope["high_freq_factor"]
    ours = {**config.to_dict(), "d_ff": config.ffn_dim, "num_kv_heads": config.kv_heads, "head_dim": config.head_width}
    for setting, value in wanted.items():
        if ours[setting] != value:
            problems.append(f"{setting}: {ours[setting]} here, but {path} has {value}; set {setting} = {value}")
    if problems:
        raise ConfigError(problems, f"init_from = {folder}")


def _cannot_represent(theirs: dict[str, Any]) -> list[str]:
    plain = {
        "model_type": ("llama", "qwen3"),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
        "quantization_config": (None,),
        "partial_rotary_factor": (1, 1.0),
    }
    rope = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
    problems = [
        f"{key}: {theirs[key]!r} is not something this model has; it needs {' or '.join(map(str, allowed))}"
        for key, allowed in plain.items()
        if key in theirs and theirs[key] not in allowed
    ]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3", None):
        problems.append(f"rope_type: {kind!r} is not something this model has; it needs default or llama3")
    return problems
