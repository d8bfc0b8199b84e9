"""Describe the architecture of a model: `ModelConfig`, the value that a model is built from.

Must not know torch, training settings, files or ranks. A training run takes it from `TrainingConfig.model`. A program
with its own training loop creates a ModelConfig directly. Fields have the same names as the settings of TrainingConfig.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tinytrain_dist.config.batch_sizes import divisors, nearest_multiples
from tinytrain_dist.config.rope_scaling import RopeType, rope_scaling_problems
from tinytrain_dist.utils.text import format_choices


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and variants of a Llama-style decoder (with `qk_norm`: Qwen3); a frozen dataclass.

    If num_kv_heads, head_dim or d_ff is None, it follows from other sizes: use the properties `kv_heads`, `head_width`
    and `ffn_dim`. Sizes are in elements, context lengths in tokens.
    """

    vocab_size: int | None = None
    num_layers: int = 4
    num_heads: int = 16
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_model: int = 512
    d_ff: int | None = None
    rope_theta: float = 10_000.0
    rope_type: RopeType | None = None
    rope_scaling_factor: float | None = None
    rope_original_context_len: int | None = None
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_attention_factor: float | None = None
    tie_embeddings: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-5
    logit_soft_cap: float | None = None
    context_len: int = 256

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads: num_kv_heads, or num_heads if that is None."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head: head_dim, or d_model / num_heads if that is None."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer: d_ff, or 8/3 d_model rounded up to a multiple of 64 if that is None."""
        return self.d_ff or 64 * math.ceil(8 * self.d_model / (3 * 64))

    @property
    def resolved_rope_type(self) -> RopeType:
        """How rotary positions are scaled: rope_type, or if that is None, llama3 with rope_scaling_factor."""
        return self.rope_type or ("default" if self.rope_scaling_factor is None else "llama3")

    @property
    def approximate_parameter_count(self) -> int:
        """Number of parameters, not counting the few thousand of the norms.

        It counts the embedding, the output head (unless it shares the embedding's weight) and the matrices of the
        blocks.
        """
        embedding = (self.vocab_size or 0) * self.d_model
        embedding_and_head = embedding * (1 if self.tie_embeddings else 2)
        attention = 2 * self.d_model * self.head_width * (self.num_heads + self.kv_heads)
        feed_forward = 3 * self.d_model * self.ffn_dim
        return embedding_and_head + self.num_layers * (attention + feed_forward)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter by name, in the order of the model. A tied head has no entry.

        Without vocab_size, embedding and head have 0 rows.
        """
        d_model, ffn_dim, vocabulary = self.d_model, self.ffn_dim, self.vocab_size or 0
        queries, keys = self.num_heads * self.head_width, self.kv_heads * self.head_width
        block: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (queries, d_model),
            "self_attn.k_proj": (keys, d_model),
            "self_attn.v_proj": (keys, d_model),
            "self_attn.o_proj": (d_model, queries),
            **(
                {"self_attn.q_norm": (self.head_width,), "self_attn.k_norm": (self.head_width,)} if self.qk_norm else {}
            ),
            "mlp.gate_proj": (ffn_dim, d_model),
            "mlp.up_proj": (ffn_dim, d_model),
            "mlp.down_proj": (d_model, ffn_dim),
            "input_layernorm": (d_model,),
            "post_attention_layernorm": (d_model,),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d_model)}
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
        shapes["model.norm.weight"] = (d_model,)
        return shapes if self.tie_embeddings else {**shapes, "lm_head.weight": (vocabulary, d_model)}

    def shape_problems(self) -> list[str]:
        """Return a sentence for each pair of sizes that do not fit together. All sizes must be at least 1."""
        return [_shape_sentence(self, fault) for fault in _shape_faults(self)]

    def fp8_problems(self) -> list[str]:
        """Return a sentence for each size of a block's matrices that float8 units cannot multiply."""
        return [
            f"{name}: precision = fp8 needs matrices whose sizes are multiples of {FP8_MULTIPLE}, but this makes one "
            f"of {size}; possible: {_possible_sizes(self, name)}; or precision = bf16"
            for name, size in _fp8_faults(self).items()
        ]

    def rope_problems(self) -> list[str]:
        """Return a sentence for each setting of the rotary embedding that contradicts another or has no effect."""
        return rope_scaling_problems(self)


FP8_MULTIPLE = 16  # float8 units multiply matrices whose sizes are multiples of this


def _value(model: ModelConfig, name: str) -> str:
    """Return the value of a setting, marked if it is the default, which the user may not have set."""
    value = getattr(model, name)
    return f"{value} (the default)" if value == FIELD_DEFAULTS[name] else str(value)


def _shape_sentence(model: ModelConfig, fault: str) -> str:
    """Return the message about a fault."""
    heads, d_model = _value(model, "num_heads"), _value(model, "d_model")
    if fault == "heads":
        problem = f"d_model: {d_model} is not a multiple of num_heads {heads}"
    elif fault == "key heads":
        problem = f"num_kv_heads: {model.kv_heads} does not divide num_heads {heads}"
    elif model.head_dim is not None:
        problem = f"head_dim: {model.head_dim} is odd, but rotary embeddings need an even width"
    else:
        problem = f"d_model: {d_model} / num_heads {heads} = {model.head_width} is odd, but rotary embeddings need an "
        problem += "even width"
    return f"{problem}; possible: {_possible_sizes(model, fault)}"


def _shape_faults(model: ModelConfig) -> list[str]:
    """Return which rules the sizes break: heads, width, key heads."""
    faults = []
    if model.head_dim is None and model.d_model % model.num_heads:
        faults.append("heads")
    elif model.head_width % 2:
        faults.append("width")
    if model.num_heads % model.kv_heads:
        faults.append("key heads")
    return faults


def _fp8_faults(model: ModelConfig) -> dict[str, int]:
    """Return, by the setting that decides it, each size of a block's matrices that is not a multiple of 16."""
    heads, key_heads = model.num_heads * model.head_width, model.kv_heads * model.head_width
    sizes = {"d_model": model.d_model, "d_ff": model.ffn_dim, "num_kv_heads": key_heads}
    if model.head_dim is not None:  # otherwise the heads together are as wide as the model
        sizes["head_dim"] = heads
    if key_heads == heads:
        del sizes["num_kv_heads"]
    return {name: size for name, size in sizes.items() if size % FP8_MULTIPLE}


def _possible_sizes(model: ModelConfig, fault: str) -> str:
    """Return the values of single settings that correct this fault and cause no other."""
    present = {*_shape_faults(model), *_fp8_faults(model)}
    heads, width = model.num_heads, model.head_width
    exact = math.lcm(FP8_MULTIPLE, 2 * heads)  # a d_model that also makes an even width
    widths = nearest_multiples(model.d_model, 2 * heads)
    candidates = {
        "heads": {"num_heads": divisors(model.d_model), "d_model": widths},
        "width": {"num_heads": divisors(model.d_model), "d_model": widths},
        "key heads": {"num_kv_heads": divisors(heads), "num_heads": nearest_multiples(heads, model.kv_heads)},
        "d_model": {
            "d_model": [*nearest_multiples(model.d_model, exact), *nearest_multiples(model.d_model, 16 * heads)]
        },
        "d_ff": {"d_ff": nearest_multiples(model.ffn_dim, FP8_MULTIPLE)},
        "num_kv_heads": {"num_kv_heads": divisors(heads)},
        "head_dim": {"head_dim": nearest_multiples(width, FP8_MULTIPLE)},
    }[fault]
    if fault in ("heads", "width"):
        candidates["head_dim"] = nearest_multiples(max(width, 2), 2)

    def corrects(name: str, size: int) -> bool:
        changed = dataclasses.replace(model, **{name: size})  # type: ignore[arg-type]
        remaining = {*_shape_faults(changed), *_fp8_faults(changed)}
        ignored = set() if fault in _fp8_faults(model) else {*_fp8_faults(changed)}
        return fault not in remaining and remaining - ignored <= present

    offers = {name: sorted({s for s in sizes if corrects(name, s)}) for name, sizes in candidates.items()}
    return format_choices(offers)


FIELD_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
# These decide which tensors a model has, and their shapes.
SHAPE_SETTINGS = frozenset(
    "vocab_size num_layers num_heads num_kv_heads head_dim d_model d_ff tie_embeddings qk_norm".split()
)
MODEL_SETTINGS = tuple(field.name for field in dataclasses.fields(ModelConfig))
