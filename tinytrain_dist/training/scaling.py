"""Predict the steps of a run in several modes and on several numbers of GPUs, from forecasts and simulated timelines.

Must not know how results are printed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.collective_times import RankGroup, all_to_all_time
from tinytrain_dist.metrics.device_specs import DeviceSpec
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.parallel.parallelize import bucket_megabytes, wants_separate_reduce_scatters
from tinytrain_dist.training.forecast import Cluster, Forecast, forecast, peak_flops, simulated_ranks
from tinytrain_dist.training.step_timeline import (
    CONTEXT,
    StepPrediction,
    StepSettings,
    predict_step,
    seconds_alone,
    units_of,
)

SHARED_MODES = ("ddp", "fsdp", "hsdp")  # the modes for several GPUs
MAX_MICRO_STEPS = 4096  # of a rank in a step: each is simulated, which takes milliseconds and kilobytes


@dataclass(frozen=True)
class PredictedStep:
    """A forecast with its simulated timeline.

    * `mfu`: FLOPs of the model (without recomputation) as a share of the peak.
    * `efficiency`: speed of a GPU relative to one that holds the whole model and computes the same micro-steps alone.
      It can be above 1, because a GPU that holds a shard updates fewer weights.
    """

    forecast: Forecast
    timeline: StepPrediction
    mfu: float
    efficiency: float


def predicted_step(
    planned: Forecast, context: DistributedContext, cluster: Cluster, flops_per_token: float
) -> PredictedStep | None:
    """Simulate the timeline of a planned step; None if it has too many micro-steps.

    Also None on CPUs and in reproducible mode, which are not modelled.
    """
    if cluster.device_type != "cuda" or planned.config.reproducible:
        return None
    if planned.plan.accumulation_steps > MAX_MICRO_STEPS:
        return None
    meshed = replace(context, parallel_dims=planned.parallel_dims)
    with torch.device("meta"):
        model = TransformerLM(planned.config)
    settings = StepSettings(
        units_of(model, planned.config),
        planned.config,
        planned.parallel_dims,
        planned.plan,
        cluster.device,
        cluster.per_node,
        bucket_megabytes(meshed, "cuda"),
        wants_separate_reduce_scatters(planned.config, meshed, "cuda"),
    )
    timeline = predict_step(settings)
    flops = flops_per_token * planned.plan.tokens_per_step / planned.plan.world_size
    mfu = flops / timeline.seconds / peak_flops(planned.config, cluster.device)
    return PredictedStep(planned, timeline, mfu, seconds_alone(settings) / timeline.seconds)


@dataclass(frozen=True)
class ExchangeCost:
    """What context parallelism costs in a step.

    * `sent_bytes`: from each rank to the other ranks of its sequences.
    * `seconds`: on one node, where these ranks are. Computation waits for all of it.
    * `seconds_across`: if half of these ranks were on a second node.
    """

    sent_bytes: float
    seconds: float
    seconds_across: float


def exchange_cost(step: PredictedStep, device: DeviceSpec, per_node: int) -> ExchangeCost | None:
    """Return what the exchange of parts of sequences costs; None without context parallelism.

    per_node: devices of a node, which share its network, also those that this run does not use.
    """
    cp = step.forecast.plan.cp
    if cp == 1:
        return None
    messages = Counter(nbytes for group, _, nbytes in step.timeline.sent if group == CONTEXT)

    def seconds(ranks_of_node: int) -> float:
        group = RankGroup(cp, ranks_of_node, per_node)
        return sum(count * all_to_all_time(size, group, device).seconds for size, count in messages.items())

    sent_bytes = (cp - 1) / cp * sum(size * count for size, count in messages.items())
    return ExchangeCost(sent_bytes, seconds(cp), seconds(max(1, cp // 2)))


def scaled_steps(
    config: TrainingConfig, clusters: list[Cluster], batch_per_gpu: int | None, flops_per_token: float
) -> Iterator[tuple[Cluster, str, PredictedStep | ConfigError]]:
    """Yield cluster, mode and prediction for every mode on every cluster, or why that combination cannot run.

    batch_per_gpu: sequences of a step for each GPU (weak scaling). None: the batch_size of the configuration on every
    cluster (strong scaling). Each cluster is simulated in a process group of its own, so none may be open.
    """
    for cluster in clusters:
        with simulated_ranks(cluster) as context:
            for mode in SHARED_MODES:
                if mode == "hsdp" and cluster.nodes == 1:
                    continue  # one replica on one node is fsdp
                yield cluster, mode, _scaled_step(config, mode, context, cluster, batch_per_gpu, flops_per_token)


def _scaled_step(
    config: TrainingConfig,
    mode: str,
    context: DistributedContext,
    cluster: Cluster,
    batch_per_gpu: int | None,
    flops_per_token: float,
) -> PredictedStep | ConfigError:
    changes: dict[str, Any] = {"parallel": mode, "dp_replicate": None, "dp_shard": None}
    if batch_per_gpu is not None:
        changes |= {"batch_size": batch_per_gpu * cluster.num_devices, "batch_size_warmup": None}
    if mode == "ddp":
        changes["reshard_after_forward"] = None  # a setting of the other modes
    try:
        changed = replace(config, **changes)
        choose_parallel_dims(changed, cluster.num_devices, cluster.per_node)
        planned = forecast(changed, context, cluster, flops_per_token)
    except ConfigError as error:
        return error
    if (steps := planned.plan.accumulation_steps) > MAX_MICRO_STEPS:
        return ConfigError(f"{steps} micro-steps of a GPU are too many to be simulated; set a larger micro_batch_size")
    predicted = predicted_step(planned, context, cluster, flops_per_token)
    assert predicted is not None, "the caller refuses CPUs and reproducible mode"
    return predicted
