"""Check which rank computes which sample slots, and which micro-batch sizes divide the batch."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.batch_plan import BatchPlan, possible_micro_batch_sizes
from tinytrain_dist.distributed.parallel_dims import ParallelDims
from tinytrain_dist.errors import ConfigError


def make(config: TrainingConfig, replicate: int = 1, shard: int = 1) -> BatchPlan:
    return BatchPlan.make(config, ParallelDims("any", replicate, shard, ""))


def test_accumulation_is_derived():
    plan = make(TrainingConfig(batch_size=48, micro_batch_size=4, context_len=10), 2, 3)
    assert (plan.ranks, plan.num_micro_batches, plan.accumulation_steps, plan.tokens_per_step) == (6, 12, 2, 480)
    assert str(plan) == (
        "batch_size 48 = micro_batch_size 4 x 6 ranks x 2 accumulation steps; 480 tokens per step"
    )  # fmt: skip
    assert plan.slots(3) == range(12, 16)


def test_without_micro_batch_size_a_rank_takes_its_part_at_once():
    plan = make(TrainingConfig(batch_size=12), 3)
    assert (plan.micro_batch_size, plan.accumulation_steps) == (4, 1)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "sentence"),
    [
        (
            48, 4, 5,
            "batch_size: 48 is not a multiple of micro_batch_size 4 x 5 ranks = 20; possible: ranks 1, 2, 3, 4, 6, 12; "
            "or batch_size 40, 60",
        ),
        (
            48, 4, 8,
            "batch_size: 48 is not a multiple of micro_batch_size 4 x 8 ranks = 32; possible: ranks 1, 2, 3, 4, 6, 12; "
            "or micro_batch_size 1, 2, 3, 6; or batch_size 32, 64",
        ),
        (
            2, None, 4,
            "batch_size: 2 cannot be divided evenly among 4 ranks; possible: ranks 1, 2; or batch_size 4",
        ),
        (
            5, "auto", 2,
            "batch_size: 5 cannot be divided evenly among 2 ranks; possible: ranks 1, 5; or batch_size 4, 6",
        ),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_cut_lists_what_divides(batch, micro, ranks, sentence):
    with pytest.raises(ConfigError) as caught:
        make(TrainingConfig(batch_size=batch, micro_batch_size=micro), ranks)
    assert caught.value.problems == [sentence]


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "offered"),
    [
        (12, 2, 1, "micro_batch_size 3, 6, 12; or batch_size 8, 16"),
        (12, 2, 2, "micro_batch_size 3, 6; or batch_size 8, 16"),
        (12, 2, 3, "ranks 2 with micro_batch_size 3, 6"),
        (12, 3, 3, "ranks 1, 2, 4"),
    ],
)
def test_a_reproducible_run_is_offered_what_gives_a_power_of_two_on_its_ranks(batch, micro, ranks, offered):
    with pytest.raises(ConfigError) as caught:
        make(TrainingConfig(batch_size=batch, micro_batch_size=micro, reproducible=True), ranks)
    assert caught.value.problems[0].partition("possible: ")[2] == offered


@pytest.mark.parametrize(
    ("settings", "replicate", "shard", "offered"),
    [
        ({"parallel": "none"}, 3, 1, "ranks 1; or batch_size 3, 6"),
        ({"parallel": "hsdp", "dp_replicate": 3, "dp_shard": 1}, 3, 1, "batch_size 3, 6"),
        ({"parallel": "hsdp", "dp_replicate": 2}, 2, 3, "ranks 2, 4; or batch_size 6"),
    ],
)
def test_only_numbers_of_ranks_that_the_mode_allows_are_offered(settings, replicate, shard, offered):
    with pytest.raises(ConfigError) as caught:
        make(TrainingConfig(batch_size=4, **settings), replicate, shard)
    assert caught.value.problems[0].partition("possible: ")[2] == offered


@pytest.mark.parametrize(("batch", "micro", "ranks"), [(24, 2, 1), (24, 2, 3), (24, 2, 4)])
def test_reproducible_needs_powers_of_two(batch, micro, ranks):
    config = TrainingConfig(batch_size=batch, micro_batch_size=micro)
    make(config, ranks)
    with pytest.raises(ConfigError, match=r"reproducible: batch_size 24 / micro_batch_size 2 = 12 .*power") as caught:
        make(dataclasses.replace(config, reproducible=True), ranks)
    assert caught.value.problems[0].partition("possible: ")[2]


def test_reproducible_takes_powers_of_two():
    config = TrainingConfig(batch_size=24, micro_batch_size=3, reproducible=True)
    assert [make(config, ranks).accumulation_steps for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]


plans = st.builds(
    lambda micro, replicate, shard, accumulation: BatchPlan(
        micro * replicate * shard * accumulation, micro, 8, replicate, shard
    ),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 6),
)


@given(plans)
def test_every_slot_is_owned_exactly_once(plan):
    owned = [
        slot
        for replica in range(plan.replicate)
        for shard in range(plan.shard)
        for micro_step in range(plan.accumulation_steps)
        for slot in plan.slots(plan.micro_batch_index(replica, shard, micro_step))
    ]
    assert len(owned) == plan.batch_size
    assert sorted(owned) == list(range(plan.batch_size))


@given(plans)
def test_a_replicas_ranks_hold_neighbouring_micro_batches_in_each_micro_step(plan):
    for replica in range(plan.replicate):
        for micro_step in range(plan.accumulation_steps):
            indices = [plan.micro_batch_index(replica, shard, micro_step) for shard in range(plan.shard)]
            assert indices == list(range(indices[0], indices[0] + plan.shard))
            assert indices[0] % plan.shard == 0


@given(plans)
def test_a_replica_holds_a_contiguous_run_of_micro_batches(plan):
    run = plan.accumulation_steps * plan.shard
    for replica in range(plan.replicate):
        indices = [
            plan.micro_batch_index(replica, s, k) for k in range(plan.accumulation_steps) for s in range(plan.shard)
        ]
        assert indices == list(range(replica * run, (replica + 1) * run))


@given(plans)
def test_the_formula_is_that_of_each_mode(plan):
    """DDP: r * K + k; FSDP: k * W + r."""
    k_count = plan.accumulation_steps
    for rank in range(plan.ranks):
        for k in range(k_count):
            if plan.shard == 1:
                assert plan.micro_batch_index(rank, 0, k) == rank * k_count + k
            if plan.replicate == 1:
                assert plan.micro_batch_index(0, rank, k) == k * plan.ranks + rank


def test_sizes_that_divide() -> None:
    config = TrainingConfig(batch_size=24, micro_batch_size="auto")
    assert possible_micro_batch_sizes(config, ParallelDims("ddp", 2, 1, "")) == [1, 2, 3, 4, 6, 12]
    with pytest.raises(ConfigError, match="micro_batch_size: must be set to a number with reproducible = true"):
        TrainingConfig(micro_batch_size="auto", reproducible=True)
    with pytest.raises(ConfigError, match="micro_batch_size: 'all' is not a whole number or auto or None"):
        TrainingConfig.from_dict({"micro_batch_size": "all"})
