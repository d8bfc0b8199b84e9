"""Check settings that need less memory. That real ranks use what fits is in test_memory_fitting_on_ranks.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers.memory import MODEL
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext, shutdown
from tinytrain_dist.distributed.fake_backend import fake_context
from tinytrain_dist.distributed.parallel_dims import ParallelDims
from tinytrain_dist.training import memory_fitting
from tinytrain_dist.training.memory_estimate import estimate_memory
from tinytrain_dist.training.memory_fitting import (
    connect_groups,
    fitting_micro_batch_sizes,
    memory_report,
    smaller_settings,
    with_resharding,
)
from tinytrain_dist.training.train_step import build_train_step

SMALL: dict[str, Any] = {**MODEL, "num_layers": 2, "d_model": 64}


@pytest.fixture
def two_replicas() -> Iterator[DistributedContext]:
    yield fake_context(2, 2).with_mesh(ParallelDims("ddp", 2, 1, ""))
    shutdown()


def test_smaller_settings_come_with_the_cheapest_first(two_replicas: DistributedContext) -> None:
    config = TrainingConfig(**{**SMALL, "loss_chunk_tokens": 2**20})
    assert smaller_settings(config, two_replicas) == [
        {"loss_chunk_tokens": None},
        {"micro_batch_size": 4},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "block"},
    ]
    on_gpus = replace(two_replicas, simulated_type="cuda")
    offload = {"activation_checkpointing": "block", "activation_offload": True}
    assert smaller_settings(config, on_gpus)[-2:] == [{"activation_checkpointing": "block"}, offload]
    recomputing = replace(config, activation_checkpointing="block")
    assert smaller_settings(recomputing, on_gpus)[-1] == {"activation_offload": True}
    assert smaller_settings(replace(recomputing, activation_offload=True), on_gpus)[-1] == {"micro_batch_size": 4}
    exact = TrainingConfig(**{**SMALL, "reproducible": True, "micro_batch_size": 8})
    assert smaller_settings(exact, two_replicas)[0] == {"activation_checkpointing": "selective"}


def test_sizes_within_the_room_fit_and_the_smallest_is_always_tried(two_replicas: DistributedContext) -> None:
    config = TrainingConfig(**{**SMALL, "micro_batch_size": 4})
    room = estimate_memory(config, two_replicas).nbytes
    assert fitting_micro_batch_sizes([1, 2, 4, 8], room, config, two_replicas) == [1, 2, 4]
    assert fitting_micro_batch_sizes([1, 2, 4, 8], 0.0, config, two_replicas) == [1]


@pytest.mark.parametrize(("mode", "shard", "micro_steps"), [("ddp", 1, [1, 1, 2]), ("hsdp", 2, [1, 2, 2])])
def test_a_trial_has_a_second_pass_if_any_replica_has_one(mode: str, shard: int, micro_steps: list[int]) -> None:
    context = fake_context(3 * shard, 3 * shard).with_mesh(ParallelDims(mode, 3, shard, ""))
    try:
        config = TrainingConfig(**{**SMALL, "vocab_size": 53, "batch_size": 4 * shard, "micro_batch_size": 1})
        step = build_train_step(config, context)
        assert [len(step.plan.micro_steps_of(replica)) for replica in range(3)] == micro_steps
        passes: list[int] = []
        step.model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
        assert memory_fitting._passes_trial(step)
        assert passes == [1, 1]
    finally:
        shutdown()


def test_the_report_names_what_is_held_and_what_would_help(two_replicas: DistributedContext) -> None:
    report = memory_report(TrainingConfig(**{**SMALL, "micro_batch_size": 8}), two_replicas)
    for line in ("estimated memory of one step", "master weights", "at the peak (", "with micro_batch_size = 4"):
        assert line in report
    assert report.endswith("micro_batch_size = auto")


@pytest.mark.parametrize(
    ("mode", "device_type", "share", "setting", "expected"),
    [
        ("fsdp", "cuda", 1.0, None, False),
        ("fsdp", "cuda", 0.0, None, None),  # too large a part of the memory
        ("fsdp", "cuda", 1.0, True, True),
        ("fsdp", "cpu", 1.0, None, None),
        ("ddp", "cuda", 1.0, None, None),
    ],
)
def test_gathered_weights_stay_on_gpus_with_enough_memory(
    monkeypatch: pytest.MonkeyPatch, mode: str, device_type: str, share: float, setting: bool | None, expected: Any
) -> None:
    context = fake_context(2, 2).with_mesh(ParallelDims(mode, *((1, 2) if mode == "fsdp" else (2, 1)), ""))
    monkeypatch.setattr(memory_fitting, "MAX_GATHERED_SHARE", share)
    config = TrainingConfig(**{**SMALL, "reshard_after_forward": setting})
    room = estimate_memory(replace(config, micro_batch_size=1, reshard_after_forward=False), context).nbytes
    for spare, chosen in ((0, expected), (-1, setting)):
        monkeypatch.setattr(memory_fitting, "usable_bytes", lambda _, spare=spare: room + spare)
        monkeypatch.setattr(DistributedContext, "any_rank", lambda _, flag: flag)  # fake ranks have no votes
        automatic = replace(config, micro_batch_size="auto")
        assert with_resharding(automatic, context, device_type).reshard_after_forward is chosen
    shutdown()


def test_groups_are_connected_before_free_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    context = fake_context(2, 2)
    calls: list[Any] = []
    monkeypatch.setattr(DistributedContext, "all_reduce_sum", lambda _, tensor, axis: calls.append(axis))
    connect_groups(context, "cpu")
    assert calls == [], "gloo has no buffers to allocate"
    connect_groups(context, "cuda")
    assert calls == [None, "dp_replicate", "dp_shard"]
    calls.clear()
    monkeypatch.setattr(
        memory_fitting, "connect_groups", lambda context, device_type: calls.append(context.parallel_dims)
    )
    meshed = memory_fitting.with_fitting_mesh(TrainingConfig(**SMALL), context)
    assert calls == [meshed.parallel_dims]
    shutdown()
