"""Which ranks are named when replicas of a shard differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tinytrain_dist.parallel.replica_check import _deviating_ranks


@pytest.mark.parametrize(
    ("digests", "expected"),
    [
        ([(0, "a"), (1, "b"), (0, "a"), (1, "b")], ([], 0, True)),
        ([(0, "a"), (0, "x"), (0, "a")], ([1], 0, True)),
        ([(0, "x"), (0, "a"), (0, "a")], ([0], 1, True)),
        ([(0, "a"), (1, "b"), (0, "a"), (1, "x")], ([3], 1, False)),
        ([(0, "a"), (0, "b"), (0, "c"), (0, "d")], ([1, 2, 3], 0, False)),
        ([(0, "a"), (0, "b"), (0, "b"), (0, "c"), (0, "c")], ([1, 2, 3, 4], 0, False)),
    ],
)
def test_the_minority_is_named_and_without_one_the_lowest_rank_counts_as_right(
    digests: list[tuple[int, str]], expected: Any
) -> None:
    assert _deviating_ranks(digests) == expected


def differ_on_rank_two() -> str:
    """On one of three replicas: the error after one bit of one tensor has flipped on rank 2."""
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.parallel_dims import ParallelDims
    from tinytrain_dist.errors import ReplicaMismatchError
    from tinytrain_dist.parallel.replica_check import check_replicas

    context = init_distributed("cpu").with_mesh(ParallelDims("ddp", 3, 1, ""))
    tensors = {"first": torch.ones(3), "second": torch.ones(3)}
    check_replicas(tensors.items(), context)
    if context.rank == 2:
        tensors["second"].view(torch.int32)[1] ^= 1
    try:
        check_replicas(tensors.items(), context)
    except ReplicaMismatchError as error:
        return str(error)
    return "no error"


@pytest.mark.multiprocess
def test_one_flipped_bit_is_found_on_all_ranks() -> None:
    for message in run_ranks(3, differ_on_rank_two):
        assert message.startswith("replicas differ: second on rank 2 (")
        assert "has other bits than on rank 0 (" in message
        assert "resume from the last checkpoint" in message
