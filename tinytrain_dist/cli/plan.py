"""`tinytrain plan`: print whether a run fits in memory, what it sends and saves, and how fast it can be.

Must not know the architecture: see training/forecast.py for where the numbers come from.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import replace
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from tinytrain_dist.checkpoint.safetensors_io import TensorSpec, split_into_files
from tinytrain_dist.checkpoint.snapshots.placement import Place, Placement
from tinytrain_dist.checkpoint.state_collection import collect_shards
from tinytrain_dist.cli.arguments import SETTINGS_HELP, parse_options
from tinytrain_dist.cli.plan_tables import as_gb, as_time, as_waits, print_contexts, print_scaling
from tinytrain_dist.config.loading import load_config, parse_command_line, read_command_line, resolve_vocab_size
from tinytrain_dist.config.parameter_groups import describe_groups, has_special_groups
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.batch_plan import BatchPlans
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.device_specs import DEVICE_SPECS, find_device_spec
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.optim.build import build_optimizer, group_parameters, trained_parameters
from tinytrain_dist.optim.costs import update_work
from tinytrain_dist.parallel.device_defaults import set_device_defaults
from tinytrain_dist.training.context_plans import CHOSEN_SETTINGS, MAX_CONTEXT
from tinytrain_dist.training.forecast import (
    Cluster,
    Forecast,
    forecast,
    format_gib,
    other_modes,
    peak_flops,
    simulated_ranks,
    suggest_change,
)
from tinytrain_dist.training.memory_estimate import MEMORY_KINDS, USABLE_MEMORY, memory_row
from tinytrain_dist.training.run_length import resolve_epochs
from tinytrain_dist.training.scaling import PredictedStep, exchange_cost, predicted_step

SECONDS_PER_DAY = 86_400
MIN_SHOWN_BYTES = 2**20  # smaller kinds of memory have no line of their own


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """See `PlanOptions.__doc__`, which is set below, because it lists the devices."""

    nodes: int = 1
    """Number of nodes."""
    devices_per_node: int | None = None
    """Number of devices on each node; there is one process for each. Default: 1, or 8 with --gpus and --contexts."""
    device: str = "h100"
    """A GPU of the list above, or cpu (this machine)."""
    network: Annotated[float | None, tyro.conf.arg(metavar="GBIT", help_behavior_hint="")] = None
    """Bandwidth from a node to other nodes, in Gbit/s. Default: what nodes with this device usually have."""

    host_memory: Annotated[float | None, tyro.conf.arg(metavar="GB", help_behavior_hint="")] = None
    """Memory of a node in GB, for activation_offload. Default: what nodes with this device usually have."""

    gpus: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N N ...")] = ()
    """Instead of the plan, print a table of DDP, FSDP and HSDP on each of these numbers of GPUs."""
    batch_per_gpu: int | None = None
    """With --gpus: sequences of a step for each GPU. Default: batch_size is the same on any number of GPUs."""
    contexts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="8k 1m ...")] = ()
    """Instead of the plan, print for each of these values of context_len on how many GPUs it fits, with which cp and
    recomputation, and what the exchange of cp costs. With --gpus: on these numbers of GPUs."""

    def check(self) -> None:
        """Raise ConfigError with all problems."""
        numbers = {
            "nodes": self.nodes,
            "devices_per_node": self.devices_per_node,
            "network": self.network,
            "host_memory": self.host_memory,
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
        tables = [name for name in ("gpus", "contexts") if getattr(self, name)]
        if tables and self.nodes != 1:
            problems.append(
                f"--nodes: has no effect with --{tables[0]}, whose table is about several numbers of GPUs; leave one "
                "of them out"
            )
        if self.batch_per_gpu is not None and tables != ["gpus"]:
            where = "with --contexts" if self.contexts else "without --gpus"
            problems.append(f"--batch-per-gpu: has no effect {where}; set --batch-size instead")
        problems += [problem for text in self.contexts if (problem := _token_problem(text))]
        if problems:
            raise ConfigError(problems, "the settings of plan")

    @property
    def per_node(self) -> int:
        """Number of devices on each node."""
        return self.devices_per_node or (8 if self.gpus or self.contexts else 1)


def tokens_of(text: str) -> int | None:
    """Return a number of tokens such as 8192, 8k (8,192) or 1m (1,048,576); None for any other text."""
    found = re.fullmatch(r"([1-9][0-9]{0,11})([km]?)", text.lower())
    return int(found[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[found[2]] if found else None


def _token_problem(text: str) -> str:
    """Return a sentence if a value of --contexts is no number of tokens; "" otherwise."""
    if tokens_of(text) is not None:
        return ""
    if "," in text:
        return f"--contexts: {text!r} has a comma; give numbers such as 8192, 8k or 1m, with spaces between them"
    return f"--contexts: {text!r} is no number of tokens; give one such as 8192, 8k or 1m"


def _problems_of_lists(args: list[str], options: PlanOptions) -> list[str]:
    """Return a sentence for each list of values that is given without any, which tyro takes as left out."""
    examples = {"gpus": "8 64", "contexts": "8k 1m"}
    return [
        f"--{name}: needs at least one value; give some, as in --{name} {example}, or leave it out"
        for name, example in examples.items()
        if f"--{name}" in args and not getattr(options, name)
    ]


def _read_for_contexts(settings: list[str]) -> TrainingConfig:
    """Return the configuration without the settings that the table of contexts chooses itself.

    Errors: ConfigError if one of these is on the command line. In a file it is meant for a run.
    """
    path, overrides = read_command_line(settings, "tinytrain plan")
    problems = [
        f"{name}: has no effect with --contexts, which chooses it; leave it out"
        for name in CHOSEN_SETTINGS
        if name in overrides
    ]
    if problems:
        raise ConfigError(problems, "the settings of plan")
    return load_config(path, overrides | CHOSEN_SETTINGS)


PlanOptions.__doc__ = f"""Show whether a run fits in memory, what it sends and saves, and how fast it can be.

tinytrain plan CONFIG.toml [OPTIONS] [SETTINGS]

Exit code: 0 if the run fits in memory, 1 if it does not, 2 for a mistake in the settings. {SETTINGS_HELP}

GPUs: {", ".join(DEVICE_SPECS)}
"""


def main(args: list[str]) -> int:
    """Print the plan; return 0 if the run fits in memory, else 1. Errors: ConfigError as in the run itself."""
    options, settings = parse_options(PlanOptions, "plan", args)
    options.check()
    if problems := _problems_of_lists(args, options):
        raise ConfigError(problems, "the settings of plan")
    config = _read_for_contexts(settings) if options.contexts else parse_command_line(settings, prog="tinytrain plan")
    if config.context_len > MAX_CONTEXT:
        raise ConfigError(
            f"context_len: {config.context_len} is too large to be simulated; set at most {MAX_CONTEXT} for a plan"
        )
    if config.vocab_size is None:
        config = resolve_vocab_size(config)
    config = resolve_epochs(config)
    nodes, per_node = options.nodes, options.per_node
    on_gpu = options.device.lower() != "cpu"
    config = set_device_defaults(config, on_gpu=on_gpu, in_bf16=on_gpu)  # every GPU of the table has units for bf16
    device = find_device_spec(options.device, per_node, config.precision)
    if options.network is not None:
        device = replace(device, network=options.network * 1e9 / 8)
    if options.host_memory is not None:
        device = replace(device, host_memory=options.host_memory * 1e9 / per_node)
    if options.contexts:
        contexts = [tokens for text in options.contexts if (tokens := tokens_of(text)) is not None]
        return print_contexts(config, device, per_node, contexts, options.gpus, _source(settings))
    if options.gpus:
        return print_scaling(config, device, per_node, options.gpus, options.batch_per_gpu, _source(settings))
    cluster = Cluster(nodes, per_node, device)
    choose_parallel_dims(config, cluster.num_devices, per_node)  # raises errors before anything is printed
    with simulated_ranks(cluster) as context:
        return _print_plan(config, context, cluster, source=_source(settings))


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
        print(_exchange(steps[0], cluster), end="")
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
            *_host_memory(planned, cluster),
        ]
    )


def _host_memory(planned: Forecast, cluster: Cluster) -> list[str]:
    """Format what the ranks of a node keep in its memory beside their GPUs; [] if they keep nothing there."""
    if not planned.estimate.host_bytes:
        return []
    return [
        f"memory of the host for {cluster.per_node} GPU(s), without that of the processes:",
        memory_row("needed", cluster.per_node * planned.estimate.host_bytes),
        memory_row("available", cluster.per_node * cluster.host_room),
    ]


def _speed(planned: Forecast, cluster: Cluster, flops_per_token: float) -> str:
    """Format what a step sends, how long it takes at best, and how long the run then takes."""
    device = cluster.device
    num_steps = planned.config.total_steps
    tokens_per_step = planned.plan.tokens_per_step
    peak = peak_flops(planned.config, device)
    reached = f"{device.reached:.0%} of {peak / 1e12:.3g} TFLOP/s"
    tokens_per_day = SECONDS_PER_DAY / planned.seconds * tokens_per_step
    num_tokens = planned.config.batch_sizes.before(num_steps) * planned.plan.context_len
    to_host = f", {as_time(planned.host_seconds)} to the host and back" if planned.host_seconds else ""
    days = num_tokens / tokens_per_step * planned.seconds / SECONDS_PER_DAY  # smaller batches take less time
    return "\n".join(
        [
            f"sent in a step: {as_gb(planned.inside_bytes)} from each rank to other ranks of its node, "
            f"{as_gb(planned.across_bytes)} from each node to other nodes",
            f"least time of a step: {as_time(planned.compute_seconds)} to compute ({reached}, "
            f"{flops_per_token:.3g} FLOP per token), {as_time(planned.inside_seconds)} to send inside nodes, "
            f"{as_time(planned.across_seconds)} to send across nodes{to_host}",
            f"at best {as_time(planned.seconds)} per step = {tokens_per_step / planned.seconds:,.0f} tokens/s, "
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
        f"of the time to compute, Muon orthogonalizes for {as_time(planned.matrix_seconds)}: "
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
        f"a checkpoint is {as_gb(checkpoint_bytes)} in {num_files} tensor file(s); "
        f"the run keeps at most {num_kept} ({kept}) = {as_gb(num_kept * checkpoint_bytes)} on disk\n"
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
    sizes = f"2 x {as_gb(node_bytes)} = {as_gb(2 * node_bytes)}"
    return f"snapshots for --max-restarts take {sizes} of shared memory per node\n"


def _timeline(step: PredictedStep) -> str:
    """Format where the time of the simulated step goes."""
    timeline = step.timeline
    waits = as_waits(timeline)
    return (
        f"simulated step: {as_time(timeline.seconds)} = {as_time(timeline.compute_seconds)} forward and backward + "
        f"{as_time(timeline.update_seconds)} update + {as_time(timeline.exposed_seconds)} waiting for communication "
        f"({timeline.exposed_seconds / timeline.seconds:.1%}{': ' if waits else ''}{waits}); "
        f"MFU {step.mfu:.1%}, {step.efficiency:.1%} of the speed of a GPU alone"
    )


def _exchange(step: PredictedStep, cluster: Cluster) -> str:
    """Format what context parallelism costs in the simulated step; "" without it."""
    cost = exchange_cost(step, cluster.device, cluster.per_node)
    if cost is None:
        return ""
    return (
        f"exchange of the {step.forecast.plan.cp} ranks of each sequence, which are on one node: "
        f"{as_gb(cost.sent_bytes)} from each rank in {as_time(cost.seconds)} "
        f"({cost.seconds / step.timeline.seconds:.1%} of the step); if they were on two nodes, it would take "
        f"{as_time(cost.seconds_across)}\n"
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
        sent = f"{as_gb(each.inside_bytes):>14}{as_gb(each.across_bytes):>14}"
        line = f"  {name:<{width}}{format_gib(each.estimate.nbytes):>12}{fits:>6}{sent}{as_time(each.seconds):>15}"
        if step is not None:
            line += f"{as_time(step.timeline.seconds):>12}{as_time(step.timeline.exposed_seconds):>10}"
        lines.append(line)
    return "\n".join(lines)
