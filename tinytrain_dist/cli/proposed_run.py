"""Propose a configuration that fills a given time, for `tinytrain new --hours`.

The rules are in training/scaling_rules.py. This module finds the data and the speed, and writes the configuration.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinytrain_dist.cli.arguments import UsageError
from tinytrain_dist.config.loading import resolve_vocab_size
from tinytrain_dist.config.run_folder import LOGS_FOLDER, iter_records, parse_toml
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.type_conversion import to_toml_value
from tinytrain_dist.data.side_files import side_path
from tinytrain_dist.errors import ConfigError, TinytrainError
from tinytrain_dist.launch.machine import usable_cores, visible_gpus
from tinytrain_dist.launch.start import MOST_CPU_RANKS, local_command
from tinytrain_dist.metrics.device_specs import find_device_spec
from tinytrain_dist.training.forecast import Cluster
from tinytrain_dist.training.proposal import Hardware, Proposal, Timing, propose, reasons
from tinytrain_dist.utils.shard_paths import shard_paths
from tinytrain_dist.utils.stale_files import scratch_folder
from tinytrain_dist.utils.text import format_duration

GPU_START_SECONDS = 90.0  # imports, process groups, compilation, first step
GPU_SHARE_OF_PLAN = 0.85  # of the simulated speed: a run also logs, waits for data and saves
MEASURED_SECONDS = 10.0  # of steps on this machine
FEWEST_STEPS = 5  # of a measurement
LONGEST_MEASUREMENT = 180.0  # seconds
MOST_HOURS = 24 * 365.0

CONFIG = """\
# A run of about {hours:g} h on {where}, proposed by `tinytrain new`.
#
{reasons}
#
# data       {data}
# command    {command}

[run]
target_dir = "runs/{name}"
total_steps = {total_steps}             # what fits into the time
log_every = 10
{eval_settings}
[data]
train_data = {train_data}
{val_data}{masks}batch_size = {batch_size}                # over all processes
{micro_batch_size}context_len = {context_len}

[model]
vocab_size = {vocab_size}              # of the tokenizer beside the data
num_layers = {num_layers}
num_heads = {num_heads}
d_model = {d_model}

[optimizer]
lr_max = {lr_max}
lr_min = {lr_min}
warmup_iters = {warmup_iters}
weight_decay = 0.1
grad_clip_norm = 1.0

{compute}[checkpoint]
ckpt_every = {ckpt_every}
"""


# For data with mask files, such as those of `tinytrain prepare --chat`; other settings would count every token.
MASKS = """\
packing = "best_fit"            # whole documents in each window
document_mask = true            # attention stays within a document
loss_mask = true                # only the tokens that the mask files mark count
"""


@dataclass(frozen=True)
class ProposalOptions:
    """What `tinytrain new` was told about a run to propose; checked."""

    hours: float
    data: Path
    nodes: int
    devices_per_node: int | None
    device: str | None

    def __post_init__(self) -> None:
        """Check the numbers. Errors: UsageError."""
        problems = []
        if not 0 < self.hours <= MOST_HOURS:  # true for NaN as well
            problems.append(f"--hours: {self.hours} must be more than 0 and at most {MOST_HOURS:g}, such as 4 or 0.5")
        for name, value in (("--nodes", self.nodes), ("--devices-per-node", self.devices_per_node)):
            if value is not None and value < 1:
                problems.append(f"{name}: {value} must be at least 1")
        if self.on_cpu and self.nodes > 1:
            problems.append(
                f"--nodes: {self.nodes}, but on CPUs the speed is measured on this machine; leave it out, or give a "
                "GPU as --device"
            )
        if problems:
            raise UsageError(problems, "new")

    @property
    def on_cpu(self) -> bool:
        """Whether the run is to take place on the CPUs of this machine."""
        return (self.device or ("h100" if visible_gpus() else "cpu")).lower() == "cpu"

    @property
    def per_node(self) -> int:
        """Number of processes of each node."""
        if self.devices_per_node is not None:
            return self.devices_per_node
        return min(MOST_CPU_RANKS, 1 << (usable_cores().bit_length() - 1)) if self.on_cpu else max(1, visible_gpus())


def proposed_config(options: ProposalOptions, name: str) -> str:
    """Return the configuration as TOML, after printing the reasoning in ten lines. name: of the run.

    Errors: ConfigError if the data cannot be used, if nothing fits in memory, or if the measurement fails.
    """
    base = _data_settings(options.data)
    base_config = resolve_vocab_size(TrainingConfig(**base))
    vocab_size, data_tokens = base_config.vocab_size or 1, _count_tokens(base_config)
    precision = "fp32" if options.on_cpu else "bf16"
    device = find_device_spec("cpu" if options.on_cpu else options.device or "h100", options.per_node, precision)
    cluster = Cluster(options.nodes, options.per_node, device)
    masks = parse_toml(MASKS.encode()) if _has_masks(base) else {}
    where = f"{options.nodes} x {options.per_node} {device.name}"
    if options.on_cpu:
        where = f"{options.per_node} process(es) on this machine"
        clock = StepClock({"train_data": base["train_data"], **masks}, options.per_node)
        print(f"timing steps on this machine, {MEASURED_SECONDS:.0f} s for each model that is tried ...", flush=True)
        timing: Callable[[dict[str, Any]], Timing] = clock.time_steps
        speed_from = f"measured for {MEASURED_SECONDS:.0f} s"
    else:
        timing = _simulation(cluster, masks)
        speed_from = f"{GPU_SHARE_OF_PLAN:.0%} of what `tinytrain plan` simulates"
    guess = device.bf16_flops * device.reached * cluster.num_devices
    hardware = Hardware(cluster.num_devices, options.on_cpu, guess)
    proposal = propose(options.hours * 3600, vocab_size, data_tokens, hardware, timing)
    lines = reasons(proposal, options.hours, where, speed_from)
    print("\n".join(lines))
    text = _to_toml(options, proposal, base, name, where, lines)
    return text


def _data_settings(data: Path) -> dict[str, Any]:
    """Return train_data and val_data for a folder that `tinytrain prepare` has made. Errors: UsageError."""
    data = data.resolve()
    settings: dict[str, Any] = {}
    for side in ("train", "val"):
        single, shards = data / f"{side}.npy", sorted(data.glob(f"{side}-*.npy"))
        shards = [path for path in shards if not path.name.endswith((".mask.npy", ".documents.npy"))]
        if single.is_file():
            settings[f"{side}_data"] = str(single)
        elif shards:
            settings[f"{side}_data"] = str(data / f"{side}-*.npy")
    if "train_data" not in settings:
        raise UsageError(
            f"--data: {data} has neither train.npy nor train-*.npy; give a folder that `tinytrain prepare` has made",
            "new",
        )
    return settings


def _has_masks(base: dict[str, Any]) -> bool:
    """Return whether every token file has a mask file beside it."""
    return all(os.path.exists(side_path(path, ".mask.npy")) for entry in base.values() for path in shard_paths(entry))


def _count_tokens(config: TrainingConfig) -> int:
    from tinytrain_dist.training.run_data import open_training_data

    return sum(len(source) for source in open_training_data(replace(config, context_len=1)).sources)


def _simulation(cluster: Cluster, masks: dict[str, Any]) -> Callable[[dict[str, Any]], Timing]:
    """Return a function that simulates a step on a cluster of GPUs, with recomputation if memory needs it.

    masks: settings of masks, which need memory.
    """
    import torch

    from tinytrain_dist.model.transformer import TransformerLM
    from tinytrain_dist.parallel.device_defaults import set_device_defaults
    from tinytrain_dist.training.forecast import forecast, simulated_ranks
    from tinytrain_dist.training.scaling import predicted_step

    def time_step(settings: dict[str, Any]) -> Timing:
        with simulated_ranks(cluster) as context:
            for recomputed in ("none", "selective", "block"):
                extra: dict[str, Any] = {} if recomputed == "none" else {"activation_checkpointing": recomputed}
                config = set_device_defaults(TrainingConfig(**settings, **masks, **extra), on_gpu=True, in_bf16=True)
                with torch.device("meta"):
                    flops = TransformerLM(config).flops_per_token()
                planned = forecast(config, context, cluster, flops)
                if planned.fits:
                    step = predicted_step(planned, context, cluster, flops)
                    assert step is not None, "the device is a GPU"
                    return Timing(step.timeline.seconds / GPU_SHARE_OF_PLAN, GPU_START_SECONDS, extra)
        raise ConfigError(
            f"the model for this time ({settings['num_layers']} layers x {settings['d_model']}) does not fit in the "
            f"memory of {cluster.num_devices} x {cluster.device.name}; give less time, or more or larger devices",
            "the proposal",
        )

    return time_step


class StepClock:
    """Times steps of real runs on this machine, in a temporary folder."""

    def __init__(self, data: dict[str, Any], nproc: int) -> None:
        """Prepare to time runs with these settings of their data, and with so many processes."""
        self.data = data
        self.nproc = nproc

    def time_steps(self, settings: dict[str, Any]) -> Timing:
        """Start a run, let it train for MEASURED_SECONDS, and stop it. Errors: ConfigError if it fails."""
        with scratch_folder() as folder:
            run = folder / "run"
            changes: dict[str, Any] = {"target_dir": str(run), "log_every": 1, "trackers": (), "ckpt_every": 10**9}
            train_only = {name: value for name, value in settings.items() if name != "eval_steps"}
            config = TrainingConfig(**self.data | train_only | changes)
            (folder / "timing.toml").write_text(config.to_toml(), encoding="utf-8")
            command = local_command(folder / "timing.toml", [], self.nproc)
            output = folder / "output.txt"
            started = time.monotonic()
            with (
                output.open("w") as file,
                subprocess.Popen(
                    command.arguments, stdout=file, stderr=file, env={**os.environ, **command.environment}
                ) as process,
            ):
                try:
                    first_after = self._wait(process, run / LOGS_FOLDER / "metrics.jsonl", started)
                finally:
                    process.send_signal(signal.SIGTERM)  # it stops after a step; `with` waits
            seconds = _step_seconds(run / LOGS_FOLDER / "metrics.jsonl")
            if len(seconds) < FEWEST_STEPS:
                end = "\n".join(output.read_text(errors="replace").splitlines()[-5:])
                raise ConfigError(
                    f"the run that was to be timed made {len(seconds)} step(s) in {time.monotonic() - started:.0f} s; "
                    f"give more devices or time. Its last lines:\n{end}",
                    "the proposal",
                )
        settled = seconds[len(seconds) // 3 :]  # the first steps are slower
        return Timing(statistics.fmean(settled), first_after, {})

    def _wait(self, process: subprocess.Popen[bytes], metrics: Path, started: float) -> float:
        """Wait until enough steps are recorded; return the seconds from the start to the first step."""
        first_seen = None
        while process.poll() is None and time.monotonic() - started < LONGEST_MEASUREMENT:
            steps = len(_step_seconds(metrics))
            now = time.monotonic()
            if steps and first_seen is None:
                first_seen = now
            if first_seen is not None and now - first_seen >= MEASURED_SECONDS and steps >= FEWEST_STEPS:
                break
            time.sleep(0.1)
        return (first_seen or time.monotonic()) - started


def _step_seconds(metrics: Path) -> list[float]:
    """Return the seconds of each recorded step but the first, which includes the start."""
    try:
        records = list(iter_records(metrics))
    except (OSError, TinytrainError):
        return []
    return [record["step_seconds"] for record in records if record["kind"] == "train"][1:]


def _to_toml(
    options: ProposalOptions, proposal: Proposal, base: dict[str, Any], name: str, where: str, lines: list[str]
) -> str:
    settings = proposal.settings
    val_data = base.get("val_data")
    eval_settings = f"eval_every = {settings['eval_every']}\neval_steps = {settings['eval_steps']}\n"
    micro = settings.get("micro_batch_size")
    recomputed = settings.get("activation_checkpointing")
    train = f"tinytrain train config.toml --nproc {options.per_node}"
    hours = format_duration(1.2 * options.hours * 3600)
    submit = f"tinytrain submit config.toml --nodes {options.nodes} --gpus-per-node {options.per_node} --time {hours}"
    text = CONFIG.format(
        hours=options.hours,
        where=where,
        reasons="\n".join(f"# {line}" for line in lines),
        data=options.data.resolve(),
        command=train if options.nodes == 1 else submit,
        name=name,
        eval_settings=eval_settings if val_data else "",
        train_data=to_toml_value(base["train_data"]),
        masks=MASKS if _has_masks(base) else "",
        val_data=f"val_data = {to_toml_value(val_data)}\n" if val_data else "",
        micro_batch_size=f"micro_batch_size = {micro}            # of one process\n" if micro else "",
        compute=f'[parallel]\nactivation_checkpointing = "{recomputed}"\n\n' if recomputed else "",
        **{
            key: settings[key]
            for key in (
                "total_steps batch_size context_len vocab_size num_layers num_heads d_model lr_max lr_min warmup_iters "
                "ckpt_every"
            ).split()
        },
    )
    return text
