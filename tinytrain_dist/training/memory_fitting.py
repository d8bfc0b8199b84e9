"""Make a run fit in memory: choose the mesh and the micro-batch size, and suggest settings that need less memory."""

from __future__ import annotations

import gc
from bisect import bisect_right
from dataclasses import replace
from typing import Any

import torch

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.batch_plan import BatchPlan, possible_micro_batch_sizes
from tinytrain_dist.distributed.context import CONTEXT, REPLICATE, SHARD, DistributedContext
from tinytrain_dist.distributed.fake_backend import NoCommunication
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims, describe_modes
from tinytrain_dist.distributed.spares import usable_ranks
from tinytrain_dist.errors import ConfigError, TrainingError
from tinytrain_dist.metrics.device_stats import free_memory_bytes
from tinytrain_dist.metrics.phase_timer import PhaseTimer
from tinytrain_dist.model.loss import MAX_CHUNK_LOGITS, MAX_CHUNK_LOGITS_ON_CUDA
from tinytrain_dist.parallel.context_parallel import check_placement
from tinytrain_dist.reliability.world import own_world
from tinytrain_dist.training.memory_estimate import USABLE_MEMORY, empty_windows, estimate_memory, memory_row
from tinytrain_dist.training.train_step import TrainStep, build_train_step
from tinytrain_dist.utils.text import format_bytes, format_changes

MAX_GATHERED_SHARE = 0.125  # of the usable memory, for weights that stay gathered between forward and backward
LEAST_BYTES_PER_PARAMETER = 12  # weights, gradients and one moment in float32; AdamW has two
RECOMPUTATION = ("none", "selective", "block")  # values of activation_checkpointing, from most to least memory


def with_fitting_mesh(config: TrainingConfig, context: DistributedContext) -> DistributedContext:
    """Return the context with the mesh of the configuration. A collective.

    With `parallel = auto` on GPUs, DDP is chosen only for a small model that fits in the memory of each rank.
    Errors: as for `check_fewest_nodes`, `choose_parallel_dims` and `check_placement`.
    """
    check_fewest_nodes(config, context)
    ranks = (context.world_size, context.local_world_size)
    dims = choose_parallel_dims(config, *ranks, device_type=context.device.type)
    check_placement(context, dims.cp)
    meshed = context.with_mesh(dims)
    assert meshed.parallel_dims is not None
    connect_groups(meshed, context.device.type)
    if config.parallel == "auto" and meshed.parallel_dims.mode == "ddp" and context.device.type == "cuda":
        smallest = replace(config, micro_batch_size=config.fixed_micro_batch_size or 1)
        needed_bytes = estimate_memory(smallest, meshed).nbytes
        if context.any_rank(needed_bytes > usable_bytes(context)):
            meshed = context.with_mesh(choose_parallel_dims(config, *ranks, fits=False))
            connect_groups(meshed, context.device.type)
    return meshed


def connect_groups(context: DistributedContext, device_type: str) -> None:
    """On GPUs (device_type cuda), run one tiny collective in each process group. A collective.

    NCCL allocates its buffers, up to 1 GB for each group, in the first one. Memory that is measured afterwards is free.
    """
    if device_type == "cuda":
        shares_sequences = context.sequence_mesh is not None
        for axis in (None, REPLICATE, SHARD, *([CONTEXT] if shares_sequences else [])):
            context.all_reduce_sum(torch.zeros(1, device=context.device), axis)


def with_resharding(config: TrainingConfig, context: DistributedContext, device_type: str) -> TrainingConfig:
    """Return the settings, with reshard_after_forward = false if all ranks may keep gathered weights. A collective.

    On a CPU the setting stays as it is.
    """
    if device_type != "cuda":
        return config
    kept = keep_gathered_weights(config, context, usable_bytes(context))
    return config if context.any_rank(kept is config) else kept


def keep_gathered_weights(config: TrainingConfig, context: DistributedContext, room_bytes: float) -> TrainingConfig:
    """Return the settings, with reshard_after_forward = false if it is not set and gathered weights may stay.

    They may stay on a GPU if they are a small part of `room_bytes`, and the smallest step fits with them. Backward then
    gathers nothing.
    """
    assert context.parallel_dims is not None, "with_mesh comes first"
    if config.reshard_after_forward is not None or context.parallel_dims.mode not in ("fsdp", "hsdp"):
        return config
    kept = replace(config, reshard_after_forward=False)
    smallest = replace(kept, micro_batch_size=1) if config.micro_batch_size == "auto" else kept
    held = estimate_memory(smallest, context)
    gathered_bytes = max(kinds["gathered"] for kinds in held.stages.values())
    return kept if held.nbytes <= room_bytes and gathered_bytes <= MAX_GATHERED_SHARE * room_bytes else config


def check_fewest_nodes(config: TrainingConfig, context: DistributedContext) -> None:
    """Check that a rank of the smallest world of an elastic run can hold its part of the training state. A collective.

    Does nothing in another run. Errors: ConfigError on all ranks.
    """
    world = own_world()
    if world is None:
        return
    nodes = world.fewest_nodes
    per_node = context.local_world_size
    ranks = usable_ranks(config, nodes * per_node, per_node) or nodes * per_node
    dims = choose_parallel_dims(config, ranks, min(ranks, per_node))
    shards = (
        ranks if config.parallel == "auto" else dims.weight_shards
    )  # auto shards a model that does not fit otherwise
    needed = LEAST_BYTES_PER_PARAMETER * config.model.approximate_parameter_count / shards
    room = min(values[0] for values in context.all_gather_numbers([usable_bytes(context)]))
    if needed > room:
        raise ConfigError(
            f"--nnodes: with {nodes} node(s), the fewest, there are {ranks} ranks in {ranks // shards} replica(s), and "
            f"each needs {format_bytes(needed)} for its part of weights, gradients and optimizer state, but has "
            f"{format_bytes(room)}; raise MIN, or set parallel = fsdp; `tinytrain plan` shows what fits"
        )


def usable_bytes(context: DistributedContext) -> float:
    """Return how many bytes of this rank's free memory a step may use."""
    return USABLE_MEMORY * free_memory_bytes(context.device, context.local_world_size)


def build_fitting_train_step(
    config: TrainingConfig, context: DistributedContext, phase_timer: PhaseTimer
) -> tuple[TrainStep, list[str]]:
    """Build the train step. With micro_batch_size = auto, choose the largest size that fits in memory.

    A size fits if it passes the memory estimate and a trial. Returns the step, whose `config` has the chosen size, and
    lines for the log. A collective. Errors: TrainingError if not even the smallest size fits.
    """
    if config.micro_batch_size != "auto":
        return build_train_step(config, context, phase_timer), []
    assert context.parallel_dims is not None
    notes: list[str] = []
    sizes = possible_micro_batch_sizes(config, context.parallel_dims)
    room = min(context.all_gather_object(usable_bytes(context)))
    candidates = context.broadcast_object(fitting_micro_batch_sizes(sizes, room, config, context))
    for size in reversed(candidates):
        train_step = build_train_step(replace(config, micro_batch_size=size), context, phase_timer)
        if not context.any_rank(not _passes_trial(train_step)):
            return train_step, [*notes, f"micro_batch_size = auto: {size}"]
        notes.append(f"micro_batch_size {size} ran out of memory in a trial; trying the next smaller one")
        del train_step
        gc.collect()  # FSDP's modules refer to each other, so only this frees their memory
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
    report = memory_report(replace(config, micro_batch_size=sizes[0]), context)
    raise TrainingError(f"micro_batch_size: not even {sizes[0]} fits in memory\n{report}")


def _passes_trial(train_step: TrainStep) -> bool:
    """Return whether a step's passes fit in memory.

    Collectives are disabled, so an out-of-memory rank cannot block the others.
    """
    plan, config = train_step.plan, train_step.config
    share = plan.share(plan.replicate - 1, 0)  # the last replica has the most micro-steps
    last = len(share.micro_steps) - 1
    micro_steps = (0, last) if last else (0,)  # the passes in between need no more memory
    # Attention to documents is left out on a GPU: its kernel takes no more memory than the one without, but works only
    # if it is compiled.
    documents = config.document_mask and train_step.context.device.type == "cpu"
    windows = empty_windows(replace(config, document_mask=documents), len(micro_steps) * plan.micro_batch_size)
    windows = windows.take_columns(share.columns)
    try:
        with NoCommunication(), torch.compiler.set_stance("force_eager"):
            train_step.forward_backward(windows, replace(share, micro_steps=micro_steps))
            train_step.reduction.finish()
    except torch.OutOfMemoryError:
        return False
    train_step.optimizer.zero_grad(set_to_none=True)
    return True


def fitting_micro_batch_sizes(
    sizes: list[int], room_bytes: float, config: TrainingConfig, context: DistributedContext
) -> list[int]:
    """Return the `sizes` (smallest first) whose estimate is within `room_bytes`, and always the smallest size."""

    def needed_bytes(size: int) -> int:
        return estimate_memory(replace(config, micro_batch_size=size), context).nbytes

    return sizes[: max(1, bisect_right(sizes, room_bytes, key=needed_bytes))]


def memory_report(config: TrainingConfig, context: DistributedContext) -> str:
    """Describe the memory that a rank needs at its peak, and what it would need with other settings."""
    assert context.parallel_dims is not None
    current = estimate_memory(config, context)
    lines = ["estimated memory of one step on one rank (without fragmentation and libraries):", current.table()]
    remedies = []
    for change in smaller_settings(config, context):
        nbytes = estimate_memory(replace(config, **change), context).nbytes
        if nbytes < current.nbytes:
            lines.append(memory_row(format_changes(change), nbytes))
            remedies = ["use a setting that fits"]
    sharded = context.parallel_dims.mode == "fsdp"
    remedies.append("use more devices" + ("" if sharded else f" with {describe_modes(config, ('fsdp',))}"))
    if config.fixed_micro_batch_size != 1 and config.micro_batch_size != "auto" and not config.reproducible:
        remedies.append("set micro_batch_size = auto")
    return "\n".join([*lines, ", or ".join(remedies)])


def smaller_settings(config: TrainingConfig, context: DistributedContext) -> list[dict[str, Any]]:
    """Return changes that save memory and do not change the training, the cheapest first.

    Each is a change of one setting. Offload of activations also needs that they are recomputed.
    """
    assert context.parallel_dims is not None
    micro_batch_size = BatchPlan.make(config, context.parallel_dims).micro_batch_size
    changes: list[dict[str, Any]] = []
    chunk_logits = MAX_CHUNK_LOGITS_ON_CUDA if context.target_type == "cuda" else MAX_CHUNK_LOGITS
    if (config.loss_chunk_tokens or 0) * (config.vocab_size or 0) > chunk_logits:
        changes.append({"loss_chunk_tokens": None})
    if not config.reproducible:  # in reproducible mode the bits depend on the micro-batch size
        sizes = possible_micro_batch_sizes(config, context.parallel_dims)
        smaller = [size for size in sizes if size < micro_batch_size]
        changes += [{"micro_batch_size": size} for size in smaller[-1:]]
    current = RECOMPUTATION.index(config.activation_checkpointing)
    changes += [{"activation_checkpointing": choice} for choice in RECOMPUTATION[current + 1 :]]
    if context.target_type == "cuda" and not config.activation_offload:
        moved: dict[str, Any] = {"activation_checkpointing": "block", "activation_offload": True}
        changes.append({name: value for name, value in moved.items() if getattr(config, name) != value})
    return changes
