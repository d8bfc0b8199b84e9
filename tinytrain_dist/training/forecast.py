"""Forecast a run on other machines: whether it fits in memory, what it sends, how long a step takes at best.

Sizes come from simulating the trainer's own step in a fake process group, speeds from the table of devices. The time is
a lower bound, because computation and communication are assumed to overlap fully.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, get_args

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.sections import Mode
from tinytrain_dist.distributed.batch_plan import BatchPlan, possible_micro_batch_sizes
from tinytrain_dist.distributed.context import DistributedContext, shutdown
from tinytrain_dist.distributed.fake_backend import ACTIVATION_EXCHANGE, fake_context
from tinytrain_dist.distributed.parallel_dims import ParallelDims, choose_parallel_dims
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.device_specs import GIB, REACHABLE_SHARE_OF_LINKS, DeviceSpec, product_type
from tinytrain_dist.optim.costs import update_work
from tinytrain_dist.training.memory_estimate import USABLE_MEMORY, MemoryEstimate, estimate_memory
from tinytrain_dist.training.memory_fitting import keep_gathered_weights, smaller_settings
from tinytrain_dist.training.step_timeline import offload_seconds
from tinytrain_dist.utils.text import format_changes

# FLOPs of a step by activation_checkpointing, relative to "none". A third of them are in the forward pass, and "block"
# computes it twice.
RECOMPUTATION_FACTORS = {"none": 1.0, "selective": 1.0, "block": 4 / 3}
SMALL_CHUNK_TOKENS = 2048  # a value of loss_chunk_tokens with which head and loss need little memory
MIN_GIB = 0.095  # smaller sizes are shown in MiB


@dataclass(frozen=True)
class Cluster:
    """The machines of a forecast, as `--nodes`, `--devices-per-node`, `--device` and other options describe them."""

    nodes: int
    per_node: int
    device: DeviceSpec

    @property
    def num_devices(self) -> int:
        """Number of devices on all nodes; each has one process."""
        return self.nodes * self.per_node

    @property
    def device_type(self) -> str:
        """Type of the devices, cpu or cuda."""
        return "cpu" if self.device.name == "cpu" else "cuda"

    @property
    def room(self) -> float:
        """Bytes that tensors may use on one device."""
        return USABLE_MEMORY * self.device.memory - self.device.context

    @property
    def host_room(self) -> float:
        """Bytes of the host's memory that each of its devices may use."""
        return USABLE_MEMORY * self.device.host_memory

    def fits(self, estimate: MemoryEstimate) -> bool:
        """Return whether the memory of a rank fits, on its device and on its host."""
        return estimate.nbytes <= self.room and estimate.host_bytes <= self.host_room


def cluster_of(num_devices: int, per_node: int, device: DeviceSpec) -> Cluster:
    """Return so many devices, on nodes with `per_node` devices or on a part of one."""
    return Cluster(max(1, num_devices // per_node), min(num_devices, per_node), device)


@contextmanager
def simulated_ranks(cluster: Cluster) -> Iterator[DistributedContext]:
    """Simulate a rank on each device of a cluster while the block runs. No process group may be open."""
    context = fake_context(cluster.num_devices, cluster.per_node, cluster.device_type)
    try:
        yield context
    finally:
        shutdown()


@dataclass(frozen=True)
class Forecast:
    """One way to distribute the run: its memory estimate, and lower bounds of the time of a step."""

    config: TrainingConfig
    parallel_dims: ParallelDims
    plan: BatchPlan
    estimate: MemoryEstimate
    fits: bool
    inside_bytes: float  # that a rank sends to ranks of its node in a step
    across_bytes: float  # that a node sends to other nodes in a step
    compute_seconds: float
    matrix_seconds: float  # of compute_seconds, to orthogonalize matrices on the busiest rank
    inside_seconds: float
    across_seconds: float
    host_seconds: float  # to send inputs of blocks to the host and back

    @property
    def seconds(self) -> float:
        """Lower bound of the seconds of a step: computation and communication overlap fully."""
        return max(self.compute_seconds, self.inside_seconds, self.across_seconds, self.host_seconds)


def peak_flops(config: TrainingConfig, device: DeviceSpec) -> float:
    """Return the device's peak in FLOP/s with the precision of the configuration."""
    return device.peak_flops(product_type(config.precision, config.reproducible))


def forecast(config: TrainingConfig, context: DistributedContext, cluster: Cluster, flops_per_token: float) -> Forecast:
    """Forecast the memory, the communication and the time of a step on this cluster.

    context: of a fake process group with as many ranks as the cluster has devices. Errors: ConfigError.
    """
    ranks = (context.world_size, context.local_world_size)
    dims = choose_parallel_dims(config, *ranks, device_type=cluster.device_type)
    result = _forecast_on(dims, config, context, cluster, flops_per_token)
    if config.parallel == "auto" and dims.mode == "ddp" and not result.fits:
        dims = choose_parallel_dims(config, *ranks, fits=False)
        result = _forecast_on(dims, config, context, cluster, flops_per_token)
    return result


def _forecast_on(
    dims: ParallelDims,
    config: TrainingConfig,
    context: DistributedContext,
    cluster: Cluster,
    flops_per_token: float,
) -> Forecast:
    """Forecast the run on one mesh; micro_batch_size = auto becomes the largest size that fits."""
    meshed = context.with_mesh(dims)
    if cluster.device_type == "cuda":
        config = keep_gathered_weights(config, meshed, cluster.room)
    if config.micro_batch_size == "auto":
        config = replace(config, micro_batch_size=_largest_fitting_size(config, meshed, cluster.room))
    plan = BatchPlan.make(config, dims)
    estimate = estimate_memory(config, meshed)
    inside_bytes, across_bytes = sent_bytes(estimate, cluster)
    device = cluster.device
    recomputation = RECOMPUTATION_FACTORS[config.activation_checkpointing]
    largest_share = plan.accumulation_steps * plan.micro_batch_size * plan.context_len / plan.cp
    flops_per_rank = flops_per_token * recomputation * largest_share
    matrix_flops = max(update_work(config, dims.weight_replicas, dims.weight_shards).owned_flops())
    matrix_peak = device.peak_flops("bf16") if cluster.device_type == "cuda" else peak_flops(config, device)
    matrix_seconds = matrix_flops / (matrix_peak * device.reached)
    return Forecast(
        config=config,
        parallel_dims=dims,
        plan=plan,
        estimate=estimate,
        fits=cluster.fits(estimate),
        inside_bytes=inside_bytes,
        across_bytes=across_bytes,
        compute_seconds=flops_per_rank / (peak_flops(config, device) * device.reached) + matrix_seconds,
        matrix_seconds=matrix_seconds,
        inside_seconds=inside_bytes / device.neighbours / REACHABLE_SHARE_OF_LINKS,
        across_seconds=across_bytes / device.network / REACHABLE_SHARE_OF_LINKS,
        host_seconds=offload_seconds(config, plan, device),
    )


def _largest_fitting_size(config: TrainingConfig, meshed: DistributedContext, room_bytes: float) -> int:
    """Return the largest micro-batch size whose estimate is within `room_bytes`; the smallest if none is."""
    assert meshed.parallel_dims is not None
    sizes = possible_micro_batch_sizes(config, meshed.parallel_dims)

    def needed_bytes(size: int) -> int:
        return estimate_memory(replace(config, micro_batch_size=size), meshed).nbytes

    num_fitting = bisect_right(sizes, room_bytes, key=needed_bytes)
    return sizes[max(1, num_fitting) - 1]


def sent_bytes(estimate: MemoryEstimate, cluster: Cluster) -> tuple[float, float]:
    """Return the bytes that a step sends from a rank to ranks of its node, and from its node to other nodes.

    The volumes are those of ring algorithms. In a ring of n ranks, each rank sends (n - 1) / n of the buffer, twice for
    an all-reduce, and one rank of each node sends to the next node. In an all-to-all, each rank receives its own part.
    """
    inside = 0.0
    across = 0.0
    for ranks, operations in estimate.sent.items():
        group_size = len(ranks)
        node = ranks[0] // cluster.per_node
        ranks_here = sum(rank // cluster.per_node == node for rank in ranks)
        for operation, nbytes in operations.items():
            if "alltoall" in operation or operation == ACTIVATION_EXCHANGE:
                inside += nbytes * (ranks_here - 1) / group_size
                across += cluster.per_node * nbytes * (group_size - ranks_here) / group_size
                continue
            rounds = 2 if "allreduce" in operation else 1
            ring_bytes = rounds * nbytes * (group_size - 1) / group_size
            if ranks_here > 1:
                inside += ring_bytes
            if ranks_here < group_size:
                rings_per_node = cluster.per_node / ranks_here  # each rank of a node belongs to one of them
                across += ring_bytes * rings_per_node
    return inside, across


def other_modes(config: TrainingConfig, cluster: Cluster) -> Iterator[TrainingConfig]:
    """Yield the same run in every mode that this cluster allows."""
    for mode in get_args(Mode):
        # dp_replicate and dp_shard are meant for the configured mode only
        unset_sizes: dict[str, Any] = {} if mode == config.parallel else {"dp_replicate": None, "dp_shard": None}
        try:
            changed = replace(config, **unset_sizes, parallel=mode)
            dims = choose_parallel_dims(changed, cluster.num_devices, cluster.per_node, device_type=cluster.device_type)
            BatchPlan.make(changed, dims)
        except ConfigError:
            continue
        if dims.mode == mode:
            yield changed


def suggest_change(
    now: Forecast, others: list[Forecast], context: DistributedContext, cluster: Cluster, flops_per_token: float
) -> str:
    """Describe the change with which the run fits: of one setting if possible, or of several, or more devices.

    others: the forecasts of the run in other modes.
    """
    fixed = replace(now.config, micro_batch_size=now.plan.micro_batch_size)
    meshed = replace(context, parallel_dims=now.parallel_dims)

    def changed_settings(offload: bool) -> Iterator[tuple[dict[str, Any], Forecast]]:
        for change in smaller_settings(fixed, meshed):
            if ("activation_offload" in change) != offload:
                continue
            if "micro_batch_size" in change:  # not only the next smaller size, but the largest that fits
                changed = forecast(replace(fixed, micro_batch_size="auto"), context, cluster, flops_per_token)
                yield {"micro_batch_size": changed.plan.micro_batch_size}, changed
            else:
                yield change, forecast(replace(fixed, **change), context, cluster, flops_per_token)

    in_other_modes = ((_mode_changes(now.config, other.config), other) for other in others)
    for changes, changed in chain(changed_settings(offload=False), in_other_modes, changed_settings(offload=True)):
        if changed.fits:
            return f"fits {format_changes(changes)}: {format_gib(changed.estimate.nbytes)} of tensors"
    all_changes = _all_changes(fixed, [now, *others], cluster)
    smallest = forecast(replace(fixed, **all_changes), context, cluster, flops_per_token)
    needed = format_gib(smallest.estimate.nbytes)
    if smallest.fits:
        return f"fits {format_changes(all_changes)}: {needed} of tensors"
    return f"does not fit even {format_changes(all_changes)}: {needed}; use more or larger devices"


def _mode_changes(config: TrainingConfig, other: TrainingConfig) -> dict[str, Any]:
    """Return which settings of a mode `other` has different."""
    names = ("parallel", "dp_replicate", "dp_shard")
    return {name: getattr(other, name) for name in names if getattr(other, name) != getattr(config, name)}


def _all_changes(config: TrainingConfig, forecasts: list[Forecast], cluster: Cluster) -> dict[str, Any]:
    """Return the settings with which the run needs least memory. forecasts: by mode, the configured mode first."""
    changes: dict[str, Any] = {"activation_checkpointing": "block"}
    if cluster.device_type == "cuda":
        changes["activation_offload"] = True
    if not config.reproducible:  # in reproducible mode the bits depend on the micro-batch size
        changes["micro_batch_size"] = 1
    changes["loss_chunk_tokens"] = min(SMALL_CHUNK_TOKENS, config.loss_chunk_tokens or SMALL_CHUNK_TOKENS)
    smallest = min(forecasts, key=lambda each: each.estimate.nbytes).config
    return changes | _mode_changes(config, smallest)


def format_gib(nbytes: float) -> str:
    """Format a size in GiB, or a small one in MiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= MIN_GIB * GIB else f"{nbytes / 2**20:.1f} MiB"
