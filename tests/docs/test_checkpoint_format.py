"""Run the reader and the verifier of checkpoint_format.md, which do without the package, on real checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.tools import flip_bit, newest, weights_file
from tests.helpers.training import in_older_format
from tinytrain_dist import save_checkpoint
from tinytrain_dist.checkpoint.manifest import FORMAT, READABLE_FORMATS
from tinytrain_dist.checkpoint.safetensors_io import DTYPE_OF_NAME, TensorReader
from tinytrain_dist.config.run_folder import DAMAGED_SUFFIX, DIVERGED_SUFFIX, TEMPORARY_SUFFIX

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "checkpoint_format.md").read_text(encoding="utf-8")


def examples() -> dict[str, Any]:
    """Return what the programs on the page define."""
    programs = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    defined: dict[str, Any] = {}
    for program in programs:
        assert not re.search(r"import (torch|tinytrain|safetensors)|from (torch|tinytrain|safetensors)", program)
        exec(program, defined)
    return defined


def assert_same_tensors(read: dict[str, Any], checkpoint: Path, kind: str) -> None:
    reader = TensorReader(checkpoint, kind)
    assert list(read) == list(reader.files)
    for name, values in read.items():
        expected = reader.read(name)
        assert values.shape == tuple(expected.shape)
        np.testing.assert_array_equal(values, expected.float() if expected.dtype == torch.bfloat16 else expected)


@pytest.mark.multiprocess
def test_the_reader_reads_the_checkpoint_of_a_run(text_runs: Path) -> None:
    checkpoint = newest(text_runs / "split")
    assert len(list(checkpoint.glob("model-*"))) > 1, "the reader must follow the index"
    weights, optimizer, state = examples()["read_checkpoint"](checkpoint)
    assert_same_tensors(weights, checkpoint, "model")
    assert_same_tensors(optimizer, checkpoint, "optimizer")
    assert state["step"] == 6
    assert {key for key in state if f"\n| `{key}` |" not in PAGE} == set()
    for parameter, values in weights.items():
        assert optimizer[f"{parameter}.exp_avg"].shape == values.shape
        pattern = re.sub(r"\.\d+\.", ".I.", parameter)
        last = pattern.rpartition("self_attn.")[2].rpartition("mlp.")[2]
        assert f"`{pattern}`" in PAGE or f"`...{last}`" in PAGE, f"{pattern} is not in the table of names"


def test_the_reader_reads_every_type(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    for name, dtype in DTYPE_OF_NAME.items():
        assert f"`{name}`" in PAGE
        model.register_buffer(name, torch.tensor([[1, 0, 2], [3, 5, 7]]).to(dtype))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    save_checkpoint(model, optimizer, 1, tmp_path / "own")
    weights, momentum, state = examples()["read_checkpoint"](tmp_path / "own")
    assert_same_tensors(weights, tmp_path / "own", "model")
    assert_same_tensors(momentum, tmp_path / "own", "optimizer")
    assert set(state) == {"step", "optimizer"}


@pytest.mark.multiprocess
def test_the_verifier_finds_each_damaged_file(text_runs: Path, tmp_path: Path) -> None:
    find_damage = examples()["find_damage"]
    checkpoint = tmp_path / "checkpoint-00000006"
    shutil.copytree(newest(text_runs / "split"), checkpoint)
    assert find_damage(checkpoint) == []
    damaged = {weights_file(checkpoint).name, "trainer_state.json"}
    for name in damaged:
        flip_bit(checkpoint / name, back=5)
    assert set(find_damage(checkpoint)) == damaged
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"bytes": ', '"bytes": 1', 1), encoding="utf-8")
    assert find_damage(checkpoint) == ["manifest.json"]


@pytest.mark.multiprocess
def test_the_page_has_all_keys_of_a_manifest(text_runs: Path, tmp_path: Path) -> None:
    assert FORMAT == 3
    assert READABLE_FORMATS == (1, 2, 3), "describe the new format, and how to read the older ones"
    checkpoint = tmp_path / "checkpoint-00000006"
    shutil.copytree(newest(text_runs / "one"), checkpoint)
    for number in (3, 2):
        if number == 2:
            in_older_format(checkpoint, number)
        content = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        entries = [content, *content["files"].values(), *content["tensors"]["model"].values()]
        assert {key for entry in entries for key in entry if f"`{key}`" not in PAGE} == set()


def test_the_page_has_the_suffixes_of_the_package() -> None:
    for suffix in (TEMPORARY_SUFFIX, DAMAGED_SUFFIX, DIVERGED_SUFFIX):
        assert f"| `{suffix}`" in PAGE
