"""Decide which rank keeps which rows in the shared memory of its node, and which node gets a second copy.

Ranks of one node that hold the same rows share the work: each row is kept once per node. A second copy goes to the next
node, unless another node holds the same rows anyway. Every rank computes the same from the same list of places. Must
not know files, and sends no messages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tinytrain_dist.checkpoint.async_save import padded
from tinytrain_dist.checkpoint.safetensors_io import NAME_OF_DTYPE
from tinytrain_dist.checkpoint.snapshots.slot_files import Piece
from tinytrain_dist.checkpoint.state_collection import ShardsByKind
from tinytrain_dist.distributed.shard_transfer import TensorShard


@dataclass(frozen=True)
class Place:
    """Where a rank runs. folder: in the shared memory of its node; ranks with the same host and folder share it."""

    host: str
    folder: str
    shard: int  # index of its shard within a replica


class Placement:
    """The nodes of a launch, and the duties of one rank among them."""

    def __init__(self, places: list[Place], rank: int) -> None:
        """places: of all ranks, by rank. rank: this one."""
        by_node: dict[tuple[str, str], list[int]] = {}
        for other, place in enumerate(places):
            by_node.setdefault((place.host, place.folder), []).append(other)
        self.nodes = list(by_node.values())  # the ranks of each node, in the order of their lowest ranks
        self.node_of_rank = {other: node for node, ranks in enumerate(self.nodes) for other in ranks}
        self._nodes_of_shard: dict[int, set[int]] = {}
        for other, place in enumerate(places):
            self._nodes_of_shard.setdefault(place.shard, set()).add(self.node_of_rank[other])
        self.places = places
        self.rank = rank

    @property
    def neighbours(self) -> list[int]:
        """The ranks of this rank's node, itself included."""
        return self.nodes[self.node_of_rank[self.rank]]

    @property
    def local_index(self) -> int:
        """The index of this rank among those of its node."""
        return self.neighbours.index(self.rank)

    def partner(self, rank: int) -> int | None:
        """Return the rank that gets a second copy of what `rank` keeps; None if other nodes hold the same rows."""
        if len(self._nodes_of_shard[self.places[rank].shard]) > 1 or len(self.nodes) == 1:
            return None
        node = self.node_of_rank[rank]
        partners = self.nodes[(node + 1) % len(self.nodes)]
        return partners[self.nodes[node].index(rank) % len(partners)]

    def shards_per_node(self) -> int:
        """Return how many shards the fullest node keeps, second copies included."""
        kept: dict[int, set[int]] = {node: set() for node in range(len(self.nodes))}
        for rank, place in enumerate(self.places):
            for holder in (rank, self.partner(rank)):
                if holder is not None:
                    kept[self.node_of_rank[holder]].add(place.shard)
        return max(map(len, kept.values()))

    def sources(self) -> list[int]:
        """Return the ranks whose second copies this rank keeps."""
        return [other for other in range(len(self.places)) if self.partner(other) == self.rank]

    def kept(self, shards: ShardsByKind) -> list[tuple[str, TensorShard]]:
        """Return kind and shard of everything, with the rows that this rank keeps as `rows_to_save`, else none."""
        same_rows = [rank for rank in self.neighbours if self.places[rank].shard == self.places[self.rank].shard]
        loads: dict[bool, dict[int, int]] = {
            True: dict.fromkeys(same_rows, 0),
            False: dict.fromkeys(self.neighbours, 0),
        }
        kept = []
        for kind, shards_of_kind in shards.items():
            for shard in shards_of_kind:
                load = loads[len(shard.ranks) > 1]  # whether the tensor is sharded
                keeper = min(load, key=lambda rank: (load[rank], rank))
                load[keeper] += shard.local_rows.nbytes
                rows = shard.local_rows if keeper == self.rank else shard.local_rows.new_empty(0)
                kept.append((kind, replace(shard, rows_to_save=rows)))
        return kept


def pieces_of(kept: Iterable[tuple[str, TensorShard]]) -> tuple[Piece, ...]:
    """Return the pieces of the rows to save, in the order and with the padding of `HostBuffers`."""
    pieces = []
    offset = 0
    for kind, shard in kept:
        rows = shard.rows_to_save
        if rows.numel():
            dtype = NAME_OF_DTYPE[shard.dtype]
            count = rows.shape[0] if rows.ndim else 1
            pieces.append(Piece(kind, shard.name, shard.shape, dtype, shard.first_row, count, offset))
            offset += padded(rows.nbytes)
    return tuple(pieces)
