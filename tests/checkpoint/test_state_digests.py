"""Digests of checkpoints: independent of files, of the manifest's format, and of how they are obtained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blake3 import blake3
from torch import nn

from tests.helpers.training import in_older_format
from tinytrain_dist import CheckpointError
from tinytrain_dist.checkpoint.sharded_io import write_checkpoint
from tinytrain_dist.checkpoint.state_collection import collect_shards
from tinytrain_dist.checkpoint.state_digests import state_digest, tensor_digest, tensor_entries


def write(path: Path, max_shard_bytes: int) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.state[model[0].weight]["count"] = 3
    shards, values = collect_shards(model, optimizer, max_shard_bytes)
    write_checkpoint(path, shards, {"step": 1, "optimizer": values}, max_shard_bytes=max_shard_bytes)
    return path


def test_a_digest_is_of_the_values_in_their_order() -> None:
    value = torch.arange(6, dtype=torch.float32).view(2, 3)
    assert tensor_digest(value) == blake3(value.numpy().tobytes()).hexdigest()
    assert tensor_digest(value.T) == tensor_digest(value.T.contiguous()) != tensor_digest(value)


def test_digests_depend_neither_on_files_nor_on_the_format(tmp_path: Path) -> None:
    whole, split, older = (write(tmp_path / name, size) for name, size in (("a", 10**6), ("b", 64), ("c", 10**6)))
    in_older_format(older, 2)
    expected = tensor_entries(whole)
    assert expected["optimizer"]["0.weight.count"] == [[], "value", "3"]
    assert expected["model"]["0.weight"][:2] == [[4, 4], "F32"]
    for entries in (tensor_entries(whole, recompute=True), tensor_entries(split), tensor_entries(older)):
        assert entries == expected
    assert state_digest(expected["model"]) == state_digest(dict(reversed(expected["model"].items())))


def test_an_older_manifest_is_compared_with_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a", 10**6)
    in_older_format(path, 1)
    file = path / "model-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is not what manifest\.json says"):
        tensor_entries(path)
