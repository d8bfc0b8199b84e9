"""Translate between our configuration and Hugging Face's config.json, for Llama and Qwen3.

Must not know tensors or ranks. Parameter names need no translation, because ours are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.type_conversion import to_toml_value
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.model.huggingface_rope import needed_rope_settings, read_hf_rope, rope_differences, to_hf_rope
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
# max_position_embeddings in transformers, for a config.json without it
DEFAULT_POSITIONS = {"llama": 2048, "qwen3": 32_768}


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
    rope = to_hf_rope(config)
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
        "rope_theta": rope["rope_theta"],
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
        "rope_parameters": rope,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": "float32",
        "torch_dtype": "float32",
        **cap,
    }


def check_hf_config(config: TrainingConfig, folder: Path) -> None:
    """Compare the config.json of a Hugging Face folder with the configuration.

    A longer context_len than that of the folder may come with a new scaling of rotary positions.
    Errors: ConfigError that names every value our model does not support, and every setting that has to change.
    """
    model, problems = _read_hf_config(folder, "init_from", "the configuration")
    current = config.resolved()
    different = {name: (current[name], value) for name, value in model.sizes.items() if current[name] != value}
    if model.sizes and model.rope is not None:
        different |= rope_differences(config, model.rope, model.longest, model.sizes["head_dim"])
    for setting, (value, needed) in different.items():
        remedy = "leave it out" if needed is None else f"set {setting} = {to_toml_value(needed)}"
        if setting == "rope_type" and value != "default":
            remedy += (
                f" (a new scaling extends the context: it is possible from context_len {model.longest + 1}, because "
                f"max_position_embeddings is {model.longest})"
            )
        problems.append(f"{setting}: is {value}, but {folder / 'config.json'} needs {needed}; {remedy}")
    if problems:
        raise ConfigError(problems, f"init_from = {folder}")


def settings_of_hf_folder(folder: Path, argument: str = "folder") -> dict[str, Any]:
    """Return the settings of the model in a Hugging Face folder, and the longest context_len that it was made for.

    argument: what the user has named the folder with. Errors: ConfigError that names every value our model does not
    support.
    """
    model, problems = _read_hf_config(folder, argument, str(folder))
    if problems or model.rope is None:
        raise ConfigError(problems, str(folder))
    longest = model.longest
    rope = needed_rope_settings(model.rope, longest, model.sizes["head_dim"], longest)
    if rope["rope_type"] == "default":
        del rope["rope_type"]
    return {**model.sizes, **rope, **({"context_len": longest} if model.has_longest else {})}


@dataclass(frozen=True)
class HfModel:
    """What a config.json says. sizes: settings of the model, except rotary ones; rope: of `read_hf_rope`.

    sizes is empty, and rope is None, if they cannot be used. longest: max_position_embeddings, or its default in
    transformers (then has_longest is false).
    """

    sizes: dict[str, Any]
    rope: dict[str, Any] | None
    longest: int
    has_longest: bool


def _read_hf_config(folder: Path, argument: str, source: str) -> tuple[HfModel, list[str]]:
    """Return the model of a Hugging Face folder, and what our model does not support, as sentences.

    Errors: ConfigError about `argument` and with `source`, if config.json cannot be read.
    """
    path = folder / "config.json"
    try:
        hf_config = read_json(path)
        if not isinstance(hf_config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{argument}: {path} cannot be read ({error}); give the folder of a Hugging Face model, or a run "
            "or checkpoint of this program",
            source,
        ) from None
    hf_config, cap = _without_cap(hf_config)
    rope, rope_problems = read_hf_rope(hf_config)
    problems = _unsupported_values(hf_config) + rope_problems
    missing = [
        f"{key}: is missing in {path}; give the folder of a Llama or Qwen3 model"
        if hf_config.get(key) is None
        else f"{key}: {hf_config[key]!r} in {path} is not a positive whole number; give the folder of a Llama or Qwen3 "
        "model"
        for key in REQUIRED_HF_KEYS
        if type(hf_config.get(key)) is not int or hf_config[key] < 1
    ]
    sizes = {} if missing else {**_required_settings(hf_config), "logit_soft_cap": cap}
    longest: Any = hf_config.get("max_position_embeddings")
    has_longest = type(longest) is int and longest > 0
    if not has_longest:
        longest = DEFAULT_POSITIONS.get(str(hf_config.get("model_type")), 2048)
    return HfModel(sizes, None if rope_problems else rope, longest, has_longest), problems + missing


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


def _required_settings(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings, except rotary ones, with which our model computes the same as that of a config.json."""
    qwen3 = hf_config.get("model_type") == "qwen3"
    # the defaults of transformers for keys that config.json does not have
    needed = {"norm_eps": 1e-6, "tie_embeddings": False, "num_kv_heads": hf_config["num_attention_heads"]}
    if qwen3 and "num_key_value_heads" not in hf_config:
        needed["num_kv_heads"] = 32
    needed["head_dim"] = 128 if qwen3 else hf_config["hidden_size"] // hf_config["num_attention_heads"]
    needed |= {setting: hf_config[key] for key, setting in SETTING_OF_HF_KEY.items() if hf_config.get(key) is not None}
    needed["qk_norm"] = qwen3
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
