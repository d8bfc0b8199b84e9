"""Check ModelConfig: its defaults and derived sizes, and the number of weights."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytrain_dist.config.model_config import MODEL_SETTINGS, ModelConfig
from tinytrain_dist.config.schema import FIELDS, TrainingConfig
from tinytrain_dist.model.transformer import TransformerLM


def test_replace_of_d_model_gives_a_new_ffn_dim():
    small = TrainingConfig(d_model=256)
    assert small.ffn_dim == 704  # 8/3 x 256 = 682.67, up to a multiple of 64
    large = dataclasses.replace(small, d_model=512)
    assert large.ffn_dim == 1408
    assert large.d_ff is None
    assert dataclasses.replace(large, d_ff=100).ffn_dim == 100


@given(st.integers(1, 4096))
def test_ffn_dim_is_the_next_multiple_of_64(half_width):
    d_model = 2 * half_width
    ffn_dim = TrainingConfig(d_model=d_model, num_heads=1).ffn_dim
    assert ffn_dim % 64 == 0
    assert ffn_dim * 3 >= 8 * d_model > (ffn_dim - 64) * 3


def test_defaults_and_types_are_those_of_the_settings():
    assert TrainingConfig().model == ModelConfig()
    types = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    assert types == {name: FIELDS[name].type for name in MODEL_SETTINGS}


def test_every_setting_of_the_model_arrives():
    changed = TrainingConfig(
        vocab_size=7, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=4, d_model=18, d_ff=5, rope_theta=2.0,
        rope_type="yarn", rope_scaling_factor=3.0, rope_original_context_len=8, rope_beta_fast=9.0, rope_beta_slow=2.0,
        rope_attention_factor=1.5,
        tie_embeddings=True, qk_norm=True, norm_eps=0.5, logit_soft_cap=8.0, context_len=9,
    )  # fmt: skip
    llama3 = TrainingConfig(
        rope_scaling_factor=3.0, rope_original_context_len=8, rope_low_freq_factor=2.0, rope_high_freq_factor=5.0
    )
    only_llama3 = {"rope_low_freq_factor", "rope_high_freq_factor"}
    default = ModelConfig()
    for name in MODEL_SETTINGS:
        config = llama3 if name in only_llama3 else changed
        assert getattr(config.model, name) == getattr(config, name) != getattr(default, name), name
    assert (changed.kv_heads, changed.head_width, changed.ffn_dim) == (2, 4, 5)


def test_settings_under_the_heading_model_belong_to_the_model():
    under_model = [name for name, field in FIELDS.items() if field.metadata["section"] == "model"]
    assert set(under_model) == {*MODEL_SETTINGS} - {"context_len"}


@pytest.mark.parametrize("tied", [False, True])
def test_the_approximate_parameter_count_leaves_out_norms_only(tied):
    config = ModelConfig(
        vocab_size=50, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, d_model=16, tie_embeddings=tied
    )
    matrices = sum(param.numel() for param in TransformerLM(config).parameters() if param.ndim >= 2)
    assert config.approximate_parameter_count == matrices


def test_problems_of_a_model_are_found_without_a_training_configuration():
    assert ModelConfig().shape_problems() == ModelConfig().rope_problems() == []
    (shape,) = ModelConfig(num_heads=4, num_kv_heads=3).shape_problems()
    assert shape.startswith("num_kv_heads: 3 does not divide num_heads 4")
    (rope,) = ModelConfig(rope_scaling_factor=2.0).rope_problems()
    assert rope.startswith("rope_scaling_factor: needs rope_original_context_len")


def test_the_value_is_frozen_and_has_no_other_fields():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().d_model = 1  # type: ignore[misc]
    assert list(MODEL_SETTINGS) == [field.name for field in dataclasses.fields(ModelConfig)]
