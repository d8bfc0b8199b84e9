"""Starting from the weights of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.models import KINDS, random_model
from tinytrain_dist import CheckpointError, ConfigError, TransformerLM
from tinytrain_dist.checkpoint.hf_import import init_from_hf_folder
from tinytrain_dist.model.hf_config import to_hf_config


def hf_folder(path: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    weights = {name: value.detach().clone() for name, value in random_model(KINDS[kind]).named_parameters()}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(to_hf_config(KINDS[kind])))
    return path, weights


def rewrite(path: Path, remove: str = "", **added: torch.Tensor) -> None:
    weights = load_file(path / "model.safetensors") | {name.replace("__", "."): value for name, value in added.items()}
    weights.pop(remove, None)
    save_file(weights, path / "model.safetensors")


@pytest.mark.parametrize("kind", ["gqa", "tied", "qwen3"])
def test_the_weights_are_those_of_the_folder(tmp_path: Path, kind: str) -> None:
    folder, weights = hf_folder(tmp_path, kind)
    model = TransformerLM(KINDS[kind])
    init_from_hf_folder(folder, model, KINDS[kind])
    for name, param in model.named_parameters():
        assert torch.equal(param, weights[name]), name


def test_what_does_not_fit_is_named_before_anything_changes(tmp_path: Path) -> None:
    folder, _ = hf_folder(tmp_path, "plain")
    missing = "model.layers.0.input_layernorm.weight"
    rewrite(folder, remove=missing, model__norm__weight=torch.ones(7), bias=torch.ones(1))
    model = TransformerLM(KINDS["plain"])
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    with pytest.raises(CheckpointError) as caught:
        init_from_hf_folder(folder, model, KINDS["plain"])
    message = str(caught.value)
    assert message.startswith(f"init_from = {folder}: does not fit")
    assert f"{missing}: is missing" in message
    assert "model.norm.weight: is [7] in the folder, but [32] in this model" in message
    assert "bias: is not a weight of this model" in message
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_a_tied_head_and_rotary_tables_are_ignored(tmp_path: Path) -> None:
    folder, _ = hf_folder(tmp_path, "tied")
    rewrite(folder, model__rotary_emb__inv_freq=torch.ones(3), lm_head__weight=torch.ones(67, 32))
    init_from_hf_folder(folder, TransformerLM(KINDS["tied"]), KINDS["tied"])
    untied = dataclasses.replace(KINDS["tied"], tie_embeddings=False)
    with pytest.raises(ConfigError, match="tie_embeddings"):
        init_from_hf_folder(folder, TransformerLM(untied), untied)
