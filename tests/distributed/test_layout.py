"""Owns the checks of how one step's work is cut: the mesh of every mode, and which rank computes which slots.

Must not know torch or processes: the plan is arithmetic, so every layout can be looked at from one process.
"""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.parallel_dims import ParallelDims, choose_parallel_dims
from tinytrain_dist.errors import ConfigError


def mesh(config: TrainingConfig, world: int, local: int, fits: bool = True) -> tuple[str, int, int]:
    layout = choose_parallel_dims(config, world, local, fits)
    return layout.mode, layout.replicate, layout.shard


@pytest.mark.parametrize(
    ("world", "local", "fits", "expected"),
    [
        (1, 1, True, ("none", 1, 1)),
        (1, 1, False, ("none", 1, 1)),
        (8, 8, True, ("ddp", 8, 1)),
        (8, 4, True, ("ddp", 8, 1)),
        (8, 8, False, ("fsdp", 1, 8)),
        (8, 4, False, ("hsdp", 2, 4)),
        (8, 1, False, ("fsdp", 1, 8)),
    ],
)
def test_auto_chooses_by_what_fits(world, local, fits, expected):
    assert mesh(TrainingConfig(), world, local, fits) == expected


@pytest.mark.parametrize(
    ("settings", "world", "local", "expected"),
    [
        ({"parallel": "none"}, 1, 1, ("none", 1, 1)),
        ({"parallel": "ddp"}, 4, 4, ("ddp", 4, 1)),
        ({"parallel": "ddp"}, 1, 1, ("ddp", 1, 1)),
        ({"parallel": "fsdp"}, 6, 3, ("fsdp", 1, 6)),
        ({"parallel": "fsdp"}, 1, 1, ("fsdp", 1, 1)),
        ({"parallel": "hsdp"}, 8, 4, ("hsdp", 2, 4)),
        ({"parallel": "hsdp", "dp_shard": 2}, 8, 4, ("hsdp", 4, 2)),
        ({"parallel": "hsdp", "dp_replicate": 4}, 8, 8, ("hsdp", 4, 2)),
        ({"parallel": "hsdp", "dp_replicate": 2, "dp_shard": 4}, 8, 8, ("hsdp", 2, 4)),
        ({"parallel": "hsdp"}, 4, 4, ("fsdp", 1, 4)),
        ({"parallel": "hsdp", "dp_shard": 1}, 4, 4, ("ddp", 4, 1)),
        ({"parallel": "hsdp"}, 1, 1, ("ddp", 1, 1)),
    ],
)
def test_configured_modes(settings, world, local, expected):
    assert mesh(TrainingConfig(**settings), world, local) == expected


def test_none_on_several_processes_is_an_error():
    with pytest.raises(ConfigError, match="parallel: none runs on 1 process, but there are 2"):
        choose_parallel_dims(TrainingConfig(parallel="none"), 2, 2)


@pytest.mark.parametrize(
    ("settings", "world", "local", "product"),
    [
        ({"dp_replicate": 3, "dp_shard": 4}, 8, 8, "3 x 4 is not the 8 processes there are; possible: 4 x 2, 2 x 4"),
        ({"dp_shard": 3}, 8, 8, "2 x 3 is not the 8 processes there are; possible: 4 x 2, 2 x 4"),
        ({}, 6, 4, "1 x 4 is not the 6 processes there are; possible: 3 x 2, 2 x 3"),
        ({"dp_replicate": 5}, 3, 3, "5 x 0 is not the 3 processes there are; possible: none, use ddp or fsdp"),
    ],
)
def test_a_mesh_that_does_not_cover_the_world_lists_those_that_do(settings, world, local, product):
    with pytest.raises(ConfigError) as caught:
        choose_parallel_dims(TrainingConfig(parallel="hsdp", **settings), world, local)
    assert caught.value.problems == [f"dp_replicate x dp_shard: {product}"]


def test_a_layout_says_itself():
    text = str(choose_parallel_dims(TrainingConfig(), 4, 4))
    assert text.startswith("parallel = ddp: 4 replica(s) x 1 shard(s); chosen because")


# --- the plan ------------------------------------------------------------------------------------------------------


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
            "batch_size: 48 is not a multiple of micro_batch_size 4 x 5 ranks = 20; possible: ranks 1, 2, 3, 4, 6, 12",
        ),
        (
            48, 4, 8,
            "batch_size: 48 is not a multiple of micro_batch_size 4 x 8 ranks = 32; possible: ranks 1, 2, 3, 4, 6, 12; "
            "or micro_batch_size 1, 2, 3, 6",
        ),
        (
            2, None, 4,
            "batch_size: 2 is not a multiple of micro_batch_size 1 x 4 ranks = 4; possible: ranks 1, 2",
        ),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_cut_lists_what_divides(batch, micro, ranks, sentence):
    with pytest.raises(ConfigError) as caught:
        make(TrainingConfig(batch_size=batch, micro_batch_size=micro), ranks)
    assert caught.value.problems == [sentence]


def divisors_in(text: str) -> list[int]:
    return [int(number) for number in text.replace(", ...", "").split(", ")]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 9))
def test_every_size_that_an_error_offers_works(leaves, micro, ranks):
    config = TrainingConfig(batch_size=leaves * micro, micro_batch_size=micro)
    try:
        make(config, ranks)
    except ConfigError as error:
        offered, _, micros = error.problems[0].partition("possible: ranks ")[2].partition("; or micro_batch_size ")
        for number in divisors_in(offered):
            make(config, number)
        for number in divisors_in(micros) if micros else []:
            make(dataclasses.replace(config, micro_batch_size=number), ranks)
    else:
        assert leaves % ranks == 0


@pytest.mark.parametrize(("batch", "micro", "ranks"), [(24, 2, 1), (24, 2, 3), (24, 2, 4)])
def test_reproducible_needs_powers_of_two(batch, micro, ranks):
    config = TrainingConfig(batch_size=batch, micro_batch_size=micro)
    make(config, ranks)
    with pytest.raises(ConfigError, match=r"reproducible: batch_size 24 / micro_batch_size 2 = 12 .*power") as caught:
        make(dataclasses.replace(config, reproducible=True), ranks)
    for micro in divisors_in(caught.value.problems[0].partition("possible: micro_batch_size ")[2]):
        make(dataclasses.replace(config, reproducible=True, micro_batch_size=micro))


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
def test_a_replicas_ranks_hold_neighbouring_leaves_in_each_micro_step(plan):
    for replica in range(plan.replicate):
        for micro_step in range(plan.accumulation_steps):
            leaves = [plan.micro_batch_index(replica, shard, micro_step) for shard in range(plan.shard)]
            assert leaves == list(range(leaves[0], leaves[0] + plan.shard))
            assert leaves[0] % plan.shard == 0


@given(plans)
def test_a_replica_holds_a_contiguous_run_of_leaves(plan):
    run = plan.accumulation_steps * plan.shard
    for replica in range(plan.replicate):
        leaves = [
            plan.micro_batch_index(replica, s, k) for k in range(plan.accumulation_steps) for s in range(plan.shard)
        ]
        assert leaves == list(range(replica * run, (replica + 1) * run))


@given(plans)
def test_the_formula_is_that_of_each_mode(plan):
    """DDP: r * K + k; FSDP: k * W + r, as DESIGN.md has them for the canonical tree."""
    k_count = plan.accumulation_steps
    for rank in range(plan.ranks):
        for k in range(k_count):
            if plan.shard == 1:
                assert plan.micro_batch_index(rank, 0, k) == rank * k_count + k
            if plan.replicate == 1:
                assert plan.micro_batch_index(0, rank, k) == k * plan.ranks + rank
