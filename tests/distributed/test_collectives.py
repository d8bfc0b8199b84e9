"""Collectives on real ranks: parts in order, messages that do not mix, errors that reach every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tinytrain_dist.errors import DataError

pytestmark = pytest.mark.multiprocess


def gathers(world_size: int) -> list[Any]:
    from tinytrain_dist.distributed import collectives
    from tinytrain_dist.distributed.context import init_distributed, shutdown

    context = init_distributed("cpu")
    mine = torch.full((2, 3), float(context.rank))
    fresh, inside = torch.empty(world_size * 6), torch.full((world_size * 6,), -1.0)
    collectives.all_gather(fresh, mine, None)
    own = inside[context.rank * 6 : (context.rank + 1) * 6]
    own.fill_(context.rank)
    second = torch.empty(world_size * 6)
    in_flight = [  # two at once do not mix
        collectives.all_gather(inside, None, None, wait=False),
        collectives.all_gather(second, mine + 10, None, wait=False),
    ]
    for work in reversed(in_flight):
        work.wait()
    shutdown()
    return [fresh.tolist(), inside.tolist(), second.tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_gathers_all_parts_in_order(world_size: int) -> None:
    expected = [float(rank) for rank in range(world_size) for _ in range(6)]
    for found in run_ranks(world_size, gathers, world_size):
        assert found == [expected, expected, [value + 10 for value in expected]]


def fail_on_rank_one() -> list[str]:
    from tinytrain_dist.distributed import collectives
    from tinytrain_dist.distributed.context import init_distributed

    context = init_distributed("cpu")

    def action() -> int:
        if context.rank == 1:
            raise DataError("train_data: cannot be read")
        return context.rank

    outcomes = []
    try:
        collectives.run_on_all_ranks(action)
    except DataError as error:
        outcomes.append(str(error))
    outcomes.append(str(collectives.run_on_all_ranks(lambda: context.rank)))
    return outcomes


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    assert run_ranks(3, fail_on_rank_one) == [["train_data: cannot be read", str(rank)] for rank in range(3)]
