"""save_checkpoint and load_checkpoint for any module and optimizer, without a process group."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tinytrain_dist import AdamW, CheckpointError, load_checkpoint, save_checkpoint
from tinytrain_dist.checkpoint import sharded_io
from tinytrain_dist.checkpoint.state_collection import collect_shards
from tinytrain_dist.checkpoint.verify import find_damage


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(ids)))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "our AdamW": lambda params: AdamW(params, 0.01, (0.8, 0.9), 1e-8, 0.1),
    "torch AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, betas=(0.8, 0.9)),
    "SGD momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.1),
}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for step in range(count):
        optimizer.zero_grad()
        model(torch.tensor([step % 7, 3, 5])).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_to_the_same_bits(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 3)
    save_checkpoint(model, optimizer, 3, tmp_path / "c")
    other = Net()
    fresh = OPTIMIZERS[name](other.parameters())
    for group in fresh.param_groups:
        group["lr"] = 123.0
    assert load_checkpoint(other, fresh, tmp_path / "c") == 3
    assert all(type(group.get("betas", ())) is tuple for group in fresh.param_groups)
    steps(model, optimizer, 2)
    steps(other, fresh, 2)
    for (key, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def saved(tmp_path: Path) -> tuple[nn.Module, torch.optim.Optimizer, Path]:
    model = Net()
    optimizer = OPTIMIZERS["our AdamW"](model.parameters())
    steps(model, optimizer, 1)
    save_checkpoint(model, optimizer, 1, tmp_path / "c")
    return model, optimizer, tmp_path / "c"


def test_existing_path_is_refused_and_left_alone(tmp_path: Path) -> None:
    model, optimizer, path = saved(tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(model, optimizer, 2, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_disk_error_leaves_nothing_behind_and_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, path = saved(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded_io, "write_json_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, optimizer, 2, tmp_path / "d")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert not find_damage(path)


def test_other_model_is_refused_before_anything_changes(tmp_path: Path) -> None:
    _, _, path = saved(tmp_path)
    other = Net()
    other.extra = nn.Parameter(torch.zeros(2))
    other.norm.weight = nn.Parameter(torch.zeros(5))
    optimizer = OPTIMIZERS["our AdamW"](other.parameters())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(other, optimizer, path)
    assert "extra: is missing" in str(caught.value)
    assert "norm.weight: is F32 [4] in the checkpoint, but F32 [5] here" in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    assert not optimizer.state


def test_other_optimizer_groups_are_refused(tmp_path: Path) -> None:
    _, _, path = saved(tmp_path)
    other = Net()
    params = list(other.parameters())
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:]}], 0.1)
    with pytest.raises(CheckpointError, match=r"parameters in its groups, and this one has \[1, "):
        load_checkpoint(other, optimizer, path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_found_before_anything_is_loaded(tmp_path: Path, damage: str) -> None:
    model, optimizer, path = saved(tmp_path)
    before = copy.deepcopy(model.state_dict())
    for file in sorted(path.iterdir()):
        shutil.copytree(path, tmp_path / "copy")
        target = tmp_path / "copy" / file.name
        data = bytearray(target.read_bytes())
        if damage == "flip":
            data[len(data) // 2] ^= 4
            target.write_bytes(data)
        elif damage == "truncate":
            target.write_bytes(data[: len(data) // 2])
        elif damage == "remove":
            target.unlink()
        else:
            (tmp_path / "copy" / "manifest.json").write_text("")
        with pytest.raises(CheckpointError):
            load_checkpoint(model, optimizer, tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    model = Net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    optimizer.state[model.embed.weight]["history"] = [1, 2]
    with pytest.raises(CheckpointError, match=r"embed\.weight\.history: is list"):
        save_checkpoint(model, optimizer, 0, tmp_path / "c")
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match="not the model's"):
        save_checkpoint(model, stranger, 0, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_several_files_hold_the_same_tensors(tmp_path: Path) -> None:
    model, optimizer, path = saved(tmp_path)
    shards, values = collect_shards(model, optimizer)
    state = {"step": 1, "optimizer": values}
    sharded_io.write_checkpoint(tmp_path / "many", shards, state, max_shard_bytes=64)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    tensors = [json.loads((p / "manifest.json").read_text())["tensors"] for p in (path, tmp_path / "many")]
    assert tensors[0] == tensors[1]
    other = Net()
    assert load_checkpoint(other, OPTIMIZERS["our AdamW"](other.parameters()), tmp_path / "many") == 1
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_settings_of_an_optimizer_that_are_not_finite_survive_in_strict_json(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    optimizer.param_groups[0]["clip"] = math.inf
    save_checkpoint(model, optimizer, 1, tmp_path / "c")
    assert (
        "Infinity"
        in json.loads((tmp_path / "c" / "trainer_state.json").read_text())["optimizer"]["param_groups"][0].values()
    )
    optimizer.param_groups[0]["clip"] = 1.0
    load_checkpoint(model, optimizer, tmp_path / "c")
    assert optimizer.param_groups[0]["clip"] == math.inf
