"""What of a model and an optimizer is saved, and by which rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tinytrain_dist import CheckpointError
from tinytrain_dist.checkpoint.state_collection import collect_shards, model_tensors, optimizer_tensors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.full((2,), float("-inf")))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def test_tied_weights_are_saved_once_and_buffers_only_if_they_are_persistent() -> None:
    model = Tied()
    assert list(model_tensors(model)) == ["mask", "embed.weight"]
    assert model_tensors(model)["embed.weight"] is model.embed.weight


def test_the_optimizers_state_is_tensors_and_plain_values() -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5), momentum=0.9)
    model.head.weight.sum().backward()
    optimizer.step()
    optimizer.state[model.embed.weight]["count"] = 3
    tensors, values = optimizer_tensors(model, optimizer)
    assert list(tensors) == ["embed.weight.momentum_buffer"]
    assert values["state"] == {"embed.weight.count": 3}
    (group,) = values["param_groups"]
    assert group["params"] == ["embed.weight"]
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)


def test_files_are_assigned_to_the_writers_in_turn() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(4)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    shards, _ = collect_shards(model, optimizer, max_shard_bytes=128, writers=3)  # two tensors in a file
    assert [shard.writer for shard in shards["model"]] == [0, 0, 1, 1]
    assert [shard.writer for shard in shards["optimizer"]] == [2, 2, 0, 0], "the turns continue over the kinds"


def test_only_buffers_may_hold_values_that_are_not_finite() -> None:
    shards, values = collect_shards(Tied(), None)
    assert {shard.name: shard.must_be_finite for shard in shards["model"]} == {"mask": False, "embed.weight": True}
    assert values == {}


def test_a_type_that_cannot_be_saved_is_named() -> None:
    model = nn.Module()
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(CheckpointError, match=r"phase: is torch\.complex64, which cannot be saved"):
        collect_shards(model, None)
