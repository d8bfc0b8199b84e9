"""Find how a model can be trained with longer contexts: on how many GPUs, and with which settings.

Must not know how results are printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tinytrain_dist.config.batch_sizes import divisors
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.device_specs import DeviceSpec
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.training.forecast import (
    RECOMPUTATION_FACTORS,
    Cluster,
    Forecast,
    cluster_of,
    forecast,
    simulated_ranks,
)
from tinytrain_dist.training.scaling import MAX_MICRO_STEPS, PredictedStep, predicted_step

MAX_NODES = 128
MAX_CONTEXT = 1 << 24  # tokens; the loss of more has so many chunks that the simulation takes minutes
NOTICEABLE = 0.99  # a step that reaches this share of the highest possible MFU is fast enough
# what backward recomputes, and where it finds the inputs of blocks, from the fastest to the one with least memory
RECOMPUTATION: tuple[dict[str, Any], ...] = (
    {"activation_checkpointing": "none", "activation_offload": False},
    {"activation_checkpointing": "selective", "activation_offload": False},
    {"activation_checkpointing": "block", "activation_offload": False},
    {"activation_checkpointing": "block", "activation_offload": True},
)
# The settings that a plan chooses itself, whatever the configuration says, with values that contradict no others.
CHOSEN_SETTINGS: dict[str, Any] = {
    "cp": 1,
    **RECOMPUTATION[0],
    "micro_batch_size": 1,
    "batch_size_warmup": None,
    "parallel": "fsdp",
    "dp_replicate": None,
    "dp_shard": None,
    "reshard_after_forward": None,
    "fingerprint_every": None,
}


@dataclass(frozen=True)
class ContextPlan:
    """A context on a number of GPUs.

    * `step`: the fastest step that fits in memory; None if none fits.
    * `smallest`: the forecast with the most ranks for each sequence. If none fits, it has least memory.
    """

    context_len: int
    cluster: Cluster
    step: PredictedStep | None
    smallest: Forecast


def context_problems(config: TrainingConfig, contexts: list[int]) -> list[str]:
    """Return a sentence for each context that cannot be simulated, or that other settings do not allow."""
    problems = []
    tokens = config.batch_size * config.context_len
    for context_len in contexts:
        if context_len > MAX_CONTEXT:
            problems.append(f"{context_len} is too large to be simulated; give at most {MAX_CONTEXT}")
        elif (sequences := tokens // context_len) > MAX_MICRO_STEPS:
            problems.append(
                f"{context_len} makes {sequences} sequences of the {tokens} tokens of a step, too many to be "
                f"simulated; give at least {-(-tokens // MAX_MICRO_STEPS)}, or set a smaller --batch-size"
            )
        else:
            try:
                _changed(config, context_len, 1, 1, RECOMPUTATION[0])
            except ConfigError as error:
                problems += [f"{context_len} is not possible: {problem}" for problem in error.problems]
    return problems


def context_plans(
    config: TrainingConfig, contexts: list[int], device: DeviceSpec, per_node: int, numbers_of_gpus: tuple[int, ...]
) -> Iterator[ContextPlan]:
    """Yield a plan for each context on each number of GPUs.

    Without numbers_of_gpus: on the smallest number on which the context fits, and on a node if that is larger. Each
    cluster is simulated in a process group of its own, so none may be open. Errors: ConfigError for a context with
    `context_problems`.
    """
    for context_len in contexts:
        counts = numbers_of_gpus or _smallest_and_node(config, context_len, device, per_node)
        for count in counts:
            yield _best_plan(config, context_len, cluster_of(count, per_node, device))


def _smallest_and_node(config: TrainingConfig, context_len: int, device: DeviceSpec, per_node: int) -> tuple[int, ...]:
    """Return the smallest number of GPUs on which a context fits, and that of a node if it is larger.

    Returns the largest number that is tried if the context fits on none.
    """
    parts_of_node = [count for count in divisors(per_node) if count < per_node]
    nodes = [per_node << exponent for exponent in range(MAX_NODES.bit_length())]
    for count in (*parts_of_node, *nodes):
        cluster = cluster_of(count, per_node, device)
        with simulated_ranks(cluster) as context:
            cp = _degrees(config, context_len, cluster)[-1]
            # the last one needs least memory of a GPU, and the one before it none of the host
            least = reversed(RECOMPUTATION[-2:])
            if any(_forecast(config, context_len, cp, each, context, cluster).fits for each in least):
                break
    return (count, per_node) if count < per_node else (count,)


def _best_plan(config: TrainingConfig, context_len: int, cluster: Cluster) -> ContextPlan:
    """Return the plan with the fastest settings that fit.

    Each value of cp is tried with the first recomputation that fits. Fewer ranks for each sequence need more memory, so
    they need at least the recomputation of more ranks.
    """
    best: PredictedStep | None = None
    smallest: Forecast | None = None
    remaining = RECOMPUTATION
    with simulated_ranks(cluster) as context:
        for cp in reversed(_degrees(config, context_len, cluster)):
            planned = _forecast(config, context_len, cp, remaining[0], context, cluster)
            while not planned.fits and len(remaining) > 1 and _may_be_faster(remaining[1], best, cluster):
                remaining = remaining[1:]
                planned = _forecast(config, context_len, cp, remaining[0], context, cluster)
            smallest = smallest or planned
            if not planned.fits:
                break
            step = predicted_step(planned, context, cluster, _flops_per_token(planned.config))
            assert step is not None, "the caller refuses CPUs and reproducible mode"
            best = step if best is None or step.mfu > best.mfu else best
            if not _may_be_faster(remaining[0], best, cluster):
                break
    assert smallest is not None, "cp can be 1"
    return ContextPlan(context_len, cluster, best, smallest)


def _may_be_faster(recomputation: dict[str, Any], best: PredictedStep | None, cluster: Cluster) -> bool:
    """Return whether steps with this recomputation may be noticeably faster than the best one so far.

    Without recomputation of whole blocks they may: a smaller cp sends less.
    """
    factor = RECOMPUTATION_FACTORS[recomputation["activation_checkpointing"]]
    return best is None or factor == 1 or best.mfu < NOTICEABLE * cluster.device.reached / factor


def _degrees(config: TrainingConfig, context_len: int, cluster: Cluster) -> list[int]:
    """Return the values of cp that keep the ranks of each sequence on one node, smallest first."""
    return divisors(math.gcd(cluster.per_node, config.num_heads, context_len))


def _forecast(
    config: TrainingConfig,
    context_len: int,
    cp: int,
    recomputation: dict[str, Any],
    context: DistributedContext,
    cluster: Cluster,
) -> Forecast:
    """Forecast a step with this context."""
    changed = _changed(config, context_len, cp, cluster.num_devices, recomputation)
    return forecast(changed, context, cluster, _flops_per_token(changed))


def _changed(
    config: TrainingConfig, context_len: int, cp: int, num_devices: int, recomputation: dict[str, Any]
) -> TrainingConfig:
    """Return the settings of a step with this context. Errors: ConfigError.

    Weights are sharded over all ranks, and gathered again for backward. The batch has about as many tokens as that of
    the configuration, and a sequence for each data-parallel rank.
    """
    data_ranks = num_devices // cp
    tokens = config.batch_size * config.context_len
    changes = {
        **CHOSEN_SETTINGS,
        "context_len": context_len,
        "cp": cp,
        "batch_size": data_ranks * max(1, tokens // (context_len * data_ranks)),
        **recomputation,
    }
    if num_devices > 1:
        changes["reshard_after_forward"] = True
    else:
        changes["parallel"] = "none"
    return replace(config, **changes)


def _flops_per_token(config: TrainingConfig) -> float:
    with torch.device("meta"):
        return TransformerLM(config).flops_per_token()
