"""How many ranks a configuration can use, and which ones wait as spares."""

from __future__ import annotations

import os

import pytest

from tests.helpers.training import TINY
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.spares import (
    describe_spares,
    fewest_nodes_problems,
    leave_spares_out,
    usable_ranks,
)


def config(**settings: object) -> TrainingConfig:
    data = {"train_data": "a.npy", "val_data": None, "vocab_size": 53}
    return TrainingConfig(**{**TINY, **data, "parallel": "ddp", **settings})


@pytest.mark.parametrize(
    ("settings", "ranks", "per_node", "usable"),
    [
        ({}, 4, 1, 4),
        ({"batch_size": 8, "micro_batch_size": 4}, 3, 1, 2),
        ({"batch_size": 6, "micro_batch_size": 1}, 4, 1, 3),
        ({"batch_size": 6, "micro_batch_size": 1, "parallel": "fsdp"}, 4, 1, 4),
        ({"parallel": "none"}, 3, 1, 1),
        ({"parallel": "hsdp", "dp_shard": 2, "batch_size": 12}, 7, 2, 6),
        ({"parallel": "hsdp", "dp_shard": 2}, 1, 1, 0),
        ({"cp": 2}, 6, 2, 6),
        ({"cp": 2}, 3, 3, 2),
        ({"cp": 2, "batch_size": 2}, 8, 4, 4),
        ({"cp": 2}, 3, 1, 0),
    ],
)
def test_the_number_of_ranks_that_a_step_needs_to_be_the_shortest(
    settings: dict[str, object], ranks: int, per_node: int, usable: int
) -> None:
    assert usable_ranks(config(**settings), ranks, per_node) == usable


def test_nodes_that_cannot_share_sequences_are_refused() -> None:
    assert fewest_nodes_problems(config(cp=2), 1, 2, "--nnodes") == []
    (problem,) = fewest_nodes_problems(config(cp=2), 2, 1, "--nnodes")
    assert problem.startswith("--nnodes: 2 node(s) with 1 process(es) each, the fewest, cannot train this run: cp: 2 ")
    assert problem.endswith("possible: cp 1, or a multiple of 2 processes on each node")


def test_the_last_ranks_are_the_spares(monkeypatch: pytest.MonkeyPatch) -> None:
    two = config(micro_batch_size=4)
    for rank in range(3):
        for name, value in {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}.items():
            monkeypatch.setenv(name, str(value))
        why = leave_spares_out(two)
        assert bool(why) == (rank == 2)
    assert why.startswith("1 of 3 ranks wait as spares, because more than 2 would not make a step of batch_size 8 ")
    monkeypatch.setenv("RANK", "0")
    assert leave_spares_out(two) == ""
    assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]) == ("2", "2")
    assert describe_spares(two, 2, 1) == ""
