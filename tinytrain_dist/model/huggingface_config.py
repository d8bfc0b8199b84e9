"""Translate between our configuration and Hugging Face's config.json, for Llama and Qwen3.

Must not know tensors or ranks. Parameter names need no translation, because ours are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.type_conversion import to_toml_value
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.utils.json_files import read_json

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

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # by model_type
# Ends a model_type with logit_soft_cap. Transformers does not know such a type, and so refuses to load it, instead of
# ignoring the cap. The key of the cap is Gemma 2's.
SOFT_CAPPED, SOFT_CAP_KEY = "_soft_capped", "final_logit_softcapping"
# Keys that change what is computed or trained, with the values that our model supports. A key may also be left out or
# null.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(ARCHITECTURES),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, 1.0),
    "auto_map": (None,),  # the model is code in the folder
}
# Keys of models related to Llama that scale, bound or replace something which our model does not.
KEYS_OF_OTHER_MODELS = (
    "embedding_multiplier residual_multiplier attention_multiplier logits_scaling logit_scale final_logit_softcapping "
    "attn_logit_softcapping query_pre_attn_scalar scale_emb scale_depth dim_model_base clip_qkv qk_layernorm "
    "use_qk_norm rope_interleaved num_experts num_local_experts n_routed_experts"
).split()
LLAMA3_ROPE_KEYS = {
    "factor": "rope_scaling_factor",
    "original_max_position_embeddings": "rope_original_context_len",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
}
ROPE_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor", *LLAMA3_ROPE_KEYS)


def to_hf_config(
    config: ModelConfig | TrainingConfig, eos_id: int | None = None, bos_id: int | None = None
) -> dict[str, Any]:
    """Return the config.json with which transformers loads our weights, as a Llama or, with qk_norm, as a Qwen3.

    With logit_soft_cap, transformers has no such model, and refuses this one; see SOFT_CAPPED.
    eos_id: ID of the end-of-text token, if the data has one. bos_id: ID of the token that begins every document, if
    the data has one.
    """
    model_type = "qwen3" if config.qk_norm else "llama"
    architecture = ARCHITECTURES[model_type]
    cap: dict[str, Any] = {}
    if config.logit_soft_cap is not None:
        model_type, architecture = model_type + SOFT_CAPPED, "SoftCapped" + architecture
        cap = {SOFT_CAP_KEY: config.logit_soft_cap}
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
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": "float32",
        "torch_dtype": "float32",
        **cap,
    }


def check_hf_config(config: TrainingConfig, folder: Path) -> None:
    """Compare the config.json of a Hugging Face folder with the configuration.

    Errors: ConfigError that names every value our model does not support, and every setting that has to change.
    """
    needed, problems = _read_hf_config(folder)
    current = config.resolved()
    for setting, value in needed.items():
        if current[setting] != value:
            remedy = "leave it out" if value is None else f"set {setting} = {to_toml_value(value)}"
            problems.append(f"{setting}: is {current[setting]}, but {folder / 'config.json'} needs {value}; {remedy}")
    if problems:
        raise ConfigError(problems, f"init_from = {folder}")


def settings_of_hf_folder(folder: Path) -> dict[str, Any]:
    """Return the settings of the model in a Hugging Face folder, and the longest context_len that it was made for.

    Errors: ConfigError that names every value our model does not support.
    """
    needed, problems = _read_hf_config(folder)
    if problems:
        raise ConfigError(problems, str(folder))
    longest = read_json(folder / "config.json").get("max_position_embeddings")
    return {**needed, **({"context_len": longest} if type(longest) is int and longest > 0 else {})}


def _read_hf_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that a Hugging Face folder needs, and what our model does not support, as sentences."""
    path = folder / "config.json"
    try:
        hf_config = read_json(path)
        if not isinstance(hf_config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"init_from: {path} cannot be read ({error}); give a Hugging Face model folder") from None
    hf_config, cap = _without_cap(hf_config)
    rope, problems = _rope_settings(hf_config)
    problems = _unsupported_values(hf_config) + problems
    missing = [
        f"{key}: is missing in {path}; give the folder of a Llama or Qwen3 model"
        if hf_config.get(key) is None
        else f"{key}: {hf_config[key]!r} in {path} is not a positive whole number; give the folder of a Llama or Qwen3 "
        "model"
        for key in REQUIRED_HF_KEYS
        if type(hf_config.get(key)) is not int or hf_config[key] < 1
    ]
    needed = {} if missing else {**_required_settings(hf_config, rope), "logit_soft_cap": cap}
    return needed, problems + missing


def _without_cap(hf_config: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Return the config.json of the same model without logit_soft_cap, and its value if it has one."""
    model_type = str(hf_config.get("model_type"))
    cap = hf_config.get(SOFT_CAP_KEY)
    if not model_type.endswith(SOFT_CAPPED) or type(cap) not in (int, float):
        return hf_config, None
    plain_type = model_type.removesuffix(SOFT_CAPPED)
    plain = {"model_type": plain_type, "architectures": [ARCHITECTURES.get(plain_type)], SOFT_CAP_KEY: None}
    return {**hf_config, **plain}, cap


def soft_cap_of(hf_config: dict[str, Any]) -> float | None:
    """Return the logit_soft_cap of a checkpoint with this config.json; None if it has none."""
    return _without_cap(hf_config)[1]


def _required_settings(hf_config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with which our model computes the same as the model of a config.json."""
    qwen3 = hf_config.get("model_type") == "qwen3"
    # the defaults of transformers for keys that config.json does not have
    needed = {"norm_eps": 1e-6, "tie_embeddings": False, "num_kv_heads": hf_config["num_attention_heads"]}
    if qwen3 and "num_key_value_heads" not in hf_config:
        needed["num_kv_heads"] = 32
    needed["head_dim"] = 128 if qwen3 else hf_config["hidden_size"] // hf_config["num_attention_heads"]
    needed |= {setting: hf_config[key] for key, setting in SETTING_OF_HF_KEY.items() if hf_config.get(key) is not None}
    needed["rope_theta"] = rope.get("rope_theta") or hf_config.get("rope_theta") or 10_000.0
    needed["qk_norm"] = qwen3
    if rope.get("rope_type") == "llama3":
        needed |= {setting: rope[key] for key, setting in LLAMA3_ROPE_KEYS.items() if rope.get(key) is not None}
    else:
        needed |= {"rope_scaling_factor": None, "rope_original_context_len": None}
    return needed


def _unsupported_values(hf_config: dict[str, Any]) -> list[str]:
    """Return a sentence for each value in a config.json that our model does not support."""
    problems = [
        f"{key}: {hf_config[key]!r} is not supported; this model needs {' or '.join(map(str, allowed))}"
        for key, allowed in SUPPORTED_VALUES.items()
        if hf_config.get(key) is not None and hf_config[key] not in allowed
    ]
    problems += [
        f"{key}: {hf_config[key]!r} is not supported; this model has nothing like it"
        for key in KEYS_OF_OTHER_MODELS
        if hf_config.get(key) not in (None, False, 0, 1)
    ]
    architecture = ARCHITECTURES.get(str(hf_config.get("model_type")))
    if hf_config.get("architectures") and architecture and hf_config["architectures"] != [architecture]:
        problems.append(
            f"architectures: {hf_config['architectures']!r} is not supported; this model needs {architecture}"
        )
    types = hf_config.get("layer_types")
    if types and (not isinstance(types, list) or set(map(str, types)) != {"full_attention"}):
        problems.append(f"layer_types: {types!r} is not supported; this model needs full_attention in every layer")
    # Qwen3 ignores the window unless use_sliding_window is set; a Llama has no such switch.
    uses_window = hf_config.get("use_sliding_window", False if hf_config.get("model_type") == "qwen3" else None)
    if hf_config.get("sliding_window") is not None and uses_window is None:
        problems.append(f"sliding_window: {hf_config['sliding_window']!r} is not supported; this model needs null")
    return problems


def _rope_settings(hf_config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the rotary settings of a config.json as one dict, and a sentence for each that cannot be used.

    They may be in `rope_parameters` (transformers 5), in `rope_scaling` (before), or in both.
    """
    rope: dict[str, Any] = {}
    origin: dict[str, str] = {}
    problems: list[str] = []
    if hf_config.get("rope_theta") is not None:
        rope["rope_theta"], origin["rope_theta"] = hf_config["rope_theta"], "config.json itself"
    for place in ("rope_scaling", "rope_parameters"):
        table = hf_config.get(place) or {}
        if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
            problems.append(f"{place}: {table!r} is not supported; this model needs one set of values for all layers")
            continue
        for key, value in table.items():
            name = "rope_type" if key == "type" else key
            if value is None:
                continue
            if rope.get(name, value) != value:
                problems.append(
                    f"{name}: is {rope[name]!r} in {origin[name]}, but {value!r} in {place}; correct config.json, so "
                    "that both say what the weights were trained with"
                )
            rope[name], origin[name] = value, place
    return rope, problems + _unsupported_rope(rope)


def _unsupported_rope(rope: dict[str, Any]) -> list[str]:
    """Return a sentence for each rotary setting that our model does not support."""
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "llama3"):
        return [f"rope_type: {rope_type!r} is not supported; this model needs default or llama3"]
    problems = [
        f"{key}: {rope[key]!r} among the rotary settings is not supported; this model has nothing like it"
        for key in rope
        if key not in ROPE_KEYS
    ]
    if rope.get("partial_rotary_factor", 1) != 1:
        problems.append(
            f"partial_rotary_factor: {rope['partial_rotary_factor']!r} is not supported; this model needs 1 or 1.0"
        )
    if rope_type == "llama3":
        problems += [
            f"{key}: is missing among the rotary settings, and rope_type llama3 needs it; correct config.json"
            for key in LLAMA3_ROPE_KEYS
            if key not in rope
        ]
    elif rope.get("factor", 1) != 1:
        problems.append(
            f"factor: {rope['factor']!r} has no effect with rope_type {rope_type}; correct config.json, so that it "
            "says what the weights were trained with"
        )
    return problems
