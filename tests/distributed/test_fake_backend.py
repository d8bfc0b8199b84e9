"""Check collectives that send nothing: in a simulation, and while one rank tries a step alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks


def record_collectives() -> list[tuple[str, int, tuple[int, ...]]]:
    """In one process: return what rank 0 of six ranks, in shard groups of three, would send."""
    from tinytrain_dist.distributed import collectives
    from tinytrain_dist.distributed.fake_backend import NoCommunication, fake_context
    from tinytrain_dist.distributed.parallel_dims import ParallelDims

    sent = []

    class Recorder(NoCommunication):
        def message(self, name: str, tensors: list[Any], ranks: tuple[int, ...]) -> None:
            sent.append((name, sum(tensor.nbytes for tensor in tensors), ranks))

    context = fake_context(6, 3).with_mesh(ParallelDims("hsdp", 2, 3, ""))
    with Recorder():
        context.all_reduce_sum(torch.zeros(5), "dp_shard")
        collectives.all_to_all(torch.zeros(4), torch.zeros(4), context.group("dp_replicate"))
    return sent


@pytest.mark.multiprocess
def test_collectives_are_recorded_with_bytes_and_ranks() -> None:
    (reduced, exchanged) = run_ranks(1, record_collectives)[0]
    assert reduced == ("allreduce_.default", 20, (0, 1, 2))
    assert exchanged[0].startswith("alltoall_base")
    assert exchanged[1:] == (32, (0, 3))


def sum_alone() -> float:
    """On one of two ranks: start a sum in which the other rank takes no part."""
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.fake_backend import NoCommunication

    context = init_distributed("cpu")
    value = torch.ones(1)
    if context.rank == 0:
        with NoCommunication():
            context.all_reduce_sum(value)
    return value.item()


@pytest.mark.multiprocess
def test_no_rank_waits_while_communication_is_disabled() -> None:
    assert run_ranks(2, sum_alone) == [1.0, 1.0]
