"""Check the position of a rank on the mesh, and the decisions and values that ranks exchange."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.parallel_dims import ParallelDims


def test_a_rank_knows_its_replica_and_shard() -> None:
    context = DistributedContext(5, 1, 6, 2, "node", torch.device("cpu"))
    assert (context.replica, context.shard) == (0, 0), "there is no mesh yet"
    context = replace(context, parallel_dims=ParallelDims("hsdp", 3, 2, ""))
    assert (context.replica, context.shard) == (2, 1)


def test_ranks_that_share_sequences_follow_one_another() -> None:
    context = DistributedContext(7, 3, 12, 4, "node", torch.device("cpu"))
    assert context.data_coordinates == (0, 0, 0), "there is no mesh yet"
    sharded = replace(context, parallel_dims=ParallelDims("hsdp", 2, 3, "", cp=2))
    assert sharded.data_coordinates == (1, 0, 1)
    assert (sharded.replica, sharded.shard) == (1, 1), "the weights are divided into 6 shards"
    replicated = replace(context, parallel_dims=ParallelDims("ddp", 6, 1, "", cp=2))
    assert replicated.data_coordinates == (3, 0, 1)
    assert (replicated.replica, replicated.shard) == (7, 0)


def talk() -> dict[str, Any]:
    """On a rank: call every method that communicates."""
    from tinytrain_dist.distributed.context import init_distributed

    context = init_distributed("cpu").with_mesh(ParallelDims("hsdp", 2, 2, ""))
    own = torch.tensor([float(context.rank)])
    return {
        "launch_id": context.launch_id,
        "all": context.all_reduce_sum(own.clone()).item(),
        "along shards": context.all_reduce_sum(own.clone(), "dp_shard").item(),
        "along replicas": context.all_reduce_sum(own.clone(), "dp_replicate").item(),
        "numbers": context.all_gather_numbers([context.rank, 0.5]),
        "broadcast": context.broadcast_object({"rank": context.rank}),
        "exchanged": context.exchange(own, context.rank ^ 1).item(),
        "votes": [context.any_rank(context.rank == 3), context.any_rank(False)],
        "cpu mesh": context.on_cpu().group("dp_shard") is context.group("dp_shard"),
    }


@pytest.mark.multiprocess
def test_ranks_communicate_along_the_axes_of_the_mesh() -> None:
    results = run_ranks(4, talk)
    assert len({result["launch_id"] for result in results}) == 1
    assert results[0]["launch_id"]
    for rank, result in enumerate(results):
        assert result["all"] == 0 + 1 + 2 + 3
        assert result["along shards"] == (0 + 1 if rank < 2 else 2 + 3)
        assert result["along replicas"] == (0 + 2 if rank % 2 == 0 else 1 + 3)
        assert result["numbers"] == [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5], [3.0, 0.5]]
        assert result["broadcast"] == {"rank": 0}
        assert result["exchanged"] == rank ^ 1
        assert result["votes"] == [True, False]
        assert result["cpu mesh"]
