"""The batch size of every step, and which values of batch_size_warmup are refused, with which sentence."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.configs import only_problem, problems_of
from tinytrain_dist.config.batch_phases import BatchSizes, sizes_before
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.batch_plan import BatchPlan, BatchPlans
from tinytrain_dist.distributed.parallel_dims import ParallelDims
from tinytrain_dist.errors import ConfigError

WARMUP = ["0: 2", "3: 4", "5: 8"]


def test_the_sizes_of_a_run_with_and_without_warm_up() -> None:
    sizes = TrainingConfig(batch_size=8, batch_size_warmup=tuple(WARMUP)).batch_sizes
    assert [sizes.at(step) for step in range(8)] == [2, 2, 2, 4, 4, 8, 8, 8]
    assert [sizes.before(step) for step in range(8)] == [0, 2, 4, 6, 10, 14, 22, 30]
    assert sizes.varies
    assert str(sizes) == "2 from step 0 on, 4 from step 3 on, 8 from step 5 on"
    constant = TrainingConfig(batch_size=8).batch_sizes
    assert (constant.at(10**9), constant.before(7), constant.varies) == (8, 56, False)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), st.integers(1, 200))
def test_sums_and_lengths_are_those_of_counting(phases: list[tuple[int, int]], sequences: int) -> None:
    starts = [0, *itertools.accumulate(length for length, _ in phases)]
    texts = [f"{start}: {size}" for start, (_, size) in zip(starts, phases, strict=False)]
    sizes = BatchSizes.of(phases[-1][1], texts)
    of_steps = [size for length, size in phases for _ in range(length)] + [phases[-1][1]] * 250
    assert [sizes.at(step) for step in range(60)] == of_steps[:60]
    assert [sizes.before(step) for step in range(60)] == [sum(of_steps[:step]) for step in range(60)]
    needed = next(step for step in itertools.count() if sum(of_steps[:step]) >= sequences)
    assert sizes.steps_for(sequences) == needed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size_warmup": ["0 2", "3: 8"]}, "batch_size_warmup: '0 2' must be STEP: BATCH_SIZE, for example"),
        ({"batch_size_warmup": ["0: 0", "3: 8"]}, "batch_size_warmup: '0: 0' must be STEP: BATCH_SIZE, for example"),
        ({"batch_size_warmup": ["0: 2.5", "3: 8"]}, "batch_size_warmup: '0: 2.5' must be STEP: BATCH_SIZE"),
        ({"batch_size_warmup": ["-1: 2", "3: 8"]}, "batch_size_warmup: '-1: 2' must be STEP: BATCH_SIZE"),
        ({"batch_size_warmup": ["0: 8"]}, "batch_size_warmup: one phase has no effect beside batch_size"),
        ({"batch_size_warmup": ["1: 2", "3: 8"]}, "batch_size_warmup: the first phase begins at step 1"),
        ({"batch_size_warmup": ["0: 2", "3: 4"]}, "batch_size_warmup: its last phase has 4 sequences, but batch_size"),
        ({"batch_size_warmup": ["0: 2", "5: 4", "5: 8"]}, "batch_size_warmup: the phase from step 5 comes after the"),
        ({"micro_batch_size": 4}, "batch_size_warmup: 2 from step 0 on is not a multiple of micro_batch_size 4; "),
        (
            {"micro_batch_size": 2, "reproducible": True, "batch_size_warmup": ["0: 6", "3: 8"]},
            "batch_size_warmup: 6 from step 0 on / micro_batch_size 2 = 3 is not a power of two, which reproducible = "
            "true requires; possible: 4 or 8",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], sentence: str) -> None:
    assert only_problem(**{"batch_size": 8, "batch_size_warmup": WARMUP, **changes}).startswith(sentence)


@pytest.mark.parametrize(
    ("size", "sizes"), [(4, "4 from step 5 on is not more than 6"), (6, "6 from step 5 on is not")]
)
def test_a_warm_up_only_grows(size: int, sizes: str) -> None:
    problem = only_problem(batch_size=8, batch_size_warmup=["0: 6", f"5: {size}", "7: 8"])
    assert problem.startswith(f"batch_size_warmup: {sizes}")
    assert problem.endswith("but batches grow in a warm-up; give larger sizes, or leave the phase out")


def test_phases_that_never_begin_are_refused_with_what_the_shorter_run_has() -> None:
    problems = problems_of(batch_size=8, batch_size_warmup=WARMUP, total_steps=5)
    assert problems == [
        "batch_size_warmup: the phase from step 5 has no effect, because total_steps is 5; leave it out, and set "
        "batch_size to 4"
    ]
    assert problems_of(batch_size=4, batch_size_warmup=WARMUP[:2], total_steps=5) == []
    assert problems_of(batch_size=8, batch_size_warmup=WARMUP, total_steps=3) == [
        "batch_size_warmup: its last 2 phases, from step 3 on, have no effect, because total_steps is 3; leave "
        "batch_size_warmup out, and set batch_size to 2"
    ]
    many = ["0: 1", *(f"{10 * size}: {size}" for size in range(2, 20))]
    assert problems_of(batch_size=19, batch_size_warmup=many, total_steps=30) == [
        "batch_size_warmup: its last 17 phases, from step 30 on, have no effect, because total_steps is 30; leave them "
        "out, and set batch_size to 2"
    ]
    assert problems_of(batch_size=8, batch_size_warmup=WARMUP, total_steps=6) == []
    assert problems_of(batch_size=8, batch_size_warmup=WARMUP, epochs=0.1, sampling="shuffle") == []


def test_the_sizes_of_a_shorter_run() -> None:
    assert sizes_before(8, WARMUP, 6) == (8, tuple(WARMUP))
    assert sizes_before(8, WARMUP, 5) == (4, tuple(WARMUP[:2]))
    assert sizes_before(8, WARMUP, 3) == (2, None)
    assert sizes_before(8, None, 3) == (8, None)


def ddp(ranks: int) -> ParallelDims:
    return ParallelDims("ddp", ranks, 1, "")


def test_every_phase_must_have_a_micro_batch_for_each_rank() -> None:
    config = TrainingConfig(batch_size=16, batch_size_warmup=("0: 4", "3: 12", "5: 16"), micro_batch_size=2)
    assert BatchPlan.make(config, ddp(2)).accumulation_steps == 4
    with pytest.raises(ConfigError) as caught:
        BatchPlan.make(config, ddp(4))
    assert caught.value.problems == [
        "batch_size_warmup: 4 from step 0 on / micro_batch_size 2 = 2 micro-batches are fewer than 4 ranks, and each "
        "rank needs one; possible: 8"
    ]
    with pytest.raises(ConfigError, match="4 from step 0 on is fewer than 8 ranks, and each rank needs one; possible"):
        BatchPlan.make(TrainingConfig(batch_size=16, batch_size_warmup=("0: 4", "5: 16")), ddp(8))


def test_uneven_phases_are_printed_with_what_they_waste() -> None:
    config = TrainingConfig(batch_size=16, batch_size_warmup=("0: 4", "3: 12", "5: 16"), micro_batch_size=2)
    assert str(BatchPlans.make(replace(config, micro_batch_size=1), ddp(2))).endswith("16 from step 5 on")
    text = str(BatchPlans.make(replace(config, batch_size_warmup=("0: 6", "5: 16")), ddp(3)))
    assert text.endswith("batch_size_warmup: 6 from step 0 on, 16 from step 5 on; unused: 0%, 11% of the ranks' time")


def test_without_a_micro_batch_size_all_phases_have_that_of_the_smallest() -> None:
    config = TrainingConfig(batch_size=32, batch_size_warmup=("0: 8", "3: 12", "5: 32"))
    assert BatchPlan.make(config, ddp(2)).micro_batch_size == 2
    assert BatchPlan.make(config, ddp(8)).micro_batch_size == 1
    assert BatchPlan.make(TrainingConfig(batch_size=32), ddp(2)).micro_batch_size == 16


@pytest.mark.parametrize(
    "settings",
    [{}, {"batch_size": "8"}, {"batch_size": 8, "batch_size_warmup": [1]}, {"batch_size": 0},
     {"batch_size": 8, "batch_size_warmup": ["0: 2", "3: 4"]}],
)  # fmt: skip
def test_settings_that_were_never_checked_give_no_sizes(settings: dict[str, Any]) -> None:
    assert BatchSizes.read(settings) is None
    valid = BatchSizes.read({"batch_size": 8, "batch_size_warmup": WARMUP})
    assert valid is not None
    assert valid.before(7) == 30
