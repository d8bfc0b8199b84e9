"""Patterns on the names of parameters: which group a parameter is in, and what is wrong with an entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinytrain_dist.config.loading import load_config, parse_command_line
from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.config.parameter_groups import describe_groups, named_shapes, resolve_groups
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError

SMALL = ModelConfig(vocab_size=53, num_layers=2, num_heads=2, num_kv_heads=1, d_model=16, d_ff=24)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tie_embeddings": True, "qk_norm": True},
        {"head_dim": 6, "num_kv_heads": None, "d_ff": None, "num_layers": 1},
    ],
)
def test_names_and_shapes_are_those_of_the_model(sizes: dict[str, Any]):
    from tinytrain_dist.model.transformer import TransformerLM

    config = ModelConfig(**{**vars(SMALL), **sizes})
    with torch.device("meta"):
        model = TransformerLM(config)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    assert list(config.parameter_shapes().items()) == sorted(
        shapes.items(), key=lambda item: list(shapes).index(item[0])
    )
    every_name = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert sorted(name for parameter in named_shapes(config) for name in parameter.names) == sorted(every_name)


def values(*param_groups: str, **sizes: Any) -> dict[str, tuple[str, float, float]]:
    """Return title, lr_factor and weight_decay of every parameter, by its first name."""
    config = TrainingConfig(**{**vars(SMALL), **sizes}, param_groups=param_groups, weight_decay=0.1)
    groups = resolve_groups(named_shapes(config.model), config)
    return {
        parameter.names[0]: (group.title, group.lr_factor, group.weight_decay)
        for group in groups
        for parameter in group.parameters
    }


def test_the_first_entry_that_matches_counts():
    found = values("*layers.0.*q_proj*: lr_factor=2", "*q_proj*, *norm*: lr_factor=3 weight_decay=0.5")
    assert found["model.layers.0.self_attn.q_proj.weight"] == ("*layers.0.*q_proj*", 2.0, 0.1)
    assert found["model.layers.1.self_attn.q_proj.weight"] == ("*q_proj*, *norm*", 3.0, 0.5)
    assert found["model.norm.weight"] == ("*q_proj*, *norm*", 3.0, 0.5)
    assert found["lm_head.weight"] == ("other matrices", 1.0, 0.1)
    assert len(found) == len(SMALL.parameter_shapes())


def test_an_entry_without_weight_decay_divides_matrices_and_vectors():
    found = values("*layers.0.*: lr_factor=2")
    assert found["model.layers.0.input_layernorm.weight"] == ("*layers.0.*", 2.0, 0.0)
    assert found["model.layers.0.mlp.up_proj.weight"] == ("*layers.0.*", 2.0, 0.1)
    assert found["model.norm.weight"] == ("other vectors", 1.0, 0.0)


def test_a_tied_weight_is_matched_by_both_of_its_names():
    for pattern in ("lm_head.*", "*embed_tokens*"):
        found = values(f"{pattern}: weight_decay=0", tie_embeddings=True)
        assert found["model.embed_tokens.weight"] == (pattern, 1.0, 0.0)


def test_the_table_has_a_row_for_each_group():
    config = TrainingConfig(**vars(SMALL), param_groups=("lm_head.*: lr_factor=8 weight_decay=0",))
    groups = resolve_groups(named_shapes(SMALL), config)
    rows = [line.split() for line in describe_groups(groups, 0.01).splitlines()]
    assert rows[1] == ["lm_head.*", "adamw", "1", "848", "0.08", "0"]
    assert rows[2][:5] == ["other", "matrices", "adamw", "15", "4,688"]
    assert rows[3][:5] == ["other", "vectors", "adamw", "5", "80"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            ["lm_head.*"],
            r"'lm_head\.\*' must be PATTERN, PATTERN: KEY=VALUE .*the keys are lr_factor, weight_decay, optimizer",
        ),
        (["lm_head.*:"], r"must be PATTERN"),
        (["lm_head.*,: lr_factor=1"], r"must be PATTERN"),
        (
            ["lm_head.*: lr_facter=1"],
            r"'lr_facter=1' in .* is not KEY=VALUE with a known key; did you mean lr_factor=\?",
        ),
        (["lm_head.*: lr_factor"], r"'lr_factor' in .*; did you mean lr_factor=\?"),
        (["lm_head.*: momentum=1"], r"the keys are lr_factor, weight_decay, optimizer"),
        (["lm_head.*: lr_factor=fast"], r"'lr_factor=fast' in .* must be a finite number that is not negative"),
        (["lm_head.*: lr_factor=nan"], r"'lr_factor=nan' in .* must be a finite number"),
        (["lm_head.*: weight_decay=-1"], r"'weight_decay=-1' in .* must be a finite number"),
        (["lm_head.*: lr_factor=1 lr_factor=2"], r"sets lr_factor to 1 and to 2; keep one"),
        (["q_proj: lr_factor=1"], r"'q_proj' matches no parameter of the model; .* so write '\*q_proj\*'"),
        (["lm_heat.weight: lr_factor=1"], r"did you mean 'lm_head\.weight'\?"),
        (["zzz: lr_factor=1"], r"names are for example model\.embed_tokens\.weight, "),
        (
            ["*norm*: lr_factor=1", "*input_layernorm*: lr_factor=2"],
            r"'\*input_layernorm\*' in .* has no effect, because .* the earlier entry '\*norm\*: lr_factor=1'; list",
        ),
    ],
)
def test_a_wrong_entry_is_described_before_anything_is_imported(entries: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(param_groups=tuple(entries))


def test_every_wrong_entry_is_reported():
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(param_groups=("a", "lm_head.*: b=1", "*: lr_factor=x"))
    assert len(caught.value.problems) == 3


def test_entries_come_from_a_file_or_from_the_command_line(tmp_path):
    entries = ("model.embed_tokens.*, lm_head.*: lr_factor=8 weight_decay=0", "*norm*: lr_factor=2")
    given = parse_command_line(["--param-groups", *entries])
    assert given.param_groups == entries
    path = tmp_path / "run.toml"
    path.write_text(given.to_toml())
    assert load_config(path).param_groups == entries
    assert load_config(path, {"param_groups": []}).param_groups == ()


def test_muon_updates_the_matrices_of_blocks_unless_an_entry_says_otherwise():
    entries = ("*k_proj*: optimizer=adamw", "lm_head.*: optimizer=muon lr_factor=0.5")
    config = TrainingConfig(**vars(SMALL), optimizer="muon", param_groups=entries)
    groups = resolve_groups(named_shapes(SMALL), config)
    optimizer_of = {parameter.names[0]: group.optimizer for group in groups for parameter in group.parameters}
    for name, shape in SMALL.parameter_shapes().items():
        is_matrix = ".layers." in name and len(shape) == 2 and "k_proj" not in name
        assert optimizer_of[name] == ("muon" if is_matrix or name == "lm_head.weight" else "adamw"), name
    assert [group.optimizer for group in groups] == sorted(group.optimizer for group in groups)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "muom"}, r"optimizer: 'muom' is not one of adamw, muon"),
        ({"muon_steps": 3}, r"muon_steps: 3 has no effect without Muon; leave it out, or set optimizer = muon"),
        ({"muon_scale": "spectral"}, r"muon_scale: spectral has no effect without Muon"),
        ({"optimizer": "muon", "muon_momentum": 1.0}, r"muon_momentum: 1\.0 must lie in \[0, 1\)"),
        ({"optimizer": "muon", "muon_steps": 0}, r"muon_steps: 0 must be at least 1"),
        (
            {"optimizer": "muon", "param_groups": ("*layers*: optimizer=adamw",)},
            r"optimizer: muon has no effect, because param_groups gives all matrices to adamw",
        ),
        ({"param_groups": ("*: optimizer=sgd",)}, r"'optimizer=sgd' in .* must be one of adamw, muon"),
        (
            {"param_groups": ("*layers.0.*: optimizer=muon",)},
            r"sets optimizer=muon for model\.layers\.0\.input_layernorm\.weight of shape \[512\], but Muon updates",
        ),
    ],
)
def test_settings_of_optimizers_that_contradict_each_other(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**settings)


def test_a_group_with_muon_makes_its_settings_effective():
    TrainingConfig(param_groups=("*q_proj*: optimizer=muon",), muon_steps=3)
