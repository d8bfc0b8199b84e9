"""Describe how rotary positions are scaled for longer contexts, and check the settings of this scaling.

The types have the names that Hugging Face's config.json gives them. Must not know torch: `model/rope_frequencies.py`
computes the frequencies.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # not at run time, because model_config.py imports this module
    from tinytrain_dist.config.model_config import ModelConfig

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]

# The settings that each type uses. It needs those of them whose default is None, except rope_attention_factor.
SETTINGS_OF_ROPE_TYPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("rope_scaling_factor",),
    "dynamic": ("rope_scaling_factor", "rope_original_context_len"),
    "yarn": (
        "rope_scaling_factor",
        "rope_original_context_len",
        "rope_beta_fast",
        "rope_beta_slow",
        "rope_attention_factor",
    ),
    "llama3": (
        "rope_scaling_factor",
        "rope_original_context_len",
        "rope_low_freq_factor",
        "rope_high_freq_factor",
    ),
}


def static_rope_theta(model: ModelConfig) -> float:
    """Return the base of the rotary frequencies: rope_theta, or what `dynamic` makes of it.

    Hugging Face's `dynamic` raises the base with the length of the sequence at run time. In a run, the length is
    context_len, so the base is the one that Hugging Face computes for a sequence of context_len tokens. It is used for
    shorter sequences, too.
    """
    factor, original = model.rope_scaling_factor, model.rope_original_context_len
    if model.resolved_rope_type != "dynamic" or factor is None or original is None:
        return model.rope_theta
    return ntk_theta(model.rope_theta, model.head_width, factor, model.context_len / original)


def ntk_theta(theta: float, width: int, factor: float, length_ratio: float) -> float:
    """Return the base that NTK-aware scaling makes of `theta`, for heads of this width.

    length_ratio: length of a sequence, divided by the length that the weights were trained with (at least 1).
    With factor 1, the lowest frequency is divided by length_ratio, and the highest stays. Source: bloc97 and emozilla
    2023, as Hugging Face computes it.
    """
    stretch = float(factor * length_ratio - (factor - 1))
    return float(theta * stretch ** (width / (width - 2)))


def attention_factor(model: ModelConfig) -> float:
    """Return what cosines and sines are multiplied by: rope_attention_factor, or 0.1 ln(factor) + 1; 1 without YaRN."""
    if model.resolved_rope_type != "yarn" or model.rope_scaling_factor is None:
        return 1.0
    if model.rope_attention_factor is not None:
        return model.rope_attention_factor
    return yarn_magnitude(model.rope_scaling_factor)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """Return YaRN's attention factor for a scaling factor. weight: `mscale` in Hugging Face's config.json."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rope_scaling_problems(model: ModelConfig) -> list[str]:
    """Return a sentence for each setting of the rotary embedding that is missing, contradicts another or is unused."""
    if model.rope_type is None and (model.rope_scaling_factor is None) != (model.rope_original_context_len is None):
        return ["rope_scaling_factor: needs rope_original_context_len, and vice versa; set both, or leave both out"]
    kind = model.resolved_rope_type
    used = SETTINGS_OF_ROPE_TYPE[kind]
    shown_kind = f"{kind} (the default)" if model.rope_type is None else kind
    problems = [
        f"{name}: has no effect with rope_type = {shown_kind}; leave it out"
        for name in (
            "rope_scaling_factor",
            "rope_original_context_len",
            "rope_low_freq_factor",
            "rope_high_freq_factor",
            "rope_beta_fast",
            "rope_beta_slow",
            "rope_attention_factor",
        )
        if name not in used and getattr(model, name) != _default(model, name)
    ]
    original = model.rope_original_context_len
    if "rope_original_context_len" in used and original is None:
        problems.append(
            f"rope_original_context_len: must be set with rope_type = {kind}; set it to the context_len that the "
            "weights were trained with before"
        )
    if "rope_scaling_factor" in used and model.rope_scaling_factor is None:
        usual = "" if original is None else f", which is {model.context_len / original:g}"
        problems.append(
            f"rope_scaling_factor: must be set with rope_type = {kind}; usual is context_len divided by the one that "
            f"the weights were trained with before{usual}"
        )
    return problems or _value_problems(model)


def _default(model: ModelConfig, name: str) -> object:
    return type(model).__dataclass_fields__[name].default


def _value_problems(model: ModelConfig) -> list[str]:
    """Return a sentence for each value that the type cannot use. Each setting that it needs is set."""
    kind, problems = model.resolved_rope_type, []
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    if math.isnan(low) or math.isnan(high):
        return [f"rope_low_freq_factor, rope_high_freq_factor: {low}, {high} must both be numbers"]
    upper_ends = {"rope_low_freq_factor": "rope_high_freq_factor", "rope_beta_slow": "rope_beta_fast"}
    for lower, upper in upper_ends.items():
        if lower in SETTINGS_OF_ROPE_TYPE[kind] and getattr(model, lower) >= getattr(model, upper):
            problems.append(
                f"{lower}: {_value(model, lower)} must be below {upper} {_value(model, upper)}; lower the former, or "
                "raise the latter"
            )
    if kind == "yarn" and model.rope_theta <= 1:
        problems.append(f"rope_theta: {model.rope_theta} must be greater than 1 with rope_type = yarn; raise it")
    original = model.rope_original_context_len or 1
    if kind == "dynamic" and model.context_len <= original:
        problems.append(
            f"rope_type: dynamic has no effect while context_len {model.context_len} is at most "
            f"rope_original_context_len {original}; raise context_len, or leave out rope_type, rope_scaling_factor and "
            "rope_original_context_len"
        )
    if kind == "dynamic" and model.head_width == 2:
        problems.append("rope_type: dynamic needs heads wider than 2; set head_dim to at least 4")
    return problems


def _value(model: ModelConfig, name: str) -> str:
    """Return the value of a setting, marked if it is the default, which the user may not have set."""
    value = getattr(model, name)
    return f"{value} (the default)" if value == _default(model, name) else str(value)
