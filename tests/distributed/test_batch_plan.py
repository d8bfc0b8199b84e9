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


def test_ranks_that_share_sequences_have_the_same_slots_and_other_columns():
    config = TrainingConfig(batch_size=8, micro_batch_size=2, context_len=12, num_heads=6, head_dim=8, cp=3)
    plan = BatchPlan.make(config, ParallelDims("ddp", 2, 1, "", cp=3))
    assert (plan.ranks, plan.world_size, plan.accumulation_steps, plan.tokens_per_step) == (2, 6, 2, 96)
    assert str(plan) == (
        "batch_size 8 = micro_batch_size 2 x 2 data-parallel ranks x 2 accumulation steps; 96 tokens per step; each "
        "sequence on 3 ranks with 4 tokens each"
    )
    shares = [plan.share(1, 0, cp_index) for cp_index in range(3)]
    assert {share.slots for share in shares} == {(4, 5, 6, 7)}
    assert [share.columns for share in shares] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    assert make(TrainingConfig(context_len=10)).share(0, 0).columns == slice(0, 10)


def test_a_batch_too_small_for_groups_of_ranks_offers_numbers_of_processes():
    config = TrainingConfig(batch_size=2, context_len=12, num_heads=6, head_dim=8, cp=3)
    with pytest.raises(
        ConfigError, match=r"fewer than 4 ranks, .*cp = 3 processes are one data-parallel rank.*ranks 3, 6;"
    ):
        BatchPlan.make(config, ParallelDims("ddp", 4, 1, "", cp=3))


def test_without_micro_batch_size_a_rank_takes_its_part_at_once():
    plan = make(TrainingConfig(batch_size=12), 3)
    assert (plan.micro_batch_size, plan.accumulation_steps) == (4, 1)


def test_uneven_shares_are_printed_with_what_they_waste():
    plan = make(TrainingConfig(batch_size=48, micro_batch_size=4, context_len=10), 5)
    assert str(plan) == (
        "batch_size 48 = micro_batch_size 4 x 12 micro-batches; 480 tokens per step\n"
        "uneven shares: 2 of 5 ranks compute 3 micro-batches, the others 2, so 20% of the ranks' time is unused"
    )
    assert [len(plan.share(rank, 0).micro_batches) for rank in range(5)] == [2, 2, 3, 2, 3]


@pytest.mark.parametrize(
    ("batch", "ranks", "micro"),
    [
        (12, 3, 4),
        (500, 8, 5),  # 13 x 5 = 65 sequences on the busiest rank; 63 with 1, 64 with 2 or 4, 70 with 10
        (8, 3, 1),  # 3 sequences; 4 with 2
        (7, 7, 1),
    ],
)
def test_without_micro_batch_size_shares_are_as_even_as_with_single_sequences(batch, ranks, micro):
    assert make(TrainingConfig(batch_size=batch), ranks).micro_batch_size == micro


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "sentence"),
    [
        (
            48, 4, 16,
            "batch_size: 48 / micro_batch_size 4 = 12 micro-batches are fewer than 16 ranks, and each rank needs one; "
            "possible: ranks 9, 10, 11, 12; or micro_batch_size 1, 2, 3; or batch_size 64",
        ),
        (
            2, None, 4,
            "batch_size: 2 is fewer than 4 ranks, and each rank needs a sequence; possible: ranks 1, 2; or "
            "batch_size 4",
        ),
    ],
)  # fmt: skip
def test_fewer_micro_batches_than_ranks_list_what_is_possible(batch, micro, ranks, sentence):
    with pytest.raises(ConfigError) as caught:
        make(TrainingConfig(batch_size=batch, micro_batch_size=micro), ranks)
    assert caught.value.problems == [sentence]


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "offered"),
    [
        (12, 2, 1, "micro_batch_size 3, 6, 12; or batch_size 8, 16"),
        (12, 2, 2, "micro_batch_size 3, 6; or batch_size 8, 16"),
        (12, 2, 3, "micro_batch_size 3; or batch_size 8, 16"),
        (12, 3, 5, "ranks 1, 2, 3, 4; or batch_size 24"),
    ],
)
def test_a_reproducible_run_is_offered_what_gives_a_power_of_two(batch, micro, ranks, offered):
    with pytest.raises(ConfigError) as caught:
        make(TrainingConfig(batch_size=batch, micro_batch_size=micro, reproducible=True), ranks)
    assert caught.value.problems[0].partition("possible: ")[2] == offered


@pytest.mark.parametrize(
    ("settings", "replicate", "shard", "offered"),
    [
        ({"parallel": "none"}, 5, 1, "ranks 1; or batch_size 5"),
        ({"parallel": "hsdp", "dp_replicate": 5, "dp_shard": 1}, 5, 1, "batch_size 5"),
        ({"parallel": "hsdp", "dp_replicate": 2}, 2, 3, "ranks 2, 4; or batch_size 6"),
    ],
)
def test_only_numbers_of_ranks_that_the_mode_allows_are_offered(settings, replicate, shard, offered):
    with pytest.raises(ConfigError) as caught:
        make(TrainingConfig(batch_size=4, **settings), replicate, shard)
    assert caught.value.problems[0].partition("possible: ")[2] == offered


@pytest.mark.parametrize(("batch", "micro", "ranks"), [(24, 2, 1), (24, 2, 3), (24, 2, 4)])
def test_reproducible_needs_a_power_of_two_of_micro_batches(batch, micro, ranks):
    config = TrainingConfig(batch_size=batch, micro_batch_size=micro)
    make(config, ranks)
    with pytest.raises(ConfigError, match=r"reproducible: batch_size 24 / micro_batch_size 2 = 12 .*power") as caught:
        make(dataclasses.replace(config, reproducible=True), ranks)
    assert caught.value.problems[0].partition("possible: ")[2]


def test_reproducible_takes_any_number_of_ranks():
    config = TrainingConfig(batch_size=24, micro_batch_size=3, reproducible=True)
    assert [make(config, ranks).accumulation_steps for ranks in range(1, 9)] == [8, 4, 3, 2, 2, 2, 2, 1]
    with pytest.raises(ConfigError, match="= 8 micro-batches are fewer than 9 ranks"):
        make(config, 9)


plans = st.builds(
    lambda micro, replicate, shard, extra: BatchPlan(micro * (replicate * shard + extra), micro, 8, replicate, shard),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 40),
)


@given(plans)
def test_every_slot_is_owned_exactly_once(plan):
    shares = [plan.share(replica, shard) for replica in range(plan.replicate) for shard in range(plan.shard)]
    assert sorted(slot for share in shares for slot in share.slots) == list(range(plan.batch_size))
    for share in shares:
        assert share.slots == tuple(slot for index in share.micro_batches for slot in plan.slots(index))


@given(plans)
def test_shares_differ_by_one_micro_batch_and_replicas_by_one_micro_step(plan):
    shares = [plan.share(replica, shard) for replica in range(plan.replicate) for shard in range(plan.shard)]
    counts = {len(share.micro_batches) for share in shares}
    assert max(counts) == plan.accumulation_steps
    assert min(counts) >= max(1, plan.accumulation_steps - 1)
    assert {len(share.micro_steps) for share in shares} <= {plan.accumulation_steps, plan.accumulation_steps - 1}
    if plan.num_micro_batches % plan.ranks == 0 and plan.num_micro_batches // plan.replicate % plan.shard == 0:
        assert counts == {plan.accumulation_steps}
        assert plan.unused_share == 0


@given(plans)
def test_a_replica_computes_consecutive_micro_batches_in_each_micro_step(plan):
    for replica in range(plan.replicate):
        computed = []
        for micro_step in plan.micro_steps_of(replica):
            part = plan.share(replica, 0).replica_part(micro_step)
            indices = [plan.micro_batch_index(replica, shard, micro_step) for shard in range(plan.shard)]
            assert indices == [*part, *[None] * (plan.shard - len(part))]
            computed += part
            for shard, index in enumerate(indices):
                share = plan.share(replica, shard)
                assert share.is_repeated(micro_step) == (index is None)
                assert share.is_last(micro_step) or index is not None
                assert share.is_last(micro_step) == (len(computed) == len(plan.micro_batches_of(replica)))
        assert computed == list(plan.micro_batches_of(replica))


@pytest.mark.parametrize(
    ("replicate", "shard", "shares"),
    [(1, 3, [1.0]), (3, 1, [2 / 3, 1.0, 1.0]), (3, 2, [1 / 2, 1.0, 1.0]), (2, 2, [1.0, 1.0])],
)
def test_the_relative_share_counts_micro_steps_with_repeated_micro_batches(replicate, shard, shares):
    plan = BatchPlan(8, 1, 12, replicate, shard)
    assert [plan.relative_share(replica) for replica in range(replicate)] == shares


@given(plans)
def test_even_shares_have_the_formula_of_each_mode(plan):
    """DDP: r * K + k; FSDP: k * W + r."""
    k_count = plan.accumulation_steps
    if plan.unused_share:
        return
    for rank in range(plan.ranks):
        for k in range(k_count):
            if plan.shard == 1:
                assert plan.micro_batch_index(rank, 0, k) == rank * k_count + k
            if plan.replicate == 1:
                assert plan.micro_batch_index(0, rank, k) == k * plan.ranks + rank


def test_sizes_that_divide() -> None:
    config = TrainingConfig(batch_size=24, micro_batch_size="auto")
    assert possible_micro_batch_sizes(config, ParallelDims("ddp", 2, 1, "")) == [1, 2, 3, 4, 6, 12]
    assert possible_micro_batch_sizes(config, ParallelDims("ddp", 5, 1, "")) == [1]  # 5 sequences; 6 with 2 or 3
    with pytest.raises(ConfigError, match="micro_batch_size: must be set to a number with reproducible = true"):
        TrainingConfig(micro_batch_size="auto", reproducible=True)
    with pytest.raises(ConfigError, match="micro_batch_size: 'all' is not a whole number or auto or None"):
        TrainingConfig.from_dict({"micro_batch_size": "all"})
