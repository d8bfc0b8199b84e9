"""Owns `tinytrain plan`: whether a run fits, what it holds, sends and saves, and how fast it can be at best.

Must not know the architecture: sizes come from rehearsing the trainer's own step (estimate.py) in a world that is not
there, and speeds from the table of devices (hardware.py).
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import nn

from tinytrain_dist import distributed
from tinytrain_dist.checkpoint import pieces_of
from tinytrain_dist.commandline import parse_command_line, resolve_vocab_size
from tinytrain_dist.config import Mode, TrainingConfig
from tinytrain_dist.distributed import DistributedContext
from tinytrain_dist.engine import Engine
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.estimate import KINDS, RESERVE, Estimate, estimate, smaller_settings, table_row
from tinytrain_dist.layout import BatchPlan, Layout, choose_layout, possible_micro_batches
from tinytrain_dist.model import TransformerLM
from tinytrain_dist.optim import AdamW, decay_groups
from tinytrain_dist.tensorfiles import Spec, cut_into_files
from tinytrain_dist.tools.hardware import GIB, REACHED_OF_LINKS, Device, device_named

OPTIONS = """usage: tinytrain plan CONFIG.toml [OPTIONS] [SETTINGS]

  --nodes N              machines (default 1)
  --devices-per-node D   devices, and processes, on each (default 1)
  --device NAME          h100 (default), h200, a100, a100-40gb, l40s, l4, rtx4090, rtx3090, cpu (this machine)
  --network GBIT         what a node can send to others, in Gbit/s (default: see tools/hardware.py)

Exit code: 0 if the run fits, 1 if not, 2 if it cannot be run. Settings:
"""
RECOMPUTED = {"none": 1.0, "selective": 1.0, "block": 4 / 3}  # a third of the products is forward's, done twice


@dataclass(frozen=True)
class World:
    """The machines: what `--nodes`, `--devices-per-node`, `--device` and `--network` say."""

    nodes: int
    per_node: int
    device: Device

    @property
    def room(self) -> float:
        """Bytes that tensors may take on one device."""
        return RESERVE * self.device.memory - self.device.context


@dataclass(frozen=True)
class Forecast:
    """One way to spread the run: its estimate, and lower bounds of the time of a step, in seconds."""

    config: TrainingConfig
    layout: Layout
    plan: BatchPlan
    estimate: Estimate
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


def main(args: list[str]) -> int:
    """`tinytrain plan`: print the plan; 0 if it fits, else 1. Errors: ConfigError as a run would raise it."""
    options, rest = _take_own_options(args)
    if {"-h", "--help"} & set(rest):
        print(OPTIONS)
    config = parse_command_line(rest, prog="tinytrain plan")
    if config.vocab_size is None:
        config = resolve_vocab_size(config)
    nodes, per_node = _whole(options, "--nodes"), _whole(options, "--devices-per-node")
    device = device_named(options.get("--device", "h100"), per_node, config.precision)
    if "--network" in options:
        device = replace(device, network=_whole(options, "--network") * 1e9 / 8)
    world = World(nodes, per_node, device)
    choose_layout(config, nodes * per_node, per_node)  # say what is wrong before anything is printed
    context = distributed.pretend(nodes * per_node, per_node)
    try:
        return _report(config, context, world, rest[0] if rest else "the settings")
    finally:
        distributed.close()


def _take_own_options(args: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options of `plan`, and the arguments that belong to the configuration."""
    own = {"--nodes", "--devices-per-node", "--device", "--network"}
    options: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(args)
    for word in waiting:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag in own:
            options[flag] = value if equals else next(waiting, "")
        else:
            rest.append(word)
    return options, rest


def _whole(options: dict[str, str], name: str) -> int:
    text = options.get(name, "1")
    if not (text.isdecimal() and int(text) >= 1):
        raise ConfigError(f"{name}: {text!r} must be a whole number, at least 1", "the settings of plan")
    return int(text)


# ---------------------------------------------------------------- forecast


def forecast(config: TrainingConfig, context: DistributedContext, world: World, flops: float) -> Forecast:
    """What the run would hold, send and take on this world; `flops` per token. Errors: ConfigError."""
    shape = (context.world_size, context.local_world_size)
    layout = choose_layout(config, *shape)
    found = _on(config, context, layout, world, flops)
    if config.parallel == "auto" and layout.mode == "ddp" and not found.fits:
        found = _on(config, context, choose_layout(config, *shape, fits=False), world, flops)
    return found


def _on(config: TrainingConfig, context: DistributedContext, layout: Layout, world: World, flops: float) -> Forecast:
    spread = context.with_layout(layout)
    if config.micro_batch_size == "auto":
        sizes, unset = possible_micro_batches(config, layout), config

        def need(size: int) -> int:
            return estimate(replace(unset, micro_batch_size=size), spread, Engine(config, spread)).nbytes

        config = replace(config, micro_batch_size=sizes[max(1, bisect_right(sizes, world.room, key=need)) - 1])
    plan = BatchPlan.make(config, layout)
    found = estimate(config, spread, Engine(config, spread))
    inside, across = sent_bytes(found, world)
    device = world.device
    peak = device.bf16_flops if config.precision == "bf16" else device.fp32_flops
    work = flops * RECOMPUTED[config.activation_checkpointing] * plan.tokens_per_step / plan.ranks
    seconds = [work / (peak * device.reached), inside / device.neighbours, across / device.network]
    seconds[1:] = [each / REACHED_OF_LINKS for each in seconds[1:]]
    return Forecast(config, layout, plan, found, found.nbytes <= world.room, inside, across, *seconds)


def sent_bytes(found: Estimate, world: World) -> tuple[float, float]:
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


def modes(config: TrainingConfig, world: World) -> Iterator[TrainingConfig]:
    """The same run in every mode that this world allows."""
    ranks = world.nodes * world.per_node
    for mode in get_args(Mode):
        sizes: dict[str, Any] = {} if mode == config.parallel else {"dp_replicate": None, "dp_shard": None}
        changed = replace(config, **sizes, parallel=mode)
        try:
            layout = choose_layout(changed, ranks, world.per_node)
            BatchPlan.make(changed, layout)
        except ConfigError:
            continue
        if layout.mode == mode:
            yield changed


def nearest_that_fits(
    now: Forecast, others: list[Forecast], context: DistributedContext, world: World, flops: float
) -> str:
    """The setting to change so that the run fits, or the settings, or what is missing."""
    micro = now.plan.micro_batch_size
    fixed = replace(now.config, micro_batch_size=micro)
    spread = replace(context, layout=now.layout)
    for change in smaller_settings(fixed, spread):
        if "micro_batch_size" in change:
            found = forecast(replace(fixed, micro_batch_size="auto"), context, world, flops)
            change = {"micro_batch_size": found.plan.micro_batch_size}
        else:
            found = forecast(replace(fixed, **change), context, world, flops)
        if found.fits:
            return f"fits with {_settings(change)}: {_gib(found.estimate.nbytes)} of tensors"
    for other in others:
        if other.fits:
            return f"fits with parallel = {other.layout.mode}: {_gib(other.estimate.nbytes)} of tensors"
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
        return f"fits with {_settings(everything)}: {_gib(found.estimate.nbytes)} of tensors"
    return f"does not fit even with {_settings(everything)}: {_gib(found.estimate.nbytes)}; use more or larger devices"


# ---------------------------------------------------------------- what is printed


def _report(config: TrainingConfig, context: DistributedContext, world: World, source: str) -> int:
    with torch.device("meta"):
        model = TransformerLM(config)
    flops = model.flops_per_token()
    now = forecast(config, context, world, flops)
    device = world.device
    print(f"{source} on {world.nodes} node(s) x {world.per_node} {device.name} ({_gib(device.memory)} each)\n")
    print(f"{now.layout}\n{now.plan}\n{_parameters(model)}\n")
    print(_memory(now, world))
    known = {now.layout.mode: now}
    others = []
    for changed in modes(config, world):
        if changed.parallel not in known:
            others.append(forecast(changed, context, world, flops))
    verdict = "it fits" if now.fits else nearest_that_fits(now, others, context, world, flops)
    print(f"\n{'FITS' if now.fits else 'DOES NOT FIT'}: {verdict}\n")
    print(_speed(now, world, flops))
    print(_disk(config, model))
    print(_side_by_side([now, *others], world))
    return 0 if now.fits else 1


def _parameters(model: nn.Module) -> str:
    inner: Any = model
    count = sum(param.numel() for param in model.parameters())
    block = sum(param.numel() for param in inner.model.layers[0].parameters())
    table = inner.model.embed_tokens.weight.numel()
    head = "tied with the embedding" if inner.config.tie_embeddings else f"{inner.lm_head.weight.numel():,}"
    return f"parameters {count:,} = {len(inner.model.layers)} blocks x {block:,} + embedding {table:,} + head ({head})"


def _memory(now: Forecast, world: World) -> str:
    device, found = world.device, now.estimate
    kept = (1 - RESERVE) * device.memory
    total = found.nbytes + device.context + kept
    held = found.moments[found.peak]
    rows = [table_row(KINDS[kind], held[kind]) for kind in KINDS if held[kind] >= 2**20 or kind == "weights"]
    rows += [table_row("all tensors", found.nbytes), table_row("CUDA context, NCCL, libraries", device.context)]
    rows += [table_row("kept free (fragments)", kept), table_row("needed", total)]
    rows += [table_row("there is", device.memory)]
    note = "; compiled blocks hold less, this is the bound" if now.config.compile else ""
    return "\n".join([f"memory of one rank at its peak ({found.peak}){note}:", *rows])


def _speed(now: Forecast, world: World, flops: float) -> str:
    device, plan, total = world.device, now.plan, now.config.total_steps
    peak = device.bf16_flops if now.config.precision == "bf16" else device.fp32_flops
    per_day = 86_400 / now.seconds * plan.tokens_per_step
    share = f"{device.reached:.0%} of {peak / 1e12:.3g} TFLOP/s"
    return "\n".join(
        [
            f"a step sends {_gb(now.inside)} from each rank to its node and {_gb(now.across)} from each node to others",
            f"a step takes at least {_seconds(now.compute_seconds)} of computing ({share}, {flops:.3g} per token), "
            f"{_seconds(now.inside_seconds)} and {_seconds(now.across_seconds)} of sending",
            f"at best {_seconds(now.seconds)} a step = {plan.tokens_per_step / now.seconds:,.0f} tokens/s, "
            f"{per_day:.3g} tokens a day; {total:,} steps = {total * plan.tokens_per_step:.3g} tokens in "
            f"{total * now.seconds / 86_400:.3g} days",
        ]
    )


def _disk(config: TrainingConfig, model: nn.Module) -> str:
    optimizer = AdamW(decay_groups(model, config.weight_decay))
    optimizer.materialize()
    pieces, _ = pieces_of(model, optimizer, config.max_shard_bytes)
    specs = [[Spec(p.name, p.shape, p.dtype) for p in parts] for parts in pieces.values()]
    size = sum(spec.nbytes for kind in specs for spec in kind)
    files = sum(len(cut_into_files(kind, config.max_shard_bytes)) for kind in specs)
    saves = math.ceil(config.total_steps / config.ckpt_every)
    for_ever = config.total_steps // config.keep_every if config.keep_every else 0
    kept = min(saves, config.keep_last + 1 + for_ever)
    kinds = f"keep_last {config.keep_last} + 1 being written" + (f" + {for_ever} for ever" if for_ever else "")
    one = f"a checkpoint is {_gb(size)} in {files} tensor file(s)"
    return f"{one}; at most {kept} ({kinds}) = {_gb(kept * size)} of disk\n"


def _side_by_side(found: list[Forecast], world: World) -> str:
    rows = [f"  {'mode':<22}{'tensors':>12}{'fits':>6}{'sent inside':>14}{'sent across':>14}{'step at best':>15}"]
    for each in found:
        name = f"{each.layout.mode} {each.layout.replicate} x {each.layout.shard}"
        rows.append(
            f"  {name + (' (this run)' if each is found[0] else ''):<22}{_gib(each.estimate.nbytes):>12}"
            f"{'yes' if each.fits else 'no':>6}{_gb(each.inside):>14}{_gb(each.across):>14}{_seconds(each.seconds):>15}"
        )
    return "\n".join([f"modes on {world.nodes * world.per_node} device(s), per rank and step:", *rows])


def _settings(change: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in change.items())


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= 0.095 * GIB else f"{nbytes / 2**20:.1f} MiB"


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g} MB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
