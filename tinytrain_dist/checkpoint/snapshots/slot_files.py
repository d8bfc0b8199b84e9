"""Write and read the files of one snapshot of one rank: a folder in the shared memory of a node.

    SHARED/LAUNCH-00003-a/
        data                  the rows of all tensors that this rank keeps, at the offsets in snapshot.json
        trainer_state.json    as in a checkpoint
        snapshot.json         step, launch, pieces and digests; removed before data changes, and written last

A folder without snapshot.json is no snapshot, and one whose digests do not fit is not used. Must not know ranks, models
or which snapshot is the right one.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from tinytrain_dist.checkpoint.safetensors_io import DTYPE_OF_NAME
from tinytrain_dist.config.run_folder import TRAINER_STATE_FILE
from tinytrain_dist.distributed.dtensor import tensor_bytes
from tinytrain_dist.utils.json_files import parse_json

DATA_FILE = "data"
RECORD_FILE = "snapshot.json"
PAGE_BYTES = mmap.PAGESIZE

Key = tuple[int, str]  # step, launch: all parts of one snapshot have the same


@dataclass(frozen=True)
class Piece:
    """Some rows of one tensor in the data of a slot. shape: of the whole tensor. A scalar has one row."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str  # a name in DTYPE_OF_NAME
    first_row: int
    rows: int
    offset: int
    blake3: str = ""

    @property
    def row_bytes(self) -> int:
        """The size of one row."""
        return math.prod(self.shape[1:]) * DTYPE_OF_NAME[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """The size of the rows."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class SnapshotRecord:
    """The content of snapshot.json. rank: of the launch that took the snapshot."""

    step: int
    launch_id: str
    rank: int
    pieces: tuple[Piece, ...]
    state_blake3: str  # of trainer_state.json

    @property
    def key(self) -> Key:
        """What all parts of one snapshot have in common."""
        return self.step, self.launch_id

    def encode(self) -> bytes:
        """Return the content of the file, with a digest of itself."""
        body = json.dumps(asdict(self))
        return json.dumps({"body": body, "blake3": blake3(body.encode()).hexdigest()}).encode()

    @classmethod
    def decode(cls, text: bytes) -> SnapshotRecord:
        """Return the record that `encode` has written. Errors: ValueError for anything else."""
        try:
            outer = parse_json(text)
            if blake3(outer["body"].encode()).hexdigest() != outer["blake3"]:
                raise ValueError("its digest differs")
            body: dict[str, Any] = parse_json(outer["body"])
            pieces = tuple(Piece(**{**piece, "shape": tuple(piece["shape"])}) for piece in body.pop("pieces"))
            return cls(**body, pieces=pieces)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is no record of a snapshot ({error})") from None


class Slot:
    """The folder of a snapshot that this process writes, with its data in memory: uint8 `memory`."""

    def __init__(self, folder: Path, nbytes: int, spare: list[Path]) -> None:
        """Make the folder and reserve its memory, so that writing to it cannot fail.

        spare: folders of snapshots that are not needed any more. The data of one of them is reused if its size fits,
        because new memory takes time; it is removed from the list. Errors: OSError if there is not enough memory.
        """
        self.folder = folder
        folder.mkdir()
        data = folder / DATA_FILE
        size = data_bytes(nbytes)
        for other in spare:
            with contextlib.suppress(OSError):
                if (other / DATA_FILE).stat().st_size == size:
                    (other / RECORD_FILE).unlink(missing_ok=True)
                    (other / DATA_FILE).rename(data)
                    delete_snapshot(other)
                    spare.remove(other)
                    break
        descriptor = os.open(data, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            # otherwise a full tmpfs kills this process by SIGBUS when it writes
            os.posix_fallocate(descriptor, 0, size)
            # populated, so that the first copy does not wait for page faults
            mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(descriptor)
        self.memory: Tensor = torch.frombuffer(mapped, dtype=torch.uint8, count=size)[:nbytes]

    def invalidate(self) -> None:
        """Declare that the data is about to change. Errors: OSError."""
        (self.folder / RECORD_FILE).unlink(missing_ok=True)

    def commit(self, record: bytes, state: bytes) -> None:
        """Write what belongs to the data, and the record last. Errors: OSError."""
        (self.folder / TRAINER_STATE_FILE).write_bytes(state)
        temporary = self.folder / f"{RECORD_FILE}.tmp"
        temporary.write_bytes(record)
        temporary.rename(self.folder / RECORD_FILE)


def delete_snapshot(folder: Path) -> None:
    """Delete a snapshot, its record first. The memory is free when no process has mapped it any more."""
    with contextlib.suppress(OSError):
        (folder / RECORD_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def data_bytes(nbytes: int) -> int:
    """Return the size of the file for so many bytes: whole pages, at least one."""
    return max(PAGE_BYTES, nbytes + -nbytes % PAGE_BYTES)


def with_digests(pieces: tuple[Piece, ...], memory: Tensor) -> tuple[Piece, ...]:
    """Return the pieces with the digests of their bytes in `memory`, the data of a slot."""
    return tuple(replace(piece, blake3=_digest(piece, memory)) for piece in pieces)


def find_damage(folder: Path, record: SnapshotRecord) -> str:
    """Return "" if the data and the state in a folder are what the record says, else a sentence that says what is not.

    Reads everything.
    """
    try:
        memory = open_data(folder)
        for piece in record.pieces:
            if piece.offset + piece.nbytes > memory.numel():
                return f"{folder}: data is too short for {piece.name}"
            if _digest(piece, memory) != piece.blake3:
                return f"{folder}: the digest of {piece.name} differs"
        if blake3((folder / TRAINER_STATE_FILE).read_bytes()).hexdigest() != record.state_blake3:
            return f"{folder}: the digest of {TRAINER_STATE_FILE} differs"
    except (OSError, ValueError) as error:
        return f"{folder}: cannot be read ({error})"
    return ""


def damaged_piece(pieces: tuple[Piece, ...], memory: Tensor) -> str:
    """Return the name of the first piece whose bytes in `memory` differ from its digest; "" if there is none."""
    return next((piece.name for piece in pieces if _digest(piece, memory) != piece.blake3), "")


def open_data(folder: Path) -> Tensor:
    """Return the data in the folder of a snapshot without copying it: uint8. Errors: OSError."""
    with open(folder / DATA_FILE, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    return torch.frombuffer(mapped, dtype=torch.uint8, count=len(mapped))


def read_records(shared: Path) -> Iterator[tuple[Path, SnapshotRecord]]:
    """Yield the folder and the record of each snapshot in the shared memory of a node, in order of names."""
    for folder in sorted(shared.iterdir()):
        with contextlib.suppress(OSError, ValueError):
            yield folder, SnapshotRecord.decode((folder / RECORD_FILE).read_bytes())


def _digest(piece: Piece, memory: Tensor) -> str:
    return str(blake3(tensor_bytes(memory[piece.offset : piece.offset + piece.nbytes])).hexdigest())
