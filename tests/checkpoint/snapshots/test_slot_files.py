"""The files of one snapshot of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blake3 import blake3

from tinytrain_dist.checkpoint.snapshots import slot_files
from tinytrain_dist.checkpoint.snapshots.slot_files import Piece, Slot, SnapshotRecord

PIECE = Piece("model", "weight", (6, 2), "F32", 2, 3, 512)


def committed(folder: Path, spare: list[Path] | None = None) -> SnapshotRecord:
    slot = Slot(folder, 1024, spare or [])
    slot.memory[512:536] = torch.arange(24, dtype=torch.uint8)
    pieces = slot_files.with_digests((PIECE,), slot.memory)
    record = SnapshotRecord(7, "launch", 1, pieces, blake3(b"{}").hexdigest())
    slot.commit(record.encode(), b"{}")
    return record


def test_a_snapshot_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = committed(tmp_path / "a")
    assert list(slot_files.read_records(tmp_path)) == [(tmp_path / "a", record)]
    assert slot_files.find_damage(tmp_path / "a", record) == ""
    assert (PIECE.row_bytes, PIECE.nbytes) == (8, 24)


@pytest.mark.parametrize(("file", "position"), [("data", 520), ("trainer_state.json", 1), ("snapshot.json", 40)])
def test_one_changed_byte_is_noticed(tmp_path: Path, file: str, position: int) -> None:
    record = committed(tmp_path / "a")
    content = bytearray((tmp_path / "a" / file).read_bytes())
    content[position] ^= 4
    (tmp_path / "a" / file).write_bytes(content)
    if file == "snapshot.json":
        assert not list(slot_files.read_records(tmp_path))
    else:
        assert "differs" in slot_files.find_damage(tmp_path / "a", record)


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"body": 1, "blake3": ""}', b"\xff", b'{"body": "{}"}'])
def test_what_is_no_record_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        SnapshotRecord.decode(text)


def test_a_slot_that_is_written_is_no_snapshot_and_memory_is_reused(tmp_path: Path) -> None:
    committed(tmp_path / "a")
    node = (tmp_path / "a" / "data").stat().st_ino
    spare = [tmp_path / "a"]
    slot = Slot(tmp_path / "b", 1024, spare)
    assert (spare, list(tmp_path.iterdir())) == ([], [tmp_path / "b"])
    assert (tmp_path / "b" / "data").stat().st_ino == node
    assert not list(slot_files.read_records(tmp_path))
    slot.commit(committed(tmp_path / "c").encode(), b"{}")
    assert len(list(slot_files.read_records(tmp_path))) == 2
    slot.invalidate()
    assert [folder for folder, _ in slot_files.read_records(tmp_path)] == [tmp_path / "c"]
