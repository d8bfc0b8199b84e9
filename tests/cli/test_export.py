"""`tinytrain export`: transformers computes the same logits from the exported folder, or nothing is exported."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tools import TEXT, Cli, flip_bit, newest, weights_file
from tests.helpers.training import TINY
from tinytrain_dist import TrainingConfig, TransformerLM
from tinytrain_dist.checkpoint.sharded_io import write_checkpoint
from tinytrain_dist.checkpoint.state_collection import collect_shards
from tinytrain_dist.cli import sample
from tinytrain_dist.model.huggingface_config import to_hf_config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_loads_what_is_exported(tinytrain: Cli, folder: Path, tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "exported"
    code, text, _ = tinytrain("export", folder / "one", out, "--dtype", dtype)
    assert code == 0
    assert float(re.search(r"largest difference ([^\s;]+)", text)[1]) < 1e-4  # type: ignore[index]
    assert ("rounding to" in text) == (dtype != "float32")
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == (dtype, dtype)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in theirs.parameters()} == {getattr(torch, dtype)}
    assert transformers.AutoTokenizer.from_pretrained(out).encode(TEXT) == sample.load_tokenizer(out).encode(TEXT).ids
    names = {path.name for path in out.iterdir()}
    assert not any("optimizer" in name or "trainer" in name for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    assert tinytrain("verify", out)[0] == 0


def test_export_never_replaces(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    code, _, err = tinytrain("export", folder / "one", tmp_path / "mine")
    assert code == 2
    assert "exists already and is not replaced" in err
    assert (tmp_path / "mine").read_text() == "precious"
    code, _, err = tinytrain("export", folder / "one", tmp_path / "mine" / "below")
    assert code == 2
    assert "cannot be written" in err


def test_export_holds_every_tensor_against_the_manifest(tinytrain: Cli, run: Path, tmp_path: Path) -> None:
    flip_bit(weights_file(newest(run)))
    code, _, err = tinytrain("export", run, tmp_path / "out")
    assert code == 2
    assert "is not what was saved" in err
    assert not list(tmp_path.glob("out*")), "nothing is left behind"


def config_with(**overrides: Any) -> TrainingConfig:
    return TrainingConfig(**{**TINY, "vocab_size": 53, **overrides})


def written(folder: Path, model: TransformerLM, step: int, **config: Any) -> Path:
    description = {**to_hf_config(model.config), **config}
    path = folder / f"checkpoint-{step:08d}"
    files = {"config.json": json.dumps(description).encode()}
    write_checkpoint(path, collect_shards(model, None)[0], {"step": step, "config": model.config.to_dict()}, files)
    return path


def test_an_untrained_model_is_not_exported_by_accident(tinytrain: Cli, tmp_path: Path) -> None:
    path = written(tmp_path, TransformerLM(config_with()), 0)
    code, _, err = tinytrain("export", path, tmp_path / "out")
    assert code == 2
    assert "--allow-untrained" in err
    assert tinytrain("export", path, tmp_path / "out", "--allow-untrained")[0] == 0


@pytest.mark.parametrize("overrides", [{"tie_embeddings": True}, {"qk_norm": True}])
def test_other_architectures_are_exported(tinytrain: Cli, tmp_path: Path, overrides: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    path = written(tmp_path, TransformerLM(config_with(**overrides)), 1)
    code, text, _ = tinytrain("export", path, tmp_path / "out")
    assert code == 0
    assert "computes the same logits" in text


def test_nothing_is_exported_that_transformers_computes_otherwise(tinytrain: Cli, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = written(tmp_path, TransformerLM(config_with()), 1, rms_norm_eps=1.0)
    code, _, err = tinytrain("export", path, tmp_path / "out")
    assert code == 2
    assert "computes logits that differ by up to" in err
    assert not list(tmp_path.glob("out*"))
    code, text, _ = tinytrain("export", path, tmp_path / "out", "--no-check")
    assert code == 0
    assert "not checked" in text
    path = written(tmp_path, TransformerLM(config_with()), 2, num_attention_heads=3, head_dim=16)
    code, _, err = tinytrain("export", path, tmp_path / "out2")
    assert code == 2
    assert "cannot load its export" in err


def test_values_that_the_type_cannot_hold_are_refused(tinytrain: Cli, tmp_path: Path) -> None:
    model = TransformerLM(config_with())
    model.lm_head.weight.data[0, 0] = 1e6
    path = written(tmp_path, model, 1)
    code, _, err = tinytrain("export", path, tmp_path / "out", "--dtype", "float16")
    assert code == 2
    assert "lm_head.weight reaches 1e+06" in err
    assert not (tmp_path / "out").exists()


def test_export_without_transformers_reports_the_missing_check(
    tinytrain: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, text, _ = tinytrain("export", folder / "one", tmp_path / "out")
    assert code == 0
    assert "not checked against transformers" in text
