"""Check which rows each rank has, and that all shards reach the writing rank in order, in chunks."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tinytrain_dist.distributed.dtensor import shard_rows

CHUNK_BYTES = 24  # two rows of three float32


def test_shards_cover_all_rows_once() -> None:
    assert [shard_rows(5, 4, index) for index in range(4)] == [(0, 2), (2, 4), (4, 5), (5, 5)]


def gather_on_writers(replicas: int, shards: int) -> dict[str, list[float]]:
    """On a rank: the values of every tensor that this rank writes."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.dtensor import shard_range
    from tinytrain_dist.distributed.parallel_dims import ParallelDims
    from tinytrain_dist.distributed.shard_transfer import isend_shards, recv_shards, shard_of, wait_for_sends

    context = init_distributed("cpu").with_mesh(ParallelDims("hsdp", replicas, shards, ""))
    assert context.mesh is not None
    whole = torch.arange(15.0).view(5, 3)
    sharded = distribute_tensor(whole, context.mesh["dp_shard"], [Shard(0)])
    assert shard_range(sharded) == shard_rows(5, shards, context.shard)
    tensors = {"sharded": (sharded, 1), "plain": (whole + 100, 0)}  # the second number is the writer
    pieces = [shard_of(name, tensor, writer) for name, (tensor, writer) in tensors.items()]
    sends = isend_shards(pieces, CHUNK_BYTES)
    received: list[float] = []
    for chunk in recv_shards(pieces, 1, CHUNK_BYTES):
        assert chunk.nbytes <= CHUNK_BYTES
        received += chunk.tolist()
    wait_for_sends(sends)
    return {"received": received}


@pytest.mark.multiprocess
@pytest.mark.parametrize(("replicas", "shards"), [(1, 2), (1, 4), (2, 2)])
def test_writers_receive_whole_tensors_in_order(replicas: int, shards: int) -> None:
    results = [result["received"] for result in run_ranks(replicas * shards, gather_on_writers, replicas, shards)]
    assert results[0] == [100 + float(value) for value in range(15)]
    assert results[1] == [float(value) for value in range(15)]
    assert not any(results[2:])


def shard_over_columns() -> str:
    """On a rank: the error for a tensor that is sharded over dim 1."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.parallel_dims import ParallelDims
    from tinytrain_dist.distributed.shard_transfer import shard_of

    mesh = init_distributed("cpu").with_mesh(ParallelDims("fsdp", 1, 1, "")).mesh
    assert mesh is not None
    with pytest.raises(ValueError, match="weight: only tensors sharded over dim 0 can be saved") as caught:
        shard_of("weight", distribute_tensor(torch.ones(2, 2), mesh["dp_shard"], [Shard(1)]))
    return str(caught.value)


@pytest.mark.multiprocess
def test_another_sharding_is_refused() -> None:
    assert "Shard(dim=1)" in run_ranks(1, shard_over_columns)[0]
