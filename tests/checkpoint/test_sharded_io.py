"""Check writing and reading one checkpoint folder without a process group; tests/multiprocess uses several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tinytrain_dist import CheckpointError, TrainingError
from tinytrain_dist.checkpoint.manifest import Manifest
from tinytrain_dist.checkpoint.sharded_io import check_same_tensors, read_checkpoint, write_checkpoint
from tinytrain_dist.checkpoint.state_collection import collect_shards
from tinytrain_dist.checkpoint.verify import find_damage


def test_the_model_alone_can_be_written_and_read(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    manifest = Manifest()
    shards, _ = collect_shards(model, None)
    write_checkpoint(tmp_path / "c", shards, {"step": 5}, {"notes.txt": b"hello"}, manifest=manifest)
    assert find_damage(tmp_path / "c") == []
    assert read_checkpoint(tmp_path / "c", other, None) == {"step": 5}
    assert torch.equal(model.weight, other.weight)
    assert (tmp_path / "c" / "notes.txt").read_bytes() == b"hello"
    assert manifest.files_in_progress == [], "everything is on the disk"


@pytest.mark.parametrize("forbidden_call", [1, 2])
def test_a_writer_that_lost_its_permission_does_not_commit(tmp_path: Path, forbidden_call: int) -> None:
    """Permission is checked before the folder is made, and again before the commit."""
    calls = 0

    def permit() -> None:
        nonlocal calls
        calls += 1
        if calls == forbidden_call:
            raise TrainingError("another process has it")

    shards, _ = collect_shards(nn.Linear(3, 2), None)
    with pytest.raises(TrainingError, match="another process has it"):
        write_checkpoint(tmp_path / "c", shards, {"step": 5}, permit=permit)
    assert not (tmp_path / "c").exists()
    assert (tmp_path / "c.tmp").exists() == (forbidden_call == 2), "what another process may own now is not deleted"


def test_a_half_written_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "c.tmp").mkdir()
    (tmp_path / "c.tmp" / "model-00001-of-00001.safetensors").write_text("half")
    write_checkpoint(tmp_path / "c", collect_shards(nn.Linear(3, 2), None)[0], {"step": 5})
    assert find_damage(tmp_path / "c") == []
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_at_most_ten_differences_are_listed(tmp_path: Path) -> None:
    wanted = {f"w{number:02d}": torch.zeros(2) for number in range(13)}
    with pytest.raises(CheckpointError) as caught:
        check_same_tensors(tmp_path, "model", {}, wanted)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  w00: is missing"
    assert lines[-1] == "  and 3 more"
    assert len(lines) == 12
