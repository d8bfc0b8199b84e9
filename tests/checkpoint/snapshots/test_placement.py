"""Which rank keeps which rows, and where a second copy goes."""

from __future__ import annotations

import torch

from tinytrain_dist.checkpoint.snapshots.placement import Place, Placement, pieces_of
from tinytrain_dist.distributed.shard_transfer import TensorShard


def placement(rank: int, *ranks_per_node: int, shards: int = 1) -> Placement:
    nodes = [node for node, count in enumerate(ranks_per_node) for _ in range(count)]
    return Placement([Place(f"host{node}", "shm", other % shards) for other, node in enumerate(nodes)], rank)


def test_a_second_copy_goes_to_the_next_node_only_where_no_other_node_has_the_rows() -> None:
    ddp = placement(0, 2, 2)
    assert [ddp.partner(rank) for rank in range(4)] == [None] * 4
    assert ddp.shards_per_node() == 1
    fsdp = placement(3, 2, 1, 2, shards=5)
    assert [fsdp.partner(rank) for rank in range(5)] == [2, 2, 3, 0, 1]
    assert (fsdp.sources(), placement(2, 2, 1, 2, shards=5).sources()) == ([2], [0, 1])
    assert fsdp.shards_per_node() == 4
    hsdp = placement(0, 2, 2, shards=2)
    assert [hsdp.partner(rank) for rank in range(4)] == [None] * 4
    one_node = placement(0, 4, shards=4)
    assert [one_node.partner(rank) for rank in range(4)] == [None] * 4


def shard(name: str, rows: int, ranks: int = 1) -> TensorShard:
    values = torch.arange(rows * 2, dtype=torch.float32).view(rows, 2)
    return TensorShard(name, (rows * ranks, 2), torch.float32, values, values, tuple(range(ranks)), first_row=0)


def test_ranks_of_a_node_share_equal_rows_and_keep_their_own() -> None:
    shards = {"model": [shard("a", 4), shard("b", 4), shard("c", 8)], "optimizer": [shard("a.m", 3, ranks=2)]}
    by_rank = [pieces_of(placement(rank, 2, shards=2).kept(shards)) for rank in range(2)]
    plain = [[(piece.kind, piece.name) for piece in pieces if piece.kind == "model"] for pieces in by_rank]
    assert sorted(plain[0] + plain[1]) == [("model", "a"), ("model", "b"), ("model", "c")]
    assert all(plain)
    assert all([piece.rows for piece in pieces if piece.name == "a.m"] == [3] for pieces in by_rank)
    on_two_nodes = [pieces_of(placement(rank, 1, 1).kept(shards)) for rank in range(2)]
    assert [len(pieces) for pieces in on_two_nodes] == [4, 4]
