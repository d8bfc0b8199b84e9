"""Check the scaling of rotary positions against transformers: frequencies, long positions, and whole models."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import SMALL, random_model, some_ids, write_folder
from tinytrain_dist import ConfigError, TrainingConfig, TransformerLM
from tinytrain_dist.checkpoint.huggingface_import import init_from_hf_folder
from tinytrain_dist.model.attention import RotaryEmbedding
from tinytrain_dist.model.huggingface_config import check_hf_config, settings_of_hf_folder, to_hf_config

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test uses the network
transformers = pytest.importorskip("transformers")

LENGTH = 131_072
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16_384}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# `rope_parameters` of Hugging Face, and the settings here with the same meaning, for context_len LENGTH.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({"rope_type": "default"}, {}),
    "linear": ({"rope_type": "linear", "factor": 8.0}, {"rope_type": "linear", "rope_scaling_factor": 8.0}),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "dynamic", "rope_scaling_factor": 2.0, "rope_original_context_len": 16_384},
    ),
    "yarn": (YARN, {"rope_type": "yarn"}),
    "yarn with another band": (
        YARN | {"beta_fast": 20.0, "beta_slow": 2.5},
        {"rope_type": "yarn", "rope_beta_fast": 20.0, "rope_beta_slow": 2.5},
    ),
    "yarn with a band beyond all pairs": (
        YARN | {"beta_fast": 1e-4, "beta_slow": 1e-5},
        {"rope_type": "yarn", "rope_beta_fast": 1e-4, "rope_beta_slow": 1e-5},
    ),
    "yarn with a band that begins before the first pair": (
        YARN | {"beta_fast": 5000.0},
        {"rope_type": "yarn", "rope_beta_fast": 5000.0},
    ),
    "yarn with a band that ends behind the last pair": (
        YARN | {"beta_slow": 1e-5},
        {"rope_type": "yarn", "rope_beta_slow": 1e-5},
    ),
    "yarn with a band of no width": (
        YARN | {"beta_fast": 6000.0, "beta_slow": 2700.0},
        {"rope_type": "yarn", "rope_beta_fast": 6000.0, "rope_beta_slow": 2700.0},
    ),
    "yarn with a factor below 1": (YARN | {"factor": 0.5}, {"rope_type": "yarn", "rope_scaling_factor": 0.5}),
    "yarn with its own attention factor": (
        YARN | {"attention_factor": 1.25},
        {"rope_type": "yarn", "rope_attention_factor": 1.25},
    ),
    "yarn with mscale": (
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.5},
        {
            "rope_type": "yarn",
            "rope_attention_factor": (0.07 * 2.0794415416798357 + 1) / (0.15 * 2.0794415416798357 + 1),
        },
    ),
    "yarn with only one mscale": (YARN | {"mscale": 0.7}, {"rope_type": "yarn"}),
    "llama3": (LLAMA3 | {"original_max_position_embeddings": 16_384}, {"rope_type": "llama3"}),
}
EXACT = [name for name in CASES if name != "llama3"]  # which is computed in another order here


def hf_config(rope: dict[str, Any], width: int, theta: float, **settings: Any) -> Any:
    """Return a LlamaConfig with one head of this width."""
    longest = 16_384 if rope["rope_type"] == "dynamic" else LENGTH
    return transformers.LlamaConfig(
        vocab_size=67, hidden_size=width, num_attention_heads=1, head_dim=width, max_position_embeddings=longest,
        rope_parameters={**rope, "rope_theta": theta}, **settings,
    )  # fmt: skip


def our_config(settings: dict[str, Any], width: int, theta: float) -> TrainingConfig:
    scaled = settings.get("rope_type") in ("yarn", "llama3")
    both = {"rope_scaling_factor": 8.0, "rope_original_context_len": 16_384} if scaled else {}
    return TrainingConfig(
        vocab_size=67, num_heads=1, d_model=width, context_len=LENGTH, rope_theta=theta, **{**both, **settings}
    )


def expected_frequencies(config: Any) -> tuple[torch.Tensor, float]:
    """Return frequencies and attention factor as transformers computes them for a sequence of LENGTH tokens."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=LENGTH)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_attention_factor_are_those_of_transformers(case: str, width: int, theta: float) -> None:
    rope, settings = CASES[case]
    expected, factor = expected_frequencies(hf_config(rope, width, theta))
    found = RotaryEmbedding.of_model(our_config(settings, width, theta).model)
    torch.testing.assert_close(found.frequencies(), expected, rtol=0 if case in EXACT else 3e-7, atol=0)
    assert found.attention_factor == pytest.approx(factor, rel=1e-12)
    plain, _ = expected_frequencies(hf_config({"rope_type": "default"}, width, theta))
    assert torch.equal(found.frequencies(), plain) == (case in ("default", "yarn with a band beyond all pairs"))


@pytest.mark.parametrize("case", CASES)
def test_long_positions_are_those_of_transformers(case: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope, settings = CASES[case]
    positions = torch.tensor([0, 1, 5000, 16_383, 16_384, 100_003, LENGTH - 1])
    theirs = LlamaRotaryEmbedding(hf_config(rope, 128, 500_000.0))(torch.zeros(1), positions[None])
    ours = RotaryEmbedding.of_model(our_config(settings, 128, 500_000.0).model)(positions)
    # transformers computes the base of dynamic in float32 there, which moves angles at position 131,071
    tolerance = {"llama3": 0.02, "dynamic": 0.02}.get(case, 0.0)
    for found, (expected,) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_transformers_saved_is_imported_with_the_same_logits(case: str, tmp_path: Path) -> None:
    """The settings are those that the refusal of other settings names. The sequence is as long as context_len."""
    lengths = {"original_max_position_embeddings": 16} if CASES[case][0]["rope_type"] in ("yarn", "llama3") else {}
    longest = 16 if case == "dynamic" else 128
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=longest, attn_implementation="eager",
            rope_parameters={**CASES[case][0], **lengths, "rope_theta": 100.0}, initializer_range=0.2,
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    settings = settings_of_hf_folder(tmp_path) | {"context_len": 128}
    if case == "dynamic":
        with pytest.raises(ConfigError) as refused:
            check_hf_config(TrainingConfig(**settings), tmp_path)
        assert "rope_theta: is 100.0, but" in str(refused.value)
        settings["rope_theta"] = float(refused.value.problems[0].rpartition("rope_theta = ")[2])
    config = TrainingConfig(**settings)
    ours = TransformerLM(config)
    init_from_hf_folder(tmp_path, ours, config)
    ids = some_ids(config, length=128)
    expected = theirs(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-3)
    if case == "dynamic":  # the same, with the names of the type
        named = {"rope_type": "dynamic", "rope_scaling_factor": 2.0, "rope_original_context_len": 16}
        check_hf_config(TrainingConfig(**settings | named | {"rope_theta": 100.0}), tmp_path)


def test_older_forms_of_yarn_are_read(tmp_path: Path) -> None:
    """`type` instead of `rope_type`, and no original length, which is then max_position_embeddings."""
    older = {"type": "yarn", "factor": 4.0, "beta_fast": None, "beta_slow": 1}
    (tmp_path / "config.json").write_text(
        json.dumps({**to_hf_config(SMALL), "rope_parameters": None, "rope_scaling": older, "rope_theta": 100.0})
    )
    found = {name: value for name, value in settings_of_hf_folder(tmp_path).items() if name.startswith("rope_")}
    assert found == {
        "rope_theta": 100.0,
        "rope_type": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_original_context_len": 64,
        "rope_beta_fast": 32.0,
        "rope_beta_slow": 1,
        "rope_attention_factor": None,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({**to_hf_config(SMALL), "rope_parameters": YARN | {"truncate": 0}})
    )
    with pytest.raises(ConfigError, match="truncate: 0 is not supported; this model needs true"):
        settings_of_hf_folder(tmp_path)
    # transformers takes its default in place of 0
    (tmp_path / "config.json").write_text(
        json.dumps({**to_hf_config(SMALL), "rope_parameters": YARN | {"beta_fast": 40.0, "beta_slow": 0}})
    )
    found = settings_of_hf_folder(tmp_path)
    assert (found["rope_beta_fast"], found["rope_beta_slow"]) == (40.0, 1.0)


def refusals(folder: Path, saved: TrainingConfig, **settings: Any) -> list[str]:
    """Return what check_hf_config says to a run with these settings that starts from a folder of `saved`."""
    (folder / "config.json").write_text(json.dumps(to_hf_config(saved)))
    try:
        check_hf_config(dataclasses.replace(saved, **settings), folder)
    except ConfigError as error:
        return error.problems
    return []


EXTENDED = {"context_len": 256, "rope_scaling_factor": 4.0, "rope_original_context_len": 64}


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_a_longer_context_may_come_with_a_scaling(tmp_path: Path, kind: str) -> None:
    scaled = {**EXTENDED, "rope_type": kind, "rope_original_context_len": None if kind == "linear" else 64}
    assert refusals(tmp_path, SMALL, **scaled) == []
    assert refusals(tmp_path, SMALL, **scaled, rope_theta=500_000.0) == []
    (problem,) = refusals(tmp_path, dataclasses.replace(SMALL, rope_theta=500_000.0), **scaled, rope_theta=10_000.0)
    assert problem.startswith("rope_theta: is 10000.0, but ")
    assert problem.endswith("set rope_theta = 500000.0")
    extended = dataclasses.replace(SMALL, **scaled)
    assert refusals(tmp_path, extended) == []
    if kind != "dynamic":  # the same context length: the scaling is part of the model
        unscaled = dict.fromkeys(("rope_type", "rope_scaling_factor", "rope_original_context_len"))
        assert len(refusals(tmp_path, extended, **unscaled)) >= 2
        # nor may a larger base take its place in a still longer context
        assert len(refusals(tmp_path, extended, **unscaled, context_len=512, rope_theta=500_000.0)) >= 2


def test_the_attention_factor_of_yarn_need_not_be_named_if_it_is_the_usual_one(tmp_path: Path) -> None:
    saved = dataclasses.replace(SMALL, **EXTENDED, rope_type="yarn")
    usual = 0.1 * math.log(4.0) + 1.0
    assert refusals(tmp_path, saved, rope_attention_factor=usual) == []
    assert to_hf_config(saved)["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "beta_fast": 32.0, "beta_slow": 1.0,
    }  # fmt: skip
    (problem,) = refusals(tmp_path, saved, rope_attention_factor=1.5)
    assert problem.startswith("rope_attention_factor: is 1.5, but ")


def test_a_scaling_needs_a_longer_context(tmp_path: Path) -> None:
    problems = refusals(tmp_path, SMALL, **EXTENDED | {"context_len": 64}, rope_type="yarn")
    assert [problem.partition(":")[0] for problem in problems] == [
        "rope_type", "rope_scaling_factor", "rope_original_context_len",
    ]  # fmt: skip
    assert problems[0].startswith("rope_type: is yarn, but ")
    assert problems[0].endswith(
        'needs default; set rope_type = "default" (a new scaling extends the context: it is possible from context_len '
        "65, because max_position_embeddings is 64)"
    )


def test_a_longer_context_may_come_with_a_larger_base(tmp_path: Path) -> None:
    assert refusals(tmp_path, SMALL, context_len=256, rope_theta=500_000.0) == []
    assert refusals(tmp_path, SMALL, context_len=256) == []
    assert len(refusals(tmp_path, SMALL, context_len=64, rope_theta=500_000.0)) == 1
    assert len(refusals(tmp_path, SMALL, context_len=256, rope_theta=5_000.0)) == 1


def test_dynamic_changes_nothing_up_to_its_original_length(tmp_path: Path) -> None:
    """In a folder that transformers saved: there, max_position_embeddings is the length before."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    (tmp_path / "config.json").write_text(
        json.dumps({**to_hf_config(SMALL), "rope_parameters": rope, "rope_scaling": None})
    )
    for context_len in (16, 64):
        check_hf_config(dataclasses.replace(SMALL, context_len=context_len), tmp_path)
    with pytest.raises(ConfigError, match="rope_theta: is 10000"):
        check_hf_config(dataclasses.replace(SMALL, context_len=65), tmp_path)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own compiler reads it
def test_scaled_positions_are_the_same_in_compiled_code(kind: str) -> None:
    """Positions are compiled to a kernel; the model to one graph, which torch's own operators compute."""
    scaled = {**EXTENDED, "rope_type": kind, "rope_original_context_len": None if kind == "linear" else 64}
    config = dataclasses.replace(SMALL, **scaled)
    model, ids = random_model(config), some_ids(config, length=256)
    positions = torch.arange(256)
    torch._dynamo.reset()
    compiled = torch.compile(model.model.rotary, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(positions), model.model.rotary(positions), rtol=0, atol=1e-4)
    expected = model(ids)
    found = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")(ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_dynamic_is_exported_as_the_base_that_it_stands_for(tmp_path: Path) -> None:
    """Otherwise transformers would use other frequencies for each length."""
    config = dataclasses.replace(SMALL, **EXTENDED, rope_type="dynamic")
    stretch = 4.0 * 256 / 64 - 3.0
    expected = {"rope_type": "default", "rope_theta": 10_000.0 * stretch ** (8 / 6)}
    description = to_hf_config(config)
    assert description["rope_parameters"] == expected
    assert (description["rope_theta"], description["rope_scaling"]) == (expected["rope_theta"], None)
    ours = random_model(config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        write_folder(tmp_path, ours), attn_implementation="eager"
    )
    for length in (5, 64, 256):
        ids = some_ids(config, length=length)
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)
