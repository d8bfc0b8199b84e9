"""Find the newest snapshot that is complete over the present nodes, and load it, for any number of ranks.

The parts of a snapshot are read by the ranks of the node that holds them. They send to other nodes what is needed
there. Must not know who may use which snapshot: `launches` decides that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinytrain_dist.checkpoint.discovery import read_trainer_state
from tinytrain_dist.checkpoint.safetensors_io import NAME_OF_DTYPE
from tinytrain_dist.checkpoint.snapshots.placement import Placement
from tinytrain_dist.checkpoint.snapshots.slot_files import (
    Key,
    Piece,
    SnapshotRecord,
    find_damage,
    open_data,
    read_records,
)
from tinytrain_dist.checkpoint.state_collection import ShardsByKind
from tinytrain_dist.distributed.byte_messages import exchange_bytes
from tinytrain_dist.distributed.collectives import Group, all_gather_object, run_on_all_ranks
from tinytrain_dist.distributed.shard_transfer import TensorShard


@dataclass(frozen=True)
class Part:
    """One rank's part of a snapshot, in the shared memory of a node. reader: the rank of that node that reads it."""

    folder: str
    record: SnapshotRecord
    reader: int


@dataclass(frozen=True)
class Copy:
    """Bytes that a rank needs of one tensor. start: in the data of the part; target: in the rows that it needs."""

    part: Part
    start: int
    target: int
    nbytes: int


Rows = tuple[int, int]  # first row, number of rows


class SnapshotReader:
    """The snapshots that the present nodes hold. All methods are collectives."""

    def __init__(self, shards: ShardsByKind, placement: Placement, group: Group | None) -> None:
        """shards: what this rank loads. group: for its messages."""
        self._wanted = [(kind, shard) for kind, shards_of_kind in shards.items() for shard in shards_of_kind]
        self._placement = placement
        self._group = group
        self._rows_by_rank: list[list[Rows]] = []  # that each rank needs, in the order of _wanted
        self._parts: list[Part] = []

    def find(self, accept: Callable[[Key], bool], report: Callable[[str], None]) -> Iterator[Key]:
        """Yield the snapshots that are complete and undamaged, the newest first. accept: the same on every rank.

        report: called with a sentence about each part that is damaged, on the rank that has read it.
        """
        place = self._placement
        own = []
        with contextlib.suppress(OSError):
            own = list(read_records(Path(place.places[place.rank].folder)))[place.local_index :: len(place.neighbours)]
        parts = [Part(str(folder), record, place.rank) for folder, record in own if accept(record.key)]
        found = [part for parts_of_rank in all_gather_object(parts, self._group) for part in parts_of_rank]
        rows = [(shard.first_row, _row_count(shard)) for _, shard in self._wanted]
        self._rows_by_rank = all_gather_object(rows, self._group) if found else []
        for key in sorted({part.record.key for part in found}, reverse=True):
            self._parts = [part for part in found if part.record.key == key]
            if self._is_complete():
                self._remove_damaged(report)
                if self._is_complete():
                    yield key

    def _remove_damaged(self, report: Callable[[str], None]) -> None:
        """Read all parts, and forget the damaged ones."""
        damaged = []
        for part in self._parts:
            if part.reader == self._placement.rank and (problem := find_damage(Path(part.folder), part.record)):
                report(f"snapshot of step {part.record.step}: {problem}; this part is not used")
                damaged.append((part.reader, part.folder))
        all_damaged = {entry for entries in all_gather_object(damaged, self._group) for entry in entries}
        self._parts = [part for part in self._parts if (part.reader, part.folder) not in all_damaged]

    def _is_complete(self) -> bool:
        """Return whether the parts hold all rows of all tensors, and tensors of these shapes and types. No messages."""
        wanted = {(kind, shard.name): (shard.shape, NAME_OF_DTYPE[shard.dtype]) for kind, shard in self._wanted}
        pieces = self._pieces()
        if any(wanted.get(name) != (held[0][1].shape, held[0][1].dtype) for name, held in pieces.items()):
            return False
        for (kind, name), (shape, _) in wanted.items():
            end = 0
            for _, piece in sorted(pieces.get((kind, name), []), key=lambda held: held[1].first_row):
                if piece.first_row > end:
                    return False
                end = max(end, piece.first_row + piece.rows)
            if end < (shape[0] if shape else 1) and 0 not in shape:
                return False
        return bool(self._parts)

    def _pieces(self) -> dict[tuple[str, str], list[tuple[Part, Piece]]]:
        """Return the pieces of each tensor with their parts, by kind and name."""
        pieces: dict[tuple[str, str], list[tuple[Part, Piece]]] = {}
        for part in self._parts:
            for piece in part.record.pieces:
                pieces.setdefault((piece.kind, piece.name), []).append((part, piece))
        return pieces

    def read_state(self) -> dict[str, Any]:
        """Return trainer_state.json of the snapshot that `find` has yielded last. Errors: as `read_trainer_state`."""
        first = self._parts[0]

        def read() -> dict[str, Any]:
            return read_trainer_state(Path(first.folder)) if first.reader == self._placement.rank else {}

        state: dict[str, Any] = all_gather_object(run_on_all_ranks(read, self._group), self._group)[first.reader]
        return state

    @torch.no_grad()
    def load(self) -> None:
        """Load the snapshot that `find` has yielded last."""
        pieces = self._pieces()
        data: dict[str, Tensor] = {}

        def read(copy: Copy) -> Tensor:
            if copy.part.folder not in data:
                data[copy.part.folder] = open_data(Path(copy.part.folder))
            return data[copy.part.folder][copy.start : copy.start + copy.nbytes]

        rank, places = self._placement.rank, self._placement.node_of_rank
        for index, (kind, shard) in enumerate(self._wanted):
            buffer = torch.empty(shard.local_rows.nbytes, dtype=torch.uint8)
            sent: list[tuple[int, Tensor]] = []
            received: list[tuple[int, Tensor]] = []
            for receiver, rows_of_rank in enumerate(self._rows_by_rank):
                held = pieces.get((kind, shard.name), [])
                for copy in plan_copies(rows_of_rank[index], held, receiver, index, places):
                    is_local = places[copy.part.reader] == places[receiver]
                    if receiver == rank:
                        target = buffer[copy.target : copy.target + copy.nbytes]
                        if is_local:
                            target.copy_(read(copy))
                        else:
                            received.append((copy.part.reader, target))
                    elif copy.part.reader == rank and not is_local:
                        sent.append((receiver, read(copy)))
            exchange_bytes(sent, received, self._group)
            if buffer.numel():
                shard.local_rows.copy_(buffer.view(shard.dtype).view(shard.local_rows.shape))


def plan_copies(
    rows: Rows, held: Sequence[tuple[Part, Piece]], receiver: int, index: int, node_of_rank: dict[int, int]
) -> Iterator[Copy]:
    """Yield where a rank gets its rows of one tensor: from its own node if possible, else from each holder in turn.

    index: of the tensor, to divide the work. Every rank computes the same.
    """
    first_row, count = rows
    row, end = first_row, first_row + count
    while row < end:
        here = [(part, piece) for part, piece in held if piece.first_row <= row < piece.first_row + piece.rows]
        near = [entry for entry in here if node_of_rank[entry[0].reader] == node_of_rank[receiver]]
        choices = near or here
        part, piece = choices[(receiver + index) % len(choices)]
        stop = min(end, piece.first_row + piece.rows)
        size = piece.row_bytes
        yield Copy(part, piece.offset + (row - piece.first_row) * size, (row - first_row) * size, (stop - row) * size)
        row = stop


def _row_count(shard: TensorShard) -> int:
    rows = shard.local_rows
    if not rows.numel():
        return 0
    return rows.shape[0] if rows.ndim else 1
