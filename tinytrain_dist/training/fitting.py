"""TODO docstring of training.fitting."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import Any

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.batch_plan import BatchPlan, possible_micro_batch_sizes
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.model.loss import MAX_CHUNK_LOGITS
from tinytrain_dist.training.memory_estimate import estimate_memory, memory_row


def fitting_micro_batch_sizes(
    sizes: list[int], room: float, config: TrainingConfig, context: DistributedContext, double: Any
) -> list[int]:
    """Those micro-batch sizes (given smallest first) whose estimate is within `room` bytes, at least the smallest."""

    def need(size: int) -> int:
        return estimate_memory(replace(config, micro_batch_size=size), context, double).nbytes

    return sizes[: max(1, bisect_right(sizes, room, key=need))]


def memory_report(config: TrainingConfig, context: DistributedContext, double: Any) -> str:
    """For a run that is out of memory: what a rank holds, and what it would hold with other settings."""
    now = estimate_memory(config, context, double)
    lines = ["one step holds on one rank, by the estimate (fragments and libraries not counted):", now.table()]
    for change in smaller_settings(config, context):
        nbytes = estimate_memory(replace(config, **change), context, double).nbytes
        if nbytes < now.nbytes:
            text = ", ".join(f"{name} = {value}" for name, value in change.items())
            lines.append(memory_row(f"with {text}", nbytes))
    return "\n".join([*lines, "set what fits, use more devices with parallel = fsdp, or set micro_batch_size = auto"])


def smaller_settings(config: TrainingConfig, context: DistributedContext) -> list[dict[str, Any]]:
    """Changes of one setting that make a step hold less and train the same, the cheapest first."""
    assert context.parallel_dims is not None
    micro = BatchPlan.make(config, context.parallel_dims).micro_batch_size
    changes: list[dict[str, Any]] = []
    if (config.loss_chunk_tokens or 0) * (config.vocab_size or 0) > MAX_CHUNK_LOGITS:
        changes.append({"loss_chunk_tokens": None})
    if not config.reproducible:  # there it decides bits
        smaller = [size for size in possible_micro_batch_sizes(config, context.parallel_dims) if size < micro]
        changes += [{"micro_batch_size": size} for size in smaller[-1:]]
    later = ("none", "selective", "block")
    place = later.index(config.activation_checkpointing)
    changes += [{"activation_checkpointing": how} for how in later[place + 1 :]]
    return changes
