"""Check the predicted step: its collectives are those of the real step, and its times are those computed by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.forecasts import SMALL
from tests.helpers.ranks import run_ranks
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import fake_backend
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.context import DistributedContext, shutdown
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.metrics.device_specs import DEVICE_SPECS, DeviceSpec
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.training import memory_estimate
from tinytrain_dist.training.step_timeline import (
    FLOAT32,
    ModelUnits,
    StepPrediction,
    StepSettings,
    Unit,
    _Step,
    ddp_buckets,
    offload_seconds,
    offloaded_bytes,
    predict_step,
    seconds_alone,
    units_of,
)
from tinytrain_dist.training.timeline import Span

H100 = DEVICE_SPECS["h100"]
PLAIN: DeviceSpec = replace(H100, bandwidth=math.inf)  # the update takes no time


def settings_of(world_size: int = 4, per_node: int = 2, gpu: DeviceSpec = H100, **changes: Any) -> StepSettings:
    config = TrainingConfig(**{**SMALL, **changes})
    dims = choose_parallel_dims(config, world_size, per_node)
    with torch.device("meta"):
        units = units_of(TransformerLM(config), config)
    return StepSettings(units, config, dims, BatchPlan.make(config, dims), gpu, per_node)


@pytest.fixture
def four_gpus() -> Iterator[DistributedContext]:
    """Four simulated ranks with GPUs, two on each node."""
    shutdown()
    yield fake_backend.fake_context(4, 2, "cuda")
    shutdown()


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": "fsdp"},
        {"parallel": "fsdp", "micro_batch_size": 2, "precision": "bf16", "num_layers": 4},
        {"parallel": "fsdp", "micro_batch_size": 2, "reshard_after_forward": False},
        {"parallel": "fsdp", "tie_embeddings": True, "precision": "bf16", "d_model": 72},
        {"parallel": "hsdp", "micro_batch_size": 2},
        {"parallel": "hsdp", "tie_embeddings": True, "precision": "bf16", "activation_checkpointing": "block"},
        {"parallel": "fsdp", "optimizer": "muon", "num_kv_heads": 2, "num_layers": 3},
        {"parallel": "hsdp", "optimizer": "muon", "num_layers": 3, "precision": "bf16"},
        {"parallel": "fsdp", "micro_batch_size": 2, "cp": 2, "num_kv_heads": 1},
        {"parallel": "hsdp", "cp": 2, "precision": "bf16", "activation_checkpointing": "block"},
        {"parallel": "hsdp", "cp": 2, "activation_checkpointing": "selective"},
    ],
    ids=str,
)
def test_the_collectives_are_those_of_the_real_step_in_their_order(
    changes: dict[str, Any], four_gpus: DistributedContext
) -> None:
    expected = settings_of(**changes)
    tracker = memory_estimate._simulate_step(expected.config, four_gpus.with_mesh(expected.dims))
    groups = {"shard": tuple(range(expected.dims.weight_shards)), "world": (0, 1, 2, 3), "replicate": (0, 2)}
    groups["cp"] = (0, 1)
    real = [
        (operation.partition(".")[0].strip("_").replace("_base", ""), nbytes, ranks)
        for _, operation, nbytes, ranks in tracker._messages
        if nbytes != 4  # the vote to stop, on the CPU
    ]
    sent = predict_step(expected).sent
    assert [(operation, nbytes, groups[group]) for group, operation, nbytes in sent] == real


def test_ddp_sends_all_gradients_once(four_gpus: DistributedContext) -> None:
    expected = settings_of(parallel="ddp", micro_batch_size=2)
    estimate = memory_estimate.estimate_memory(expected.config, four_gpus.with_mesh(expected.dims))
    sent = sum(nbytes for _, _, nbytes in predict_step(expected).sent)
    assert {(0, 1, 2, 3): {"allreduce_.default": sent + 4}} == estimate.sent  # 4: the vote, on the CPU


def test_ddp_also_exchanges_parts_of_sequences(four_gpus: DistributedContext) -> None:
    expected = settings_of(parallel="ddp", micro_batch_size=4, cp=2)
    sent = predict_step(expected).sent
    estimate = memory_estimate.estimate_memory(expected.config, four_gpus.with_mesh(expected.dims))
    sums = {group: sum(nbytes for name, _, nbytes in sent if name == group) for group in ("cp", "replicate", "world")}
    assert estimate.sent[0, 1] == {"all_to_all_single": sums["cp"]}
    assert estimate.sent[0, 1, 2, 3] == {"allreduce_.default": sums["replicate"] + sums["world"] + 4}


BUCKETED = {"vocab_size": 2048, "num_layers": 3, "d_model": 256, "d_ff": 1024, "num_heads": 4, "num_kv_heads": 2}


def buckets_of_ddp(cap_megabytes: int | None, settings: dict[str, Any]) -> list[list[int]]:
    """On a rank: the sizes of the gradients in each bucket of DDP's second backward."""
    from torch.nn.parallel import DistributedDataParallel

    from tinytrain_dist.distributed.context import init_distributed

    init_distributed("cpu")
    model = DistributedDataParallel(TransformerLM(TrainingConfig(**settings)), bucket_cap_mb=cap_megabytes)
    buckets: list[list[int]] = []

    def record(bucket: Any) -> Any:
        buckets.append([gradient.nbytes for gradient in bucket.gradients()])
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, lambda _, bucket: record(bucket))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    for _ in range(2):
        buckets.clear()
        model(ids, ids).backward()
    return buckets


@pytest.mark.multiprocess
@pytest.mark.parametrize(("cap_megabytes", "tied"), [(None, False), (2, True)])
def test_buckets_are_those_of_ddp(cap_megabytes: int | None, tied: bool) -> None:
    changes = {**SMALL, **BUCKETED, "tie_embeddings": tied, "context_len": 8}
    real = run_ranks(2, buckets_of_ddp, cap_megabytes, changes)[0]
    settings = replace(settings_of(2, 2, parallel="ddp", **changes), bucket_mb=cap_megabytes)
    sent = [nbytes for group, _, nbytes in predict_step(settings).sent if group == "replicate"]
    assert sent == [sum(bucket) for bucket in real]
    assert len(sent) > 1


def test_a_bucket_is_closed_when_it_is_full() -> None:
    assert ddp_buckets([3, 1, 1, 9, 1], cap_bytes=4, first_bytes=2) == [[0], [1, 2, 3], [4]]
    assert ddp_buckets([2, 4, 4], cap_bytes=4, first_bytes=2) == [[0], [1], [2]]
    assert ddp_buckets([], 4, 2) == []


# ---------------------------------------------------------------- times by hand

WEIGHTS = 1_000_000
FLOPS = 1e7


def one_block(tokens: int = 1000, **changes: Any) -> StepSettings:
    """Two GPUs of a node with one block of `WEIGHTS` weights, which a step computes for `FLOPS` x tokens."""
    nothing = Unit((), 0, 0, FLOAT32)
    block = Unit(((1000, WEIGHTS // 1000),), FLOPS, 2 * FLOPS, FLOAT32)
    units = ModelUnits(nothing, (block,), nothing, nothing, tied=True)
    settings = settings_of(
        2, 2, batch_size=2, context_len=tokens, **{"parallel": "ddp", "precision": "bf16", **changes}
    )
    return replace(settings, units=units, device=PLAIN)


def waits_without_norm(prediction: StepPrediction) -> float:
    return sum(seconds for name, seconds in prediction.waits.items() if name != "loss and norm")


def test_one_bucket_is_exposed_for_its_whole_time() -> None:
    prediction = predict_step(one_block())
    computing = 3 * FLOPS * 1000 / (989e12 * H100.reached)
    assert prediction.compute_seconds == pytest.approx(computing)
    sending = 4 * WEIGHTS / (0.8 * 450e9)  # an all-reduce of 2 ranks sends its buffer once
    assert waits_without_norm(prediction) == pytest.approx(sending + (8.4 + 2 * 3.4) * 1e-6)
    assert prediction.seconds == pytest.approx(computing + prediction.exposed_seconds)
    assert seconds_alone(one_block()) == pytest.approx(computing)


def test_fsdp_waits_for_the_first_weights_and_the_last_gradients() -> None:
    prediction = predict_step(one_block(parallel="fsdp"))
    each = 4 * WEIGHTS / 2 / (0.8 * 450e9) + (8.4 + 3.4) * 1e-6  # half of the weights come from the other GPU
    assert prediction.waits["weights"] == pytest.approx(each)
    # and for the empty units, whose messages only have a latency (LL)
    assert prediction.waits["gradients"] == pytest.approx(each + 2 * (6.6 + 0.6) * 1e-6)


def test_a_single_gpu_waits_for_nobody() -> None:
    prediction = predict_step(settings_of(1, 1, parallel="none", micro_batch_size=4))
    assert prediction.waits == {}
    assert prediction.sent == []
    assert prediction.seconds == pytest.approx(seconds_alone(settings_of(1, 1, parallel="none", micro_batch_size=4)))


def four_blocks(tokens: int) -> tuple[_Step, list[Span], float, float]:
    """Build FSDP's step over four equal blocks; return it, its spans, and the seconds of a forward and of a message."""
    settings = one_block(tokens, parallel="fsdp", reshard_after_forward=False)
    (block,) = settings.units.blocks
    units = replace(settings.units, blocks=tuple(replace(block) for _ in range(4)))
    step = _Step(replace(settings, units=units, separate_reduce_scatter=True))
    step.build()
    message = 4 * WEIGHTS / 2 / (0.8 * 450e9) + (8.4 + 3.4) * 1e-6
    return step, step.timeline.run(), step.seconds_of(FLOPS), message


def test_weights_are_gathered_two_blocks_ahead() -> None:
    step, spans, forward, message = four_blocks(tokens=10_000)
    assert forward > 10 * message
    starts = [span.start for task, span in zip(step.timeline.tasks, spans, strict=True) if task.name == "weights"]
    # the fourth needs the buffer of the second, which is copied out when the first block has been computed
    assert starts == pytest.approx([0, message, 2 * message, message + forward])


def test_a_block_waits_for_the_reduce_scatter_before_the_last_one() -> None:
    step, spans, forward, message = four_blocks(tokens=10)
    assert message > 10 * forward
    zipped = zip(step.timeline.tasks, spans, strict=True)
    backward = [span.start for task, span in zipped if task.name == "compute" and task.seconds > 1.5 * forward]
    # the second block's gradients need the buffer of the first one's, and so on
    first = backward[0]
    sent = first + 2 * forward + message
    assert backward == pytest.approx([first, first + 2 * forward, sent, sent + message])


def test_inputs_of_blocks_leave_and_arrive_beside_the_blocks() -> None:
    """Four blocks, and a link to the host on which a copy takes half of a forward pass, or three times as long."""
    settings = one_block(activation_checkpointing="block", activation_offload=True)
    (block,) = settings.units.blocks
    units = replace(settings.units, blocks=tuple(replace(block) for _ in range(4)))
    forward = _Step(settings).seconds_of(FLOPS)
    nbytes = offloaded_bytes(settings.config, settings.plan)
    assert nbytes == 2 * 1000 * SMALL["d_model"]
    waits = {}
    for copies in (0.5, 3):
        link = nbytes / (0.8 * copies * forward)
        device = replace(settings.device, host_link=link)
        waits[copies] = predict_step(replace(settings, units=units, device=device)).waits.get("inputs of blocks", 0)
        expected = 2 * (settings.config.num_layers - 1) * copies * forward
        assert offload_seconds(settings.config, settings.plan, device) == pytest.approx(expected)
    # in forward, three blocks wait for two thirds of a copy; in backward, which takes two forwards, for a third
    assert waits == {0.5: 0, 3: pytest.approx(3 * 2 * forward + 3 * forward)}


def test_the_inputs_that_move_are_those_of_the_real_step(four_gpus: DistributedContext) -> None:
    changes: dict[str, Any] = {"parallel": "fsdp", "cp": 2, "micro_batch_size": 2, "precision": "bf16"}
    expected = settings_of(**changes, num_layers=4, activation_checkpointing="block", activation_offload=True)
    estimate = memory_estimate.estimate_memory(expected.config, four_gpus.with_mesh(expected.dims))
    assert estimate.host_bytes == 3 * offloaded_bytes(expected.config, expected.plan) > 0


LARGE: dict[str, Any] = {
    "num_layers": 8,
    "num_heads": 16,
    "d_model": 2048,
    "d_ff": 8192,
    "vocab_size": 32000,
    "context_len": 2048,
    "precision": "bf16",
    "micro_batch_size": 1,
    "batch_size": 128,
}


def test_with_infinite_bandwidth_only_latency_is_left() -> None:
    for mode in ("ddp", "fsdp", "hsdp"):
        settings = settings_of(64, 8, parallel=mode, **LARGE)
        fast = replace(settings, device=replace(H100, neighbours=math.inf, network=math.inf))
        messages = len(predict_step(fast).sent)
        assert predict_step(fast).exposed_seconds < messages * 100e-6
        assert predict_step(fast).exposed_seconds < predict_step(settings).exposed_seconds


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_more_bandwidth_never_makes_a_step_longer(mode: str) -> None:
    settings = settings_of(64, 8, parallel=mode, **LARGE)
    devices = [replace(H100, network=25e9 * factor) for factor in (1, 2, 4, 8, 16)]
    seconds = [predict_step(replace(settings, device=device)).seconds for device in devices]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 1.5 * seconds[-1]


def test_kept_weights_are_not_gathered_again() -> None:
    slow = replace(H100, network=50e9)
    settings = settings_of(64, 8, slow, parallel="fsdp", **LARGE)
    kept = replace(settings, config=replace(settings.config, reshard_after_forward=False))
    assert predict_step(kept).seconds < predict_step(settings).seconds


def test_a_separate_group_overlaps_both_directions() -> None:
    settings = settings_of(64, 8, replace(H100, network=50e9), parallel="fsdp", **LARGE)
    separate = replace(settings, separate_reduce_scatter=True)
    assert predict_step(separate).seconds < predict_step(settings).seconds
    assert predict_step(separate).sent == predict_step(settings).sent


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"activation_checkpointing": "block"}], ids=str)
def test_the_flops_of_all_units_are_those_of_the_model(changes: dict[str, Any]) -> None:
    config = TrainingConfig(**{**SMALL, **changes})
    with torch.device("meta"):
        model = TransformerLM(config)
    units = units_of(model, config)
    flops = sum(unit.forward_flops + unit.backward_flops for unit in (*units.blocks, units.head))
    repeated = sum(unit.forward_flops for unit in units.blocks) if "activation_checkpointing" in changes else 0
    assert flops - repeated == pytest.approx(model.flops_per_token())
    assert units.num_weights == sum(param.numel() for param in model.parameters())


def test_the_prediction_needs_no_torch() -> None:
    code = "import sys, tinytrain_dist.training.step_timeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
