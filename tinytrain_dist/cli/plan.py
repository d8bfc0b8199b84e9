"""`tinytrain plan`: print whether a run fits, what it holds, sends and saves, and how fast it can be at best.

Must not know the architecture: see training/forecast.py for where the numbers come from.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tinytrain_dist.checkpoint.safetensors_io import TensorSpec, split_into_files
from tinytrain_dist.checkpoint.state import collect_shards
from tinytrain_dist.config.loading import parse_command_line, resolve_vocab_size
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import fake_backend
from tinytrain_dist.distributed.context import DistributedContext, shutdown
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.device_specs import find_device_spec
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.optim.adamw import AdamW, weight_decay_groups
from tinytrain_dist.training.forecast import Cluster, Forecast, forecast, format_gib, other_modes, suggest_change
from tinytrain_dist.training.memory_estimate import MEMORY_KINDS, USABLE_MEMORY, memory_row

OPTIONS = """usage: tinytrain plan CONFIG.toml [OPTIONS] [SETTINGS]

  --nodes N              machines (default 1)
  --devices-per-node D   devices, and processes, on each (default 1)
  --device NAME          h100 (default), h200, a100, a100-40gb, l40s, l4, rtx4090, rtx3090, cpu (this machine)
  --network GBIT         what a node can send to others, in Gbit/s (default: see metrics/device_specs.py)

Exit code: 0 if the run fits, 1 if not, 2 if it cannot be run. Settings:
"""


def main(args: list[str]) -> int:
    """`tinytrain plan`: print the plan; 0 if it fits, else 1. Errors: ConfigError as a run would raise it."""
    options, rest = _take_own_options(args)
    if {"-h", "--help"} & set(rest):
        print(OPTIONS)
    config = parse_command_line(rest, prog="tinytrain plan")
    if config.vocab_size is None:
        config = resolve_vocab_size(config)
    nodes, per_node = _whole(options, "--nodes"), _whole(options, "--devices-per-node")
    device = find_device_spec(options.get("--device", "h100"), per_node, config.precision)
    if "--network" in options:
        device = replace(device, network=_whole(options, "--network") * 1e9 / 8)
    world = Cluster(nodes, per_node, device)
    choose_parallel_dims(config, nodes * per_node, per_node)  # say what is wrong before anything is printed
    context = fake_backend.fake_context(nodes * per_node, per_node)
    try:
        return _report(config, context, world, rest[0] if rest else "the settings")
    finally:
        shutdown()


def _take_own_options(args: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split the arguments into the options of `plan` and those of the configuration."""
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


def _report(config: TrainingConfig, context: DistributedContext, world: Cluster, source: str) -> int:
    with torch.device("meta"):
        model = TransformerLM(config)
    flops = model.flops_per_token()
    now = forecast(config, context, world, flops)
    device = world.device
    print(f"{source} on {world.nodes} node(s) x {world.per_node} {device.name} ({format_gib(device.memory)} each)\n")
    print(f"{now.parallel_dims}\n{now.plan}\n{_parameters(model)}\n")
    print(_memory(now, world))
    known = {now.parallel_dims.mode: now}
    others = []
    for changed in other_modes(config, world):
        if changed.parallel not in known:
            others.append(forecast(changed, context, world, flops))
    verdict = "it fits" if now.fits else suggest_change(now, others, context, world, flops)
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


def _memory(now: Forecast, world: Cluster) -> str:
    device, found = world.device, now.estimate
    kept = (1 - USABLE_MEMORY) * device.memory
    total = found.nbytes + device.context + kept
    held = found.stages[found.peak]
    rows = [
        memory_row(MEMORY_KINDS[kind], held[kind]) for kind in MEMORY_KINDS if held[kind] >= 2**20 or kind == "weights"
    ]
    rows += [memory_row("all tensors", found.nbytes), memory_row("CUDA context, NCCL, libraries", device.context)]
    rows += [memory_row("kept free (fragments)", kept), memory_row("needed", total)]
    rows += [memory_row("there is", device.memory)]
    note = "; compiled blocks hold less, this is the bound" if now.config.compile else ""
    return "\n".join([f"memory of one rank at its peak ({found.peak}){note}:", *rows])


def _speed(now: Forecast, world: Cluster, flops: float) -> str:
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
    optimizer = AdamW(weight_decay_groups(model, config.weight_decay))
    optimizer.materialize()
    shards, _ = collect_shards(model, optimizer, config.max_shard_bytes)
    specs = [[TensorSpec(p.name, p.shape, p.dtype) for p in parts] for parts in shards.values()]
    size = sum(spec.nbytes for kind in specs for spec in kind)
    files = sum(len(split_into_files(kind, config.max_shard_bytes)) for kind in specs)
    saves = math.ceil(config.total_steps / config.ckpt_every)
    for_ever = config.total_steps // config.keep_every if config.keep_every else 0
    kept = min(saves, config.keep_last + 1 + for_ever)
    kinds = f"keep_last {config.keep_last} + 1 being written" + (f" + {for_ever} for ever" if for_ever else "")
    one = f"a checkpoint is {_gb(size)} in {files} tensor file(s)"
    return f"{one}; at most {kept} ({kinds}) = {_gb(kept * size)} of disk\n"


def _side_by_side(found: list[Forecast], world: Cluster) -> str:
    rows = [f"  {'mode':<22}{'tensors':>12}{'fits':>6}{'sent inside':>14}{'sent across':>14}{'step at best':>15}"]
    for each in found:
        name = f"{each.parallel_dims.mode} {each.parallel_dims.replicate} x {each.parallel_dims.shard}"
        rows.append(
            f"  {name + (' (this run)' if each is found[0] else ''):<22}{format_gib(each.estimate.nbytes):>12}"
            f"{'yes' if each.fits else 'no':>6}{_gb(each.inside):>14}{_gb(each.across):>14}{_seconds(each.seconds):>15}"
        )
    return "\n".join([f"modes on {world.nodes * world.per_node} device(s), per rank and step:", *rows])


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g} MB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
