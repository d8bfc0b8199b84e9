"""Translate between our configuration and Hugging Face's config.json, for Llama and Qwen3.

Must not know tensors or ranks. Parameter names need no translation: ours are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.utils.json_files import describe_json_type, is_whole_number, read_json_dict

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
    """Return the config.json with which transformers loads our weights: a LlamaForCausalLM, with qk_norm a Qwen3.

    eos_id: id of the end-of-text token, if the data has one.
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
    """Compare a Hugging Face folder's config.json with the configuration.

    Errors: ConfigError that names everything our model cannot represent, and every setting that has to change.
    """
    path = folder / "config.json"
    try:
        theirs = read_json_dict(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"init_from: {path} cannot be read ({error}); give a Hugging Face model folder") from None
    if problems := _wrong_types(theirs, path):
        raise ConfigError(problems, f"init_from = {folder}")
    problems = _unsupported_keys(theirs)
    problems += [
        f"{key}: is missing in {path}; give the folder of a Llama or Qwen3"
        for key in REQUIRED_HF_KEYS
        if key not in theirs
    ]
    wanted = {} if any(key not in theirs for key in REQUIRED_HF_KEYS) else _required_settings(theirs)
    ours = config.resolved()
    for setting, value in wanted.items():
        if ours[setting] != value:
            problems.append(f"{setting}: {ours[setting]} here, but {path} has {value}; set {setting} = {value}")
    if problems:
        raise ConfigError(problems, f"init_from = {folder}")


def _wrong_types(theirs: dict[str, Any], path: Path) -> list[str]:
    """Return a sentence for each key whose value has another type than in every config.json."""
    problems = [
        f"{key}: is {theirs[key]!r} in {path}, but must be a whole number of at least 1; give an undamaged folder"
        for key in REQUIRED_HF_KEYS
        if key in theirs and not is_whole_number(theirs[key], 1)
    ]
    problems += [
        f"{key}: is {describe_json_type(theirs[key])} in {path}, but must be an object; give an undamaged folder"
        for key in ("rope_scaling", "rope_parameters")
        if not isinstance(theirs.get(key) or {}, dict)
    ]
    return problems


def _required_settings(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with which our model computes what the model of their config.json computes."""
    qwen3 = theirs.get("model_type") == "qwen3"
    # what transformers assumes for keys that config.json does not have
    wanted = {"norm_eps": 1e-6, "tie_embeddings": False, "num_kv_heads": theirs["num_attention_heads"]}
    wanted["head_dim"] = 128 if qwen3 else theirs["hidden_size"] // theirs["num_attention_heads"]
    wanted |= {setting: theirs[key] for key, setting in SETTING_OF_HF_KEY.items() if theirs.get(key) is not None}
    rope = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
    wanted["rope_theta"] = rope.get("rope_theta") or theirs.get("rope_theta") or 10_000.0
    wanted["qk_norm"] = qwen3
    llama3 = rope.get("rope_type", rope.get("type")) == "llama3"
    wanted["rope_scaling_factor"] = rope.get("factor") if llama3 else None
    wanted["rope_original_context_len"] = rope.get("original_max_position_embeddings") if llama3 else None
    if llama3:
        wanted["rope_low_freq_factor"] = rope.get("low_freq_factor")
        wanted["rope_high_freq_factor"] = rope.get("high_freq_factor")
    return wanted


def _unsupported_keys(theirs: dict[str, Any]) -> list[str]:
    """Return a sentence for each key of their config.json with a value that our model has no code for."""
    allowed_values = {
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
        f"{key}: {theirs[key]!r} is not supported; this model needs {' or '.join(map(str, allowed))}"
        for key, allowed in allowed_values.items()
        if key in theirs and theirs[key] not in allowed
    ]
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3", None):
        problems.append(f"rope_type: {rope_type!r} is not supported; this model needs default or llama3")
    return problems
