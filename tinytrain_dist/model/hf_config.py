"""Translate between our configuration and Hugging Face's config.json, for Llama and Qwen3.

Must not know tensors or ranks. Parameter names need no translation, because ours are the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError

SETTING_OF_HF_KEY = {
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
REQUIRED_HF_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def to_hf_config(config: ModelConfig | TrainingConfig, eos_id: int | None = None) -> dict[str, Any]:
    """Return the config.json with which transformers loads our weights, as a Llama or, with qk_norm, as a Qwen3.

    eos_id: ID of the end-of-text token, if the data has one.
    """
    model_type, architecture = ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("llama", "LlamaForCausalLM")
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
        "model_type": model_type,
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


def check_hf_config(config: TrainingConfig, folder: Path) -> None:
    """Compare the config.json of a Hugging Face folder with the configuration.

    Errors: ConfigError that names every value our model does not support, and every setting that has to change.
    """
    path = folder / "config.json"
    try:
        hf_config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(hf_config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"init_from: {path} cannot be read ({error}); give a Hugging Face model folder") from None
    problems = _unsupported_values(hf_config)
    missing = [key for key in REQUIRED_HF_KEYS if key not in hf_config]
    problems += [f"{key}: is missing in {path}; give the folder of a Llama or Qwen3 model" for key in missing]
    needed = {} if missing else _required_settings(hf_config)
    current = config.resolved()
    for setting, value in needed.items():
        if current[setting] != value:
            problems.append(f"{setting}: is {current[setting]}, but {path} needs {value}; set {setting} = {value}")
    if problems:
        raise ConfigError(problems, f"init_from = {folder}")


def _required_settings(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with which our model computes the same as the model of a config.json."""
    qwen3 = hf_config.get("model_type") == "qwen3"
    # the defaults of transformers for keys that config.json does not have
    needed = {"norm_eps": 1e-6, "tie_embeddings": False, "num_kv_heads": hf_config["num_attention_heads"]}
    needed["head_dim"] = 128 if qwen3 else hf_config["hidden_size"] // hf_config["num_attention_heads"]
    needed |= {setting: hf_config[key] for key, setting in SETTING_OF_HF_KEY.items() if hf_config.get(key) is not None}
    rope = _rope_values(hf_config)
    needed["rope_theta"] = rope.get("rope_theta") or hf_config.get("rope_theta") or 10_000.0
    needed["qk_norm"] = qwen3
    llama3 = rope.get("rope_type", rope.get("type")) == "llama3"
    needed["rope_scaling_factor"] = rope.get("factor") if llama3 else None
    needed["rope_original_context_len"] = rope.get("original_max_position_embeddings") if llama3 else None
    if llama3:
        needed["rope_low_freq_factor"] = rope.get("low_freq_factor")
        needed["rope_high_freq_factor"] = rope.get("high_freq_factor")
    return needed


def _rope_values(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of a config.json, which has them under an older or a newer key."""
    return {**(hf_config.get("rope_scaling") or {}), **(hf_config.get("rope_parameters") or {})}


def _unsupported_values(hf_config: dict[str, Any]) -> list[str]:
    """Return a sentence for each value in a config.json that our model does not support."""
    allowed_values = {
        "model_type": ("llama", "qwen3"),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
        "quantization_config": (None,),
        "partial_rotary_factor": (1, 1.0),
    }
    problems = [
        f"{key}: {hf_config[key]!r} is not supported; this model needs {' or '.join(map(str, allowed))}"
        for key, allowed in allowed_values.items()
        if key in hf_config and hf_config[key] not in allowed
    ]
    rope = _rope_values(hf_config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3", None):
        problems.append(f"rope_type: {rope_type!r} is not supported; this model needs default or llama3")
    return problems
