"""Check the translation to and from Hugging Face's config.json, against transformers itself."""

import json
import os
from pathlib import Path

import pytest

from tests.helpers.models import KINDS, SMALL
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.model.huggingface_config import check_hf_config, to_hf_config

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test uses the network


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_of_transformers_is_read_back(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = KINDS[kind]
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(to_hf_config(config)))
    check_hf_config(config, tmp_path / "ours")
    transformers.AutoConfig.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    check_hf_config(config, tmp_path / "theirs")


def test_the_end_token_is_in_the_config():
    assert to_hf_config(SMALL)["eos_token_id"] is None
    assert to_hf_config(SMALL, eos_id=5)["eos_token_id"] == 5


def fits(tmp_path: Path, config: TrainingConfig, **changes: object) -> list[str]:
    """Return the problems that check_hf_config finds after these changes of config.json; None removes a key."""
    theirs = {**to_hf_config(config), **changes}
    theirs = {key: value for key, value in theirs.items() if value is not None or key not in changes}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    try:
        check_hf_config(config, tmp_path)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("key", "value", "needs"),
    [
        ("model_type", "mistral", "llama or qwen3"),
        ("hidden_act", "gelu", "silu"),
        ("attention_bias", True, "False"),
        ("mlp_bias", True, "False"),
        ("use_sliding_window", True, "False"),
        ("quantization_config", {"bits": 4}, "None"),
        ("partial_rotary_factor", 0.5, "1 or 1.0"),
        ("attention_dropout", 0.1, "0.0"),
        ("auto_map", {"AutoModelForCausalLM": "modeling_x.X"}, "None"),
        ("architectures", ["LlamaForSequenceClassification"], "LlamaForCausalLM"),
        ("layer_types", ["full_attention", "sliding_attention"], "full_attention in every layer"),
        ("sliding_window", 4096, "null"),
    ],
)
def test_what_the_model_cannot_represent_is_refused_by_name(tmp_path, key, value, needs):
    assert fits(tmp_path, SMALL, **{key: value}) == [f"{key}: {value!r} is not supported; this model needs {needs}"]


def test_keys_of_related_models_are_refused_unless_they_change_nothing(tmp_path):
    (problem,) = fits(tmp_path, SMALL, embedding_multiplier=12.0)
    assert problem == "embedding_multiplier: 12.0 is not supported; this model has nothing like it"
    assert fits(tmp_path, SMALL, embedding_multiplier=1.0, rope_interleaved=False, num_experts=0) == []
    harmless = {"use_sliding_window": False, "sliding_window": 4096, "layer_types": ["full_attention"] * 2}
    assert fits(tmp_path, SMALL, **harmless, pretraining_tp=2) == []


ROPES = [
    ({"rope_scaling": "linear"}, "rope_scaling: 'linear' is not supported"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set of values for all layers"),
    ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_type: is 'linear' in rope_scaling, but 'default' in"),
    ({"rope_theta": 777.0}, "rope_theta: is 777.0 in config.json itself, but 10000.0 in rope_parameters"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5 is not"),
    ({"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "factor: 8.0 has no effect with rope_type default"),
    ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section: [1] among the rotary"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: is missing among the rotary"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor: is missing among the rotary"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, "factor: is missing among the rotary"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "factor: is missing among the rotary"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "8"}}, "factor: '8' among the rotary settings is not a num"),
]


@pytest.mark.parametrize(("changes", "said"), ROPES)
def test_rotary_settings_that_cannot_be_used_or_contradict_each_other_are_refused(tmp_path, changes, said):
    assert any(said in problem for problem in fits(tmp_path, SMALL, **changes))


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_other_rotary_scalings_are_refused(tmp_path, where):
    scaling = {"rope_parameters": None, "rope_scaling": None, where: {"rope_type": "longrope", "factor": 2.0}}
    (problem,) = fits(tmp_path, SMALL, **scaling)
    assert problem == (
        "rope_type: 'longrope' is not supported; this model needs default, linear, dynamic, yarn or llama3"
    )


@pytest.mark.parametrize(
    ("key", "value", "setting", "here"),
    [
        ("vocab_size", 68, "vocab_size", 67),
        ("hidden_size", 64, "d_model", 32),
        ("intermediate_size", 64, "d_ff", 48),
        ("num_hidden_layers", 3, "num_layers", 2),
        ("num_attention_heads", 8, "num_heads", 4),
        ("num_key_value_heads", 2, "num_kv_heads", 4),
        ("head_dim", 16, "head_dim", 8),
        ("rms_norm_eps", 1e-6, "norm_eps", 1e-5),
        ("tie_word_embeddings", True, "tie_embeddings", False),
    ],
)
def test_a_size_that_differs_is_reported_with_both_values_and_the_remedy(tmp_path, key, value, setting, here):
    path = tmp_path / "config.json"
    assert fits(tmp_path, SMALL, **{key: value}) == [
        f"{setting}: is {here}, but {path} needs {value}; set {setting} = {json.dumps(value)}"
    ]


def test_the_folder_is_named(tmp_path):
    fits(tmp_path, SMALL, vocab_size=1)
    with pytest.raises(ConfigError) as caught:
        check_hf_config(SMALL, tmp_path)
    assert caught.value.source == f"init_from = {tmp_path}"


def test_all_differences_are_reported_together(tmp_path):
    rope = {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 5.0}
    problems = fits(tmp_path, SMALL, vocab_size=1, hidden_act="relu", **rope)
    assert [problem.split(":")[0] for problem in problems] == ["hidden_act", "vocab_size", "rope_theta"]


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


def test_query_norms_and_scaling_must_agree(tmp_path):
    assert [p.split(":")[0] for p in fits(tmp_path, SMALL, **QWEN3)] == ["qk_norm"]
    assert [p.split(":")[0] for p in fits(tmp_path, KINDS["qwen3"], **LLAMA)] == ["qk_norm"]
    scaled = {**to_hf_config(KINDS["llama3"])["rope_parameters"], "rope_theta": 10_000.0}
    problems = fits(tmp_path, SMALL, rope_parameters=scaled)
    assert [p.split(":")[0] for p in problems] == ["rope_type", "rope_scaling_factor", "rope_original_context_len"]
    # the reverse: a scaling is configured here, but the weights were trained without it
    plain = {"rope_type": "default", "rope_theta": 100.0}
    problems = fits(tmp_path, KINDS["llama3"], rope_parameters=plain, rope_scaling=None)
    assert [p.split(":")[0] for p in problems] == ["rope_type", "rope_scaling_factor", "rope_original_context_len"]


def test_keys_left_out_have_transformers_defaults(tmp_path):
    """Llama's config.json before 2024 has neither head_dim nor rope settings, and defaults differ from ours."""
    older = {"head_dim": None, "rope_parameters": None, "rope_scaling": None, "rope_theta": None}
    assert fits(tmp_path, SMALL, **older, num_key_value_heads=None, tie_word_embeddings=None) == []
    (problem,) = fits(tmp_path, SMALL, rms_norm_eps=None)
    assert problem == f"norm_eps: is 1e-05, but {tmp_path / 'config.json'} needs 1e-06; set norm_eps = 1e-06"
    assert [p.split(":")[0] for p in fits(tmp_path, KINDS["tied"], tie_word_embeddings=None)] == ["tie_embeddings"]
    assert [p.split(":")[0] for p in fits(tmp_path, KINDS["gqa"], num_key_value_heads=None)] == ["num_kv_heads"]
    (problem,) = fits(tmp_path, KINDS["qwen3"], num_key_value_heads=None)
    assert "needs 32" in problem


@pytest.mark.parametrize("value", [0, -1, "4", 4.5, True, [4]])
def test_a_size_that_is_no_size_is_reported(tmp_path, value):
    (problem,) = fits(tmp_path, SMALL, num_attention_heads=value)
    assert "is not a positive whole number" in problem


@pytest.mark.parametrize(
    "text",
    ['{"model_type": "gpt2", "n_embd": 768, "n_head": 12}', "{}", "[]", "{", '{"model_type": "llama"}'],
)
def test_a_folder_of_something_else_is_reported(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read|hidden_size: is missing in"):
        check_hf_config(SMALL, tmp_path)


def test_no_folder_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"init_from: .*config\.json cannot be read"):
        check_hf_config(SMALL, tmp_path / "none")
