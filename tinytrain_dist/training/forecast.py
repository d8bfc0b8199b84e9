"""Forecast a run on machines that are not there: whether it fits, what it sends, how long a step takes at best.

Sizes come from simulating the trainer's own step in a fake process group, speeds from the table of devices.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from tinytrain_dist.config.schema import Mode, TrainingConfig
from tinytrain_dist.distributed.batch_plan import BatchPlan, possible_micro_batch_sizes
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.parallel_dims import ParallelDims, choose_parallel_dims
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.device_specs import GIB, REACHABLE_SHARE_OF_LINKS, DeviceSpec
from tinytrain_dist.training.fitting import smaller_settings
from tinytrain_dist.training.memory_estimate import USABLE_MEMORY, MemoryEstimate, estimate_memory

RECOMPUTED = {"none": 1.0, "selective": 1.0, "block": 4 / 3}  # a third of the products is forward's, done twice


@dataclass(frozen=True)
class Cluster:
    """The machines: what `--nodes`, `--devices-per-node`, `--device` and `--network` say."""

    nodes: int
    per_node: int
    device: DeviceSpec

    @property
    def room(self) -> float:
        """Bytes that tensors may take on one device."""
        return USABLE_MEMORY * self.device.memory - self.device.context


@dataclass(frozen=True)
class Forecast:
    """One way to spread the run: its estimate, and lower bounds of the time of a step, in seconds."""

    config: TrainingConfig
    parallel_dims: ParallelDims
    plan: BatchPlan
    estimate: MemoryEstimate
    fits: bool
    inside: float  # bytes that a rank sends to ranks of its node in a step
    across: float  # bytes that a node sends to other nodes in a step
    compute_seconds: float
    inside_seconds: float
    across_seconds: float

    @property
    def seconds(self) -> float:
        """A step at best: computing and sending at the same time."""
        return max(self.compute_seconds, self.inside_seconds, self.across_seconds)


def forecast(config: TrainingConfig, context: DistributedContext, world: Cluster, flops: float) -> Forecast:
    """Forecast what the run would hold, send and take on this cluster; `flops` per token. Errors: ConfigError."""
    shape = (context.world_size, context.local_world_size)
    dims = choose_parallel_dims(config, *shape)
    found = _on(config, context, dims, world, flops)
    if config.parallel == "auto" and dims.mode == "ddp" and not found.fits:
        found = _on(config, context, choose_parallel_dims(config, *shape, fits=False), world, flops)
    return found


def _on(
    config: TrainingConfig, context: DistributedContext, dims: ParallelDims, world: Cluster, flops: float
) -> Forecast:
    spread = context.with_mesh(dims)
    if config.micro_batch_size == "auto":
        sizes, unset = possible_micro_batch_sizes(config, dims), config

        def need(size: int) -> int:
            return estimate_memory(replace(unset, micro_batch_size=size), spread).nbytes

        config = replace(config, micro_batch_size=sizes[max(1, bisect_right(sizes, world.room, key=need)) - 1])
    plan = BatchPlan.make(config, dims)
    found = estimate_memory(config, spread)
    inside, across = sent_bytes(found, world)
    device = world.device
    peak = device.bf16_flops if config.precision == "bf16" else device.fp32_flops
    work = flops * RECOMPUTED[config.activation_checkpointing] * plan.tokens_per_step / plan.ranks
    seconds = [work / (peak * device.reached), inside / device.neighbours, across / device.network]
    seconds[1:] = [each / REACHABLE_SHARE_OF_LINKS for each in seconds[1:]]
    return Forecast(config, dims, plan, found, found.nbytes <= world.room, inside, across, *seconds)


def sent_bytes(found: MemoryEstimate, world: Cluster) -> tuple[float, float]:
    """Bytes of a step: from a rank to ranks of its node, and from its node to others, with the volumes of rings.

    A ring over n ranks moves (n - 1) / n of the buffer past each rank, twice for an all-reduce, and leaves each node
    once; an all-to-all sends each rank its own part.
    """
    inside = across = 0.0
    for ranks, operations in found.sent.items():
        size = len(ranks)
        here = sum(rank // world.per_node == ranks[0] // world.per_node for rank in ranks)
        for name, nbytes in operations.items():
            ring = nbytes * (size - 1) / size * (2 if "allreduce" in name else 1)
            if "alltoall" in name:
                inside += nbytes * (here - 1) / size
                across += world.per_node * nbytes * (size - here) / size
                continue
            inside += ring if here > 1 else 0.0
            across += ring * world.per_node / here if here < size else 0.0
    return inside, across


def other_modes(config: TrainingConfig, world: Cluster) -> Iterator[TrainingConfig]:
    """Yield the same run in every mode that this cluster allows."""
    ranks = world.nodes * world.per_node
    for mode in get_args(Mode):
        sizes: dict[str, Any] = {} if mode == config.parallel else {"dp_replicate": None, "dp_shard": None}
        changed = replace(config, **sizes, parallel=mode)
        try:
            dims = choose_parallel_dims(changed, ranks, world.per_node)
            BatchPlan.make(changed, dims)
        except ConfigError:
            continue
        if dims.mode == mode:
            yield changed


def suggest_change(
    now: Forecast, others: list[Forecast], context: DistributedContext, world: Cluster, flops: float
) -> str:
    """Name the setting to change so that the run fits, or several settings, or what is missing."""
    micro = now.plan.micro_batch_size
    fixed = replace(now.config, micro_batch_size=micro)
    spread = replace(context, parallel_dims=now.parallel_dims)
    for change in smaller_settings(fixed, spread):
        if "micro_batch_size" in change:
            found = forecast(replace(fixed, micro_batch_size="auto"), context, world, flops)
            change = {"micro_batch_size": found.plan.micro_batch_size}
        else:
            found = forecast(replace(fixed, **change), context, world, flops)
        if found.fits:
            return f"fits with {format_settings(change)}: {format_gib(found.estimate.nbytes)} of tensors"
    for other in others:
        if other.fits:
            return f"fits with parallel = {other.parallel_dims.mode}: {format_gib(other.estimate.nbytes)} of tensors"
    everything: dict[str, Any] = {"activation_checkpointing": "block"}
    if not fixed.reproducible:
        everything |= {"micro_batch_size": 1}
    everything["loss_chunk_tokens"] = min(2048, fixed.loss_chunk_tokens or 2048)
    sharded = min([now, *others], key=lambda each: each.estimate.nbytes).config
    if sharded.parallel != now.config.parallel:
        everything["parallel"] = sharded.parallel
    if everything.get("parallel", "hsdp") != "hsdp":
        fixed = replace(fixed, parallel="auto", dp_replicate=None, dp_shard=None)
    found = forecast(replace(fixed, **everything), context, world, flops)
    if found.fits:
        return f"fits with {format_settings(everything)}: {format_gib(found.estimate.nbytes)} of tensors"
    needed = format_gib(found.estimate.nbytes)
    return f"does not fit even with {format_settings(everything)}: {needed}; use more or larger devices"


def format_settings(change: dict[str, Any]) -> str:
    """Format settings as `name = value, ...`."""
    return ", ".join(f"{name} = {value}" for name, value in change.items())


def format_gib(nbytes: float) -> str:
    """Format a size in GiB, or a small one in MiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= 0.095 * GIB else f"{nbytes / 2**20:.1f} MiB"
