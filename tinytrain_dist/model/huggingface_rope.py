"""Translate between the settings of the rotary embedding and those in Hugging Face's config.json.

They are in `rope_parameters` (transformers 5), in `rope_scaling` (before), or in both. Must not know tensors or ranks.
"""

from __future__ import annotations

from typing import Any

from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.config.rope_scaling import (
    SETTINGS_OF_ROPE_TYPE,
    attention_factor,
    ntk_theta,
    static_rope_theta,
    yarn_magnitude,
)
from tinytrain_dist.config.schema import TrainingConfig

SETTING_OF_ROPE_KEY = {
    "rope_theta": "rope_theta",
    "rope_type": "rope_type",
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_context_len",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "attention_factor": "rope_attention_factor",
}
# Two keys that give the attention factor of YaRN, and two with only one possible value.
OTHER_ROPE_KEYS = ("mscale", "mscale_all_dim", "truncate", "partial_rotary_factor")
REQUIRED_ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def to_hf_rope(config: ModelConfig | TrainingConfig) -> dict[str, Any]:
    """Return `rope_parameters` with which transformers computes the same positions.

    `dynamic` becomes the larger base that it stands for: in transformers, the type would change frequencies with the
    length of each sequence.
    """
    model = config.model if isinstance(config, TrainingConfig) else config
    kind = model.resolved_rope_type
    rope: dict[str, Any] = {"rope_theta": static_rope_theta(model), "rope_type": kind}
    if kind == "dynamic":
        return {**rope, "rope_type": "default"}
    used = SETTINGS_OF_ROPE_TYPE[kind]
    values = {key: getattr(model, name) for key, name in SETTING_OF_ROPE_KEY.items() if name in used}
    return rope | {key: value for key, value in values.items() if value is not None}


def rope_differences(
    config: TrainingConfig, rope: dict[str, Any], longest: int, width: int
) -> dict[str, tuple[Any, Any]]:
    """Return, for each setting of the rotary embedding that has to change, its value and the one that is needed.

    A run that extends the context may scale positions otherwise than the folder says, or have a larger rope_theta.

    rope: of `read_hf_rope`; longest: max_position_embeddings; width: of a head.
    """
    model = config.model
    needed = needed_rope_settings(rope, longest, width, config.context_len)
    current = {name: getattr(model, name) for name in SETTING_OF_ROPE_KEY.values()}
    current["rope_type"] = kind = model.resolved_rope_type
    if kind == "yarn" and attention_factor(model) == yarn_magnitude(model.rope_scaling_factor or 1.0):
        current["rope_attention_factor"] = None
    if kind == "dynamic":
        current |= _unscaled(static_rope_theta(model))
    different = {name: (current[name], value) for name, value in needed.items() if current[name] != value}
    if not different or config.context_len <= longest:
        return different
    before = needed_rope_settings(rope, longest, width, longest)
    if kind != "default":
        theta = model.rope_theta, before["rope_theta"]
        return {} if theta[0] >= theta[1] else {"rope_theta": theta}
    if before["rope_type"] == "default" and model.rope_theta > before["rope_theta"]:
        return {}
    return different


def needed_rope_settings(rope: dict[str, Any], longest: int, width: int, context_len: int) -> dict[str, Any]:
    """Return the settings with which our model computes the positions of a config.json; None: leave it out.

    `dynamic` becomes the base that transformers uses for sequences of context_len. Other arguments: see above.
    """
    kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta") or 10_000.0
    needed = _unscaled(theta)
    if kind == "dynamic" and context_len > longest:
        return _unscaled(ntk_theta(theta, width, rope["factor"], context_len / longest))
    if kind in ("default", "dynamic"):
        return needed
    needed["rope_type"] = kind
    used = SETTINGS_OF_ROPE_TYPE[kind]
    needed |= {setting: rope[key] for key, setting in SETTING_OF_ROPE_KEY.items() if setting in used and key in rope}
    if kind == "yarn":
        defaults = {"rope_beta_fast": 32.0, "rope_beta_slow": 1.0, "rope_original_context_len": longest}
        needed |= {name: needed.get(name) or default for name, default in defaults.items()}
        factor = _attention_factor_of(rope)
        needed["rope_attention_factor"] = None if factor == yarn_magnitude(rope["factor"]) else factor
    return needed


def _unscaled(theta: float) -> dict[str, Any]:
    names = ("rope_scaling_factor", "rope_original_context_len")
    return {"rope_theta": theta, "rope_type": "default", **dict.fromkeys(names)}


def _attention_factor_of(rope: dict[str, Any]) -> float:
    """Return YaRN's attention factor as transformers takes it from a config.json."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor, weight, weight_below = rope["factor"], rope.get("mscale"), rope.get("mscale_all_dim")
    if not (weight and weight_below):
        return yarn_magnitude(factor)
    return yarn_magnitude(factor, weight) / yarn_magnitude(factor, weight_below)


def read_hf_rope(hf_config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the rotary settings of a config.json as one dict, and a sentence for each that cannot be used."""
    rope: dict[str, Any] = {}
    origin: dict[str, str] = {}
    problems: list[str] = []
    for key in ("rope_theta", "original_max_position_embeddings"):
        if hf_config.get(key) is not None:
            rope[key], origin[key] = hf_config[key], "config.json itself"
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
    if rope_type not in SETTINGS_OF_ROPE_TYPE:
        *most, last = SETTINGS_OF_ROPE_TYPE
        return [f"rope_type: {rope_type!r} is not supported; this model needs {', '.join(most)} or {last}"]
    problems = [
        f"{key}: {rope[key]!r} among the rotary settings is not supported; this model has nothing like it"
        for key in rope
        if key not in (*SETTING_OF_ROPE_KEY, *OTHER_ROPE_KEYS)
    ]
    problems += [
        f"{key}: {value!r} among the rotary settings is not a number; correct config.json"
        for key, value in rope.items()
        if key in SETTING_OF_ROPE_KEY and key != "rope_type" and type(value) not in (int, float)
    ]
    problems += [
        f"{key}: {rope[key]!r} is not supported; this model needs {needed}"
        for key, values, needed in (("partial_rotary_factor", (1,), "1 or 1.0"), ("truncate", (True,), "true"))
        if rope.get(key, values[0]) not in values
    ]
    problems += [
        f"{key}: is missing among the rotary settings, and rope_type {rope_type} needs it; correct config.json"
        for key in REQUIRED_ROPE_KEYS.get(rope_type, ())
        if key not in rope
    ]
    if rope_type == "default" and rope.get("factor", 1) != 1:
        problems.append(
            f"factor: {rope['factor']!r} has no effect with rope_type {rope_type}; correct config.json, so that it "
            "says what the weights were trained with"
        )
    return problems
