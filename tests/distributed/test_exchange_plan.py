"""Which rank computes which matrix: each exactly once, balanced, and the messages of all ranks fit together."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytrain_dist.distributed.exchange_plan import ExchangePlan, owner_rounds


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 9))
def test_every_matrix_has_one_owner_and_the_work_is_balanced(costs: list[int], ranks: int):
    rounds = owner_rounds([float(cost) for cost in costs], ranks)
    assert sorted(index for each in rounds for index in each.values()) == list(range(len(costs)))
    work = [sum(costs[each[rank]] for each in rounds if rank in each) for rank in range(ranks)]
    assert max(work) - min(work) <= max(costs, default=0)
    for before, after in itertools.pairwise(rounds):
        assert after.keys() <= before.keys(), "no rank waits in between"
        assert all(costs[before[rank]] >= costs[after[rank]] for rank in after)


def test_ties_go_to_the_first_matrix_and_the_first_rank():
    assert owner_rounds([1.0, 2.0, 2.0, 1.0, 1.0], 2) == [{0: 1, 1: 2}, {0: 0, 1: 3}, {0: 4}]


@pytest.mark.parametrize(("replicas", "shards"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_what_a_rank_sends_is_what_another_receives(replicas: int, shards: int):
    shapes = ((7, 3), (2, 5), (8, 8), (1, 4), (9, 2), (6, 6), (5, 5))
    plan = ExchangePlan(shapes, tuple(float(rows * columns) for rows, columns in shapes), replicas, shards)
    collected = dict.fromkeys(range(len(shapes)), 0)
    shared = {(index, shard): 0 for index in range(len(shapes)) for shard in range(shards)}
    for matrices in plan.rounds():
        for replica in range(replicas):
            sizes = [plan.collect_sizes(matrices, replica, shard) for shard in range(shards)]
            for a in range(shards):
                for b in range(shards):
                    assert sizes[a][0][b] == sizes[b][1][a]
            for shard, index in enumerate(plan.owned(matrices, replica)):
                if index is not None:
                    collected[index] += sum(sizes[shard][1])
            for shard in range(shards):
                assert plan.share_size(matrices, replica, shard) == sum(sizes[shard][0])
                for index in plan.owned(matrices, replica):
                    if index is not None:
                        shared[index, shard] += plan.size(index, shard)
    assert collected == {index: rows * columns for index, (rows, columns) in enumerate(shapes)}
    for index, (rows, columns) in enumerate(shapes):
        assert sum(shared[index, shard] for shard in range(shards)) == rows * columns
