"""Starting from the weights of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.models import KINDS, random_model, some_ids
from tinytrain_dist import CheckpointError, ConfigError, TransformerLM
from tinytrain_dist.checkpoint.huggingface_import import init_from_hf_folder
from tinytrain_dist.model.huggingface_config import to_hf_config

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test uses the network


def hf_folder(path: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    weights = {name: value.detach().clone() for name, value in random_model(KINDS[kind]).named_parameters()}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(to_hf_config(KINDS[kind])))
    return path, weights


def rewrite(path: Path, remove: str = "", **added: torch.Tensor) -> None:
    weights = load_file(path / "model.safetensors") | {name.replace("__", "."): value for name, value in added.items()}
    weights.pop(remove, None)
    save_file(weights, path / "model.safetensors")


def change_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


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


def test_a_copy_of_the_embedding_and_rotary_tables_are_redundant(tmp_path: Path) -> None:
    folder, weights = hf_folder(tmp_path, "tied")
    tables = {"model__rotary_emb__inv_freq": torch.ones(3), "model__layers__1__self_attn__rotary_emb__inv_freq": ONE}
    rewrite(folder, lm_head__weight=weights["model.embed_tokens.weight"].clone(), **tables)
    init_from_hf_folder(folder, TransformerLM(KINDS["tied"]), KINDS["tied"])
    untied = dataclasses.replace(KINDS["tied"], tie_embeddings=False)
    with pytest.raises(ConfigError, match="tie_embeddings"):
        init_from_hf_folder(folder, TransformerLM(untied), untied)


def complaint(folder: Path, kind: str, **part: int) -> str:
    """What a CheckpointError says of the folder; empty if its weights are taken."""
    try:
        init_from_hf_folder(folder, TransformerLM(KINDS[kind]), KINDS[kind], **part)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_head_that_config_json_ties_to_another_embedding_is_refused(tmp_path: Path) -> None:
    folder, weights = hf_folder(tmp_path, "tied")
    head = weights["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1  # only the last part of the rows differs
    rewrite(folder, lm_head__weight=head)
    assert "lm_head.weight: is not equal to model.embed_tokens.weight" in complaint(folder, "tied")
    assert [bool(complaint(folder, "tied", part=part, parts=3)) for part in range(3)] == [False, False, True]
    rewrite(folder, lm_head__weight=head[:5])
    assert "lm_head.weight: is not equal to model.embed_tokens.weight" in complaint(folder, "tied")

    # the advice, followed to the letter: both are used
    rewrite(folder, lm_head__weight=head)
    change_config(folder, tie_word_embeddings=False)
    untied = dataclasses.replace(KINDS["tied"], tie_embeddings=False)
    model = TransformerLM(untied)
    init_from_hf_folder(folder, model, untied)
    assert torch.equal(model.lm_head.weight, head)


def test_a_head_that_config_json_promises_and_that_is_missing_is_refused(tmp_path: Path) -> None:
    folder, _ = hf_folder(tmp_path, "plain")
    rewrite(folder, remove="lm_head.weight")
    assert "lm_head.weight: is missing, although config.json says that it is not tied" in complaint(folder, "plain")
    change_config(folder, tie_word_embeddings=True)
    tied = dataclasses.replace(KINDS["plain"], tie_embeddings=True)
    init_from_hf_folder(folder, TransformerLM(tied), tied)


ONE = torch.ones(1)
UNUSED: dict[str, dict[str, torch.Tensor]] = {
    "model.layers.0.self_attn.q_proj.bias": {"model__layers__0__self_attn__q_proj__bias": ONE},
    "model.layers.0.rotary_proj.weight": {"model__layers__0__rotary_proj__weight": ONE},
    "model.layers.2.mlp.up_proj.weight": {"model__layers__2__mlp__up_proj__weight": ONE},
    "model.norm.weight: is I8": {"model__norm__weight": torch.ones(32, dtype=torch.int8)},
}


@pytest.mark.parametrize("named", UNUSED)
def test_a_tensor_that_the_model_has_no_place_for_is_refused(tmp_path: Path, named: str) -> None:
    folder, _ = hf_folder(tmp_path, "plain")
    rewrite(folder, **UNUSED[named])
    assert named in complaint(folder, "plain")


def test_weights_that_the_index_does_not_name_are_refused(tmp_path: Path) -> None:
    folder, weights = hf_folder(tmp_path, "plain")
    first = "model-00001-of-00001.safetensors"
    save_file(weights, folder / first)
    index = {"weight_map": dict.fromkeys(weights, first)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors: holds weights that are not used" in complaint(folder, "plain")
    (folder / "model.safetensors").unlink()
    assert complaint(folder, "plain") == ""
    save_file({"model.x": ONE}, folder / "optimizer-00001-of-00001.safetensors")  # as in a checkpoint of a run
    assert complaint(folder, "plain") == ""
    save_file({**weights, "model.extra.weight": ONE}, folder / first)
    assert f"model.extra.weight: is in {first}, but model.safetensors.index.json does not" in complaint(folder, "plain")
    save_file(weights, folder / first)
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json: an adapter is not used" in complaint(folder, "plain")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["one file", "several files", "bfloat16"])
def test_logits_are_those_of_the_model_that_transformers_saved(tmp_path: Path, kind: str, form: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = KINDS[kind]
    folder, _ = hf_folder(tmp_path, kind)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(folder, dtype="bfloat16" if form == "bfloat16" else "float32")
    theirs.save_pretrained(folder / "theirs", max_shard_size="20KB" if form == "several files" else "1GB")
    assert (folder / "theirs" / "model.safetensors.index.json").exists() == (form == "several files")
    ours = TransformerLM(config)
    init_from_hf_folder(folder / "theirs", ours, config)
    ids = some_ids(config)
    expected = load(folder / "theirs", dtype="float32", attn_implementation="eager")(ids).logits
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-4)
