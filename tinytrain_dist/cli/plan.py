"""`tinytrain plan`: print whether a run fits in memory, what it sends and saves, and how fast it can be.

Must not know the architecture: see training/forecast.py for where the numbers come from.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from tinytrain_dist.checkpoint.safetensors_io import TensorSpec, split_into_files
from tinytrain_dist.checkpoint.snapshots.placement import Place, Placement
from tinytrain_dist.checkpoint.state_collection import collect_shards
from tinytrain_dist.cli.arguments import SETTINGS_HELP, parse_options
from tinytrain_dist.config.loading import parse_command_line, resolve_vocab_size
from tinytrain_dist.config.parameter_groups import describe_groups, has_special_groups
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import fake_backend
from tinytrain_dist.distributed.batch_plan import BatchPlans
from tinytrain_dist.distributed.context import DistributedContext, shutdown
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.device_specs import DEVICE_SPECS, REACHABLE_SHARE_OF_LINKS, DeviceSpec, find_device_spec
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.optim.build import build_optimizer, group_parameters, trained_parameters
from tinytrain_dist.optim.costs import update_work
from tinytrain_dist.parallel.device_defaults import set_device_defaults
from tinytrain_dist.training.forecast import (
    Cluster,
    Forecast,
    forecast,
    format_gib,
    other_modes,
    peak_flops,
    suggest_change,
)
from tinytrain_dist.training.memory_estimate import MEMORY_KINDS, USABLE_MEMORY, memory_row
from tinytrain_dist.training.run_length import resolve_epochs
from tinytrain_dist.training.scaling import PredictedStep, predicted_step, scaled_steps
from tinytrain_dist.training.step_timeline import StepPrediction

SECONDS_PER_DAY = 86_400
MIN_SHOWN_BYTES = 2**20  # smaller kinds of memory have no line of their own


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """See `PlanOptions.__doc__`, which is set below, because it lists the devices."""

    nodes: int = 1
    """Number of nodes."""
    devices_per_node: int | None = None
    """Number of devices on each node; there is one process for each. Default: 1, or 8 with --gpus."""
    device: str = "h100"
    """A GPU of the list above, or cpu (this machine)."""
    network: Annotated[float | None, tyro.conf.arg(metavar="GBIT", help_behavior_hint="")] = None
    """Bandwidth from a node to other nodes, in Gbit/s. Default: what nodes with this device usually have."""

    gpus: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N N ...")] = ()
    """Instead of the plan, print a table of DDP, FSDP and HSDP on each of these numbers of GPUs."""
    batch_per_gpu: int | None = None
    """With --gpus: sequences of a step for each GPU. Default: batch_size is the same on any number of GPUs."""

    def check(self) -> None:
        """Raise ConfigError with all problems."""
        numbers = {
            "nodes": self.nodes,
            "devices_per_node": self.devices_per_node,
            "network": self.network,
            "batch_per_gpu": self.batch_per_gpu,
            "gpus": min(self.gpus, default=None),
        }
        problems = [
            f"--{name.replace('_', '-')}: {value} must be at least 1"
            for name, value in numbers.items()
            if value is not None and value < 1
        ]
        problems = problems or [
            f"--gpus: {count} is not a multiple of {self.per_node} GPUs on each node; leave it out, or set "
            "--devices-per-node"
            for count in self.gpus
            if count > self.per_node and count % self.per_node
        ]
        if self.gpus and self.nodes != 1:
            problems.append("--nodes: has no effect with --gpus, which gives the number of GPUs; leave one of them out")
        if self.batch_per_gpu is not None and not self.gpus:
            problems.append("--batch-per-gpu: has no effect without --gpus; set --batch-size instead")
        if problems:
            raise ConfigError(problems, "the settings of plan")

    @property
    def per_node(self) -> int:
        """Number of devices on each node."""
        return self.devices_per_node or (8 if self.gpus else 1)


PlanOptions.__doc__ = f"""Show whether a run fits in memory, what it sends and saves, and how fast it can be.

tinytrain plan CONFIG.toml [OPTIONS] [SETTINGS]

Exit code: 0 if the run fits in memory, 1 if it does not, 2 for a mistake in the settings. {SETTINGS_HELP}

GPUs: {", ".join(DEVICE_SPECS)}
"""


def main(args: list[str]) -> int:
    """Print the plan; return 0 if the run fits in memory, else 1. Errors: ConfigError as in the run itself."""
    options, settings = parse_options(PlanOptions, "plan", args)
    options.check()
    config = parse_command_line(settings, prog="tinytrain plan")
    if config.vocab_size is None:
        config = resolve_vocab_size(config)
    config = resolve_epochs(config)
    nodes, per_node = options.nodes, options.per_node
    on_gpu = options.device.lower() != "cpu"
    config = set_device_defaults(config, on_gpu=on_gpu, in_bf16=on_gpu)  # every GPU of the table has units for bf16
    device = find_device_spec(options.device, per_node, config.precision)
    if options.network is not None:
        device = replace(device, network=options.network * 1e9 / 8)
    if options.gpus:
        return _print_scaling(config, options, device, source=_source(settings))
    cluster = Cluster(nodes, per_node, device)
    choose_parallel_dims(config, cluster.num_devices, per_node)  # raises errors before anything is printed
    context = fake_backend.fake_context(cluster.num_devices, per_node, cluster.device_type)
    try:
        return _print_plan(config, context, cluster, source=_source(settings))
    finally:
        shutdown()


def _source(settings: list[str]) -> str:
    has_file = bool(settings) and not settings[0].startswith("-")
    return settings[0] if has_file else "the settings"


def _print_plan(config: TrainingConfig, context: DistributedContext, cluster: Cluster, source: str) -> int:
    with torch.device("meta"):
        model = TransformerLM(config)
    flops_per_token = model.flops_per_token()
    planned = forecast(config, context, cluster, flops_per_token)
    device = cluster.device
    print(
        f"{source} on {cluster.nodes} node(s) x {cluster.per_node} {device.name} ({format_gib(device.memory)} each)\n"
    )
    plans = BatchPlans(planned.plan, planned.config.batch_sizes)
    print(f"{planned.parallel_dims}\n{plans}\n{_parameters(model)}\n")
    if has_special_groups(config):
        print(describe_groups(group_parameters(list(trained_parameters(model)), config), config.lr_max) + "\n")
    print(_memory(planned, cluster))
    others = [
        forecast(changed, context, cluster, flops_per_token)
        for changed in other_modes(config, cluster)
        if changed.parallel != planned.parallel_dims.mode
    ]
    if planned.fits:
        print("\nFITS in memory\n")
    else:
        print(f"\nDOES NOT FIT in memory; it {suggest_change(planned, others, context, cluster, flops_per_token)}\n")
    steps = [predicted_step(each, context, cluster, flops_per_token) for each in (planned, *others)]
    print(_speed(planned, cluster, flops_per_token))
    print(_orthogonalization(planned), end="")
    if steps[0] is not None:
        print(_timeline(steps[0]))
    print(_disk(config, model, planned, cluster))
    print(_mode_table([planned, *others], steps, cluster))
    return 0 if planned.fits else 1


def _parameters(model: nn.Module) -> str:
    transformer: Any = model
    total = sum(param.numel() for param in model.parameters())
    blocks = transformer.model.layers
    per_block = sum(param.numel() for param in blocks[0].parameters())
    embedding = transformer.model.embed_tokens.weight.numel()
    head = f"{transformer.lm_head.weight.numel():,}"
    if transformer.config.tie_embeddings:
        head = "tied with the embedding"
    return f"parameters {total:,} = {len(blocks)} blocks x {per_block:,} + embedding {embedding:,} + head ({head})"


def _memory(planned: Forecast, cluster: Cluster) -> str:
    """Format the memory of one rank at its peak, one kind per line, and the memory of the device."""
    device = cluster.device
    estimate = planned.estimate
    unusable = (1 - USABLE_MEMORY) * device.memory
    held = estimate.stages[estimate.peak]
    shown = [kind for kind in MEMORY_KINDS if held[kind] >= MIN_SHOWN_BYTES or kind == "weights"]
    note = ", or less with compiled blocks" if planned.config.compile else ""
    return "\n".join(
        [
            f"memory of one rank at its peak ({estimate.peak}){note}:",
            *(memory_row(MEMORY_KINDS[kind], held[kind]) for kind in shown),
            memory_row("all tensors", estimate.nbytes),
            memory_row("CUDA context, NCCL, libraries", device.context),
            memory_row("kept free (fragmentation)", unusable),
            memory_row("needed", estimate.nbytes + device.context + unusable),
            memory_row("available", device.memory),
        ]
    )


def _speed(planned: Forecast, cluster: Cluster, flops_per_token: float) -> str:
    """Format what a step sends, how long it takes at best, and how long the run then takes."""
    device = cluster.device
    num_steps = planned.config.total_steps
    tokens_per_step = planned.plan.tokens_per_step
    peak = peak_flops(planned.config, device)
    reached = f"{device.reached:.0%} of {peak / 1e12:.3g} TFLOP/s"
    tokens_per_day = SECONDS_PER_DAY / planned.seconds * tokens_per_step
    num_tokens = planned.config.batch_sizes.before(num_steps) * planned.plan.context_len
    days = num_tokens / tokens_per_step * planned.seconds / SECONDS_PER_DAY  # smaller batches take less time
    return "\n".join(
        [
            f"sent in a step: {_gb(planned.inside_bytes)} from each rank to other ranks of its node, "
            f"{_gb(planned.across_bytes)} from each node to other nodes",
            f"least time of a step: {_seconds(planned.compute_seconds)} to compute ({reached}, "
            f"{flops_per_token:.3g} FLOP per token), {_seconds(planned.inside_seconds)} to send inside nodes, "
            f"{_seconds(planned.across_seconds)} to send across nodes",
            f"at best {_seconds(planned.seconds)} per step = {tokens_per_step / planned.seconds:,.0f} tokens/s, "
            f"{tokens_per_day:.3g} tokens per day; {num_steps:,} steps = {num_tokens:.3g} tokens in "
            f"{days:.3g} days",
        ]
    )


def _orthogonalization(planned: Forecast) -> str:
    """Format what Newton-Schulz takes in a step; "" without Muon."""
    work = update_work(planned.config, planned.parallel_dims.weight_replicas, planned.parallel_dims.weight_shards)
    if not work.plan.shapes:
        return ""
    flops = work.owned_flops()
    return (
        f"of the time to compute, Muon orthogonalizes for {_seconds(planned.matrix_seconds)}: "
        f"{len(work.plan.shapes)} matrices, at most {len(work.plan.rounds())} on one rank; "
        f"{sum(flops):.3g} FLOP on all ranks, {max(flops):.3g} on the busiest\n"
    )


def _disk(config: TrainingConfig, model: nn.Module, planned: Forecast, cluster: Cluster) -> str:
    """Format the size of a checkpoint, and of all checkpoints and snapshots that are kept at the same time."""
    shards, _ = collect_shards(model, build_optimizer(model, config), config.max_shard_bytes)
    specs_by_kind = [
        [TensorSpec(shard.name, shard.shape, shard.dtype) for shard in shards_of_kind]
        for shards_of_kind in shards.values()
    ]
    checkpoint_bytes = sum(spec.nbytes for specs in specs_by_kind for spec in specs)
    num_files = sum(len(split_into_files(specs, config.max_shard_bytes)) for specs in specs_by_kind)
    num_saves = math.ceil(config.total_steps / config.ckpt_every)
    num_permanent = config.total_steps // config.keep_every if config.keep_every else 0
    num_kept = min(num_saves, config.keep_last + 1 + num_permanent)
    kept = f"keep_last {config.keep_last} + 1 being written"
    if num_permanent:
        kept += f" + {num_permanent} permanent (keep_every)"
    return (
        f"a checkpoint is {_gb(checkpoint_bytes)} in {num_files} tensor file(s); "
        f"the run keeps at most {num_kept} ({kept}) = {_gb(num_kept * checkpoint_bytes)} on disk\n"
        f"{_snapshots(config, planned, cluster, checkpoint_bytes)}"
    )


def _snapshots(config: TrainingConfig, planned: Forecast, cluster: Cluster, state_bytes: int) -> str:
    """Format the shared memory for snapshots, which runs take whose ranks may be restarted."""
    if config.snapshot_every == 0:
        return ""
    num_shards = planned.parallel_dims.weight_shards
    ranks = range(cluster.num_devices)
    places = [Place(str(rank // cluster.per_node), "", rank % num_shards) for rank in ranks]
    node_bytes = state_bytes * Placement(places, 0).shards_per_node() / num_shards
    return (
        f"snapshots for --max-restarts take 2 x {_gb(node_bytes)} = {_gb(2 * node_bytes)} of shared memory per node\n"
    )


def _timeline(step: PredictedStep) -> str:
    """Format where the time of the simulated step goes."""
    timeline = step.timeline
    waits = _waits(timeline)
    return (
        f"simulated step: {_seconds(timeline.seconds)} = {_seconds(timeline.compute_seconds)} forward and backward + "
        f"{_seconds(timeline.update_seconds)} update + {_seconds(timeline.exposed_seconds)} waiting for communication "
        f"({timeline.exposed_seconds / timeline.seconds:.1%}{': ' if waits else ''}{waits}); "
        f"MFU {step.mfu:.1%}, {step.efficiency:.1%} of the speed of a GPU alone"
    )


def _mode_table(forecasts: list[Forecast], steps: list[PredictedStep | None], cluster: Cluster) -> str:
    """Format a row for each mode; the first forecast is this run."""
    width = 22 if forecasts[0].parallel_dims.cp == 1 else 30
    heading = f"  {'mode':<{width}}{'tensors':>12}{'fits':>6}{'sent inside':>14}{'sent across':>14}{'step at best':>15}"
    lines = [f"modes on {cluster.num_devices} device(s), per rank and step:", heading]
    if steps[0] is not None:
        lines[1] += f"{'simulated':>12}{'waiting':>10}"
    for each, step in zip(forecasts, steps, strict=True):
        dims = each.parallel_dims
        name = f"{dims.mode} {dims.replicate} x {dims.shard}" + (f" x cp {dims.cp}" if dims.cp > 1 else "")
        name += " (this run)" if each is forecasts[0] else ""
        fits = "yes" if each.fits else "no"
        sent = f"{_gb(each.inside_bytes):>14}{_gb(each.across_bytes):>14}"
        line = f"  {name:<{width}}{format_gib(each.estimate.nbytes):>12}{fits:>6}{sent}{_seconds(each.seconds):>15}"
        if step is not None:
            line += f"{_seconds(step.timeline.seconds):>12}{_seconds(step.timeline.exposed_seconds):>10}"
        lines.append(line)
    return "\n".join(lines)


def _print_scaling(config: TrainingConfig, options: PlanOptions, device: DeviceSpec, source: str) -> int:
    """Print a row for each mode on each number of GPUs; return 0 if some row fits in memory, else 1."""
    if device.name == "cpu" or config.reproducible:
        what = "reproducible = true" if config.reproducible else "--device cpu"
        raise ConfigError(f"--gpus: the step is not simulated with {what}; leave it out", "the settings of plan")
    per_node = options.per_node
    clusters = [Cluster(max(1, count // per_node), min(count, per_node), device) for count in options.gpus]
    with torch.device("meta"):
        flops_per_token = TransformerLM(config).flops_per_token()
    batch = f"batch_size {config.batch_size} on any number of GPUs"
    if options.batch_per_gpu is not None:
        batch = f"{options.batch_per_gpu} sequence(s) of a step for each GPU"
    columns = f"{'tensors':>12}{'fits':>6}{'step':>10}{'update':>11}{'waiting':>10}{'share':>8}{'MFU':>8}"
    print(
        f"{source} on nodes of {per_node} {device.name}, {batch}\n"
        f"computed, not measured: {device.reached:.0%} of the peak, {REACHABLE_SHARE_OF_LINKS:.0%} of "
        f"{device.neighbours / 1e9:g} GB/s inside a node and of {device.network / 1e9:g} GB/s between nodes\n\n"
        f"  {'GPUs':>5}  {'mode':<5}{'per GPU':>9}{columns}{'of one GPU':>12}  waiting for",
        flush=True,
    )
    fits = False
    for cluster, mode, step in scaled_steps(config, clusters, options.batch_per_gpu, flops_per_token):
        print(f"  {cluster.num_devices:>5}  {mode:<5}{_scaling_columns(step)}", flush=True)
        fits |= isinstance(step, PredictedStep) and step.forecast.fits
    return 0 if fits else 1


def _scaling_columns(step: PredictedStep | ConfigError) -> str:
    if isinstance(step, ConfigError):
        return f"  {step.problems[0].partition(';')[0]}"
    planned, timeline = step.forecast, step.timeline
    sequences = f"{planned.plan.accumulation_steps} x {planned.plan.micro_batch_size}"
    waits = _waits(timeline)
    return (
        f"{sequences:>9}{format_gib(planned.estimate.nbytes):>12}{'yes' if planned.fits else 'no':>6}"
        f"{_seconds(timeline.seconds):>10}{_seconds(timeline.update_seconds):>11}"
        f"{_seconds(timeline.exposed_seconds):>10}"
        f"{timeline.exposed_seconds / timeline.seconds:>8.1%}{step.mfu:>8.1%}{step.efficiency:>12.1%}  {waits}"
    )


def _waits(timeline: StepPrediction) -> str:
    """Format what a simulated step waits for, with the time of each kind."""
    return ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in timeline.waits.items())


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g} MB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
