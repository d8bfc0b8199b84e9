"""Follow the advice of every message about settings literally: what it offers is then accepted.

Settings are drawn at random, and every change that a message offers must make them valid. Verbs and launchers:
tests/cli/test_advice.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.advice import advice_in, with_change
from tests.helpers.configs import only_problem, problems_of
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.errors import ConfigError

MAX_MISTAKES = 10  # more than a run can have at a time


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


def check_all_advice(values: dict[str, Any], find: Any, data: st.DataObject) -> None:
    """Follow every change that a message offers, then one of them, until nothing is wrong."""
    for _ in range(MAX_MISTAKES):
        problems = find(values)
        if not problems:
            return
        for problem in problems:
            for change in advice_in(problem):
                after = find(with_change(values, change))
                assert problem not in after, change
                if not any("precision = fp8" in other for other in after):  # which is checked after all others
                    assert len(after) <= len(problems), (problem, change, after)
        values = with_change(values, data.draw(st.sampled_from(advice_in(problems[0]))))
    pytest.fail(f"following advice does not end: {values}")


SIZES = st.fixed_dictionaries(
    {"d_model": st.integers(1, 200), "num_heads": st.integers(1, 24)},
    optional={
        "num_kv_heads": st.integers(1, 24),
        "head_dim": st.integers(1, 40),
        "d_ff": st.integers(1, 200),
        "precision": st.just("fp8"),
    },
)


@given(SIZES, st.data())
def test_sizes_of_a_model(values: dict[str, Any], data: st.DataObject) -> None:
    check_all_advice(values, lambda values: problems_of(**values), data)


SCHEDULES = st.fixed_dictionaries(
    {"total_steps": st.integers(1, 400), "schedule": st.sampled_from(["cosine", "linear", "wsd", "constant"])},
    optional={
        "warmup_iters": st.integers(0, 500),
        "cosine_iters": st.integers(1, 500),
        "decay_iters": st.integers(1, 500),
        "decay_shape": st.sampled_from(["linear", "sqrt"]),
        "lr_max": st.sampled_from([1e-5, 0.1 + 0.2, 1.0, 1e30]),
        "lr_min": st.sampled_from([0.0, 1e-7, 0.01, 0.1, 5e31]),
        "stop_at_step": st.integers(1, 500),
        "keep_every": st.integers(1, 60),
        "ckpt_every": st.integers(1, 60),
    },
)


@given(SCHEDULES, st.data())
def test_schedules_and_steps(values: dict[str, Any], data: st.DataObject) -> None:
    check_all_advice(values, lambda values: problems_of(**values), data)


BATCHES = st.fixed_dictionaries(
    {"batch_size": st.integers(1, 64), "ranks": st.integers(1, 9), "local": st.integers(1, 9)},
    optional={
        "micro_batch_size": st.integers(1, 12) | st.just("auto"),
        "parallel": st.sampled_from(["none", "ddp", "fsdp", "hsdp"]),
        "dp_replicate": st.integers(1, 9),
        "dp_shard": st.integers(1, 9),
        "reproducible": st.just(True),
        "reshard_after_forward": st.booleans(),
        "fingerprint_every": st.just(3),
    },
)


def problems_of_batch(values: dict[str, Any]) -> list[str]:
    """Return what is wrong with settings on `ranks` processes, at most `local` of them on each node."""
    settings = dict(values)
    ranks, local = settings.pop("ranks"), settings.pop("local")
    try:
        config = TrainingConfig.from_dict(settings)
        BatchPlan.make(config, choose_parallel_dims(config, ranks, local if ranks % local == 0 else ranks))
    except ConfigError as error:
        return error.problems
    return []


@given(BATCHES, st.data())
def test_batches_on_ranks(values: dict[str, Any], data: st.DataObject) -> None:
    for _ in range(MAX_MISTAKES):
        problems = problems_of_batch(values)
        if not problems:
            return
        for change in advice_in(problems[0]):
            assert problems[0] not in problems_of_batch(with_change(values, change)), change
        values = with_change(values, data.draw(st.sampled_from(advice_in(problems[0]))))
    pytest.fail(f"following advice does not end: {values}")


@given(BATCHES)
def test_sizes_for_the_given_ranks_are_accepted_at_once(values: dict[str, Any]) -> None:
    """The message about a batch offers only what the batch plan accepts, also where several rules are broken."""
    for problem in problems_of_batch(values):
        if not problem.startswith(("batch_size: ", "reproducible: ")) or "can be " in problem:
            continue
        for change in advice_in(problem):
            assert problems_of_batch(with_change(values, change)) == [], (problem, change)


def test_settings_that_nobody_set_are_not_named_as_if_they_were() -> None:
    assert "micro_batch_size" not in problems_of_batch({"batch_size": 2, "ranks": 3, "local": 3})[0]
    assert "num_heads 16 (the default)" in only_problem(d_model=500)
    assert "warmup_iters 10 (the default)" in only_problem(total_steps=1000, cosine_iters=5)
    assert only_problem(total_steps=100, warmup_iters=200).startswith("total_steps: 100 is less than warmup_iters 200;")
    assert only_problem(rope_high_freq_factor=8.0).startswith("rope_high_freq_factor: has no effect")
    assert only_problem(lr_max=1e-5).startswith("lr_min: 0.0001 (the default) is greater than lr_max 1e-05;")


MISTAKES: list[dict[str, Any]] = [
    {"micro_batch_size": 0},
    {"keep_every": 0},
    {"early_stop_patience": 2},
    {"schedule": "wsd", "cosine_iters": 5000},
    {"parallel": "fsdp", "dp_shard": 2},
    {"parallel": "ddp", "reshard_after_forward": True},
    {"parallel": "fsdp", "fingerprint_every": 2},
    {"train_data": "a", "train_weights": [1.0]},
    {"allow_drift": True},
    {"rope_low_freq_factor": 2.0},
    {"rope_high_freq_factor": 2.0},
    {"stop_at_step": 50_000},
    {"reproducible": True, "batch_size": 12},
    {"reproducible": True, "batch_size": 12, "micro_batch_size": 5},
    {"precision": "fp8", "d_ff": 100},
    {"keep_every": 500},
]


@pytest.mark.parametrize("values", MISTAKES, ids=str)
def test_one_mistake(values: dict[str, Any]) -> None:
    for change in advice_in(only_problem(**values).replace("(leave it out for the default)", "; leave it out")):
        assert problems_of(**with_change(values, change)) == [], change


@pytest.mark.parametrize(
    "values",
    [
        {"reproducible": True, "micro_batch_size": 0},
        {"rope_scaling_factor": 8.0, "rope_original_context_len": 0},
    ],
    ids=str,
)
def test_a_setting_that_another_one_needs_is_not_to_be_left_out(values: dict[str, Any]) -> None:
    assert "leave it out" not in only_problem(**values)


@pytest.mark.parametrize("total_steps", [1, 10, 24, 1000])
def test_the_example_of_steps_to_profile_is_of_this_run(total_steps: int) -> None:
    example = only_problem(profile="x", total_steps=total_steps).rpartition("example ")[2]
    assert problems_of(profile=example, total_steps=total_steps) == []


def test_a_file_that_is_listed_twice_is_weighted_only_where_that_has_an_effect() -> None:
    assert "train_weights" in only_problem(train_data=["a", "a", "b"])
    assert "train_weights" not in only_problem(train_data=["a", "a"])
    assert "train_weights" not in only_problem(val_data=["a", "a", "b"])
