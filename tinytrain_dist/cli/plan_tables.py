"""Print the tables of `tinytrain plan`: modes on several numbers of GPUs, and what longer contexts need.

Must not know where the numbers come from: see training/scaling.py and training/context_plans.py.
"""

from __future__ import annotations

import torch

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.device_specs import REACHABLE_SHARE_OF_LINKS, DeviceSpec
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.training.context_plans import ContextPlan, context_plans, context_problems
from tinytrain_dist.training.forecast import Forecast, cluster_of, format_gib
from tinytrain_dist.training.scaling import PredictedStep, exchange_cost, scaled_steps
from tinytrain_dist.training.step_timeline import StepPrediction


def print_scaling(
    config: TrainingConfig,
    device: DeviceSpec,
    per_node: int,
    numbers_of_gpus: tuple[int, ...],
    batch_per_gpu: int | None,
    source: str,
) -> int:
    """Print a row for each mode on each number of GPUs; return 0 if some row fits in memory, else 1."""
    _check_is_simulated("--gpus", config, device)
    clusters = [cluster_of(count, per_node, device) for count in numbers_of_gpus]
    with torch.device("meta"):
        flops_per_token = TransformerLM(config).flops_per_token()
    batch = f"batch_size {config.batch_size} on any number of GPUs"
    if batch_per_gpu is not None:
        batch = f"{batch_per_gpu} sequence(s) of a step for each GPU"
    columns = f"{'tensors':>12}{'fits':>6}{'step':>10}{'update':>11}{'waiting':>10}{'share':>8}{'MFU':>8}"
    print(
        f"{source} on nodes of {per_node} {device.name}, {batch}\n"
        f"{_assumptions(device)}\n\n"
        f"  {'GPUs':>5}  {'mode':<5}{'per GPU':>9}{columns}{'of one GPU':>12}  waiting for",
        flush=True,
    )
    fits = False
    for cluster, mode, step in scaled_steps(config, clusters, batch_per_gpu, flops_per_token):
        print(f"  {cluster.num_devices:>5}  {mode:<5}{_scaling_columns(step)}", flush=True)
        fits |= isinstance(step, PredictedStep) and step.forecast.fits
    return 0 if fits else 1


def _check_is_simulated(option: str, config: TrainingConfig, device: DeviceSpec) -> None:
    """Check that the timeline of a step is simulated. Errors: ConfigError naming the option."""
    if device.name == "cpu" or config.reproducible:
        what = "reproducible = true" if config.reproducible else "--device cpu"
        raise ConfigError(f"{option}: the step is not simulated with {what}; leave it out", "the settings of plan")


def _assumptions(device: DeviceSpec) -> str:
    return (
        f"computed, not measured: {device.reached:.0%} of the peak, {REACHABLE_SHARE_OF_LINKS:.0%} of "
        f"{device.neighbours / 1e9:g} GB/s inside a node and of {device.network / 1e9:g} GB/s between nodes"
    )


def _scaling_columns(step: PredictedStep | ConfigError) -> str:
    if isinstance(step, ConfigError):
        return f"  {step.problems[0].partition(';')[0]}"
    planned, timeline = step.forecast, step.timeline
    sequences = f"{planned.plan.accumulation_steps} x {planned.plan.micro_batch_size}"
    return (
        f"{sequences:>9}{format_gib(planned.estimate.nbytes):>12}{'yes' if planned.fits else 'no':>6}"
        f"{as_time(timeline.seconds):>10}{as_time(timeline.update_seconds):>11}"
        f"{as_time(timeline.exposed_seconds):>10}"
        f"{timeline.exposed_seconds / timeline.seconds:>8.1%}{step.mfu:>8.1%}{step.efficiency:>12.1%}  "
        f"{as_waits(timeline)}"
    )


def print_contexts(
    config: TrainingConfig,
    device: DeviceSpec,
    per_node: int,
    contexts: list[int],
    numbers_of_gpus: tuple[int, ...],
    source: str,
) -> int:
    """Print for each context the settings with which it fits; return 0 if each fits on some number of GPUs, else 1.

    numbers_of_gpus: a row for each. If empty, for the smallest number on which a context fits, and for a whole node.
    Errors: ConfigError for a context that cannot be planned, before anything is printed.
    """
    _check_is_simulated("--contexts", config, device)
    if problems := context_problems(config, contexts):
        raise ConfigError([f"--contexts: {problem}" for problem in problems], "the settings of plan")
    print(
        f"{source} on nodes of {per_node} {device.name}, weights sharded over all GPUs, one sequence in a micro-batch\n"
        f"{_assumptions(device)}, and of {device.host_link / 1e9:g} GB/s to the host\n\n"
        f"{'':>35}{'memory of a GPU':>24}{'exchange in a step':>39}\n"
        f"{'context':>9}{'GPUs':>6}{'cp':>4}  {'recomputed':<14}{'device':>12}{'host':>12}"
        f"{'sent':>11}{'in a node':>11}{'share':>7}{'2 nodes':>10}{'step':>10}{'tokens/s/GPU':>14}{'MFU':>8}",
        flush=True,
    )
    fitting = set()
    for plan in context_plans(config, contexts, device, per_node, numbers_of_gpus):
        print(f"{plan.context_len:>9,}{plan.cluster.num_devices:>6}{_context_columns(plan, per_node)}", flush=True)
        if plan.step is not None:
            fitting.add(plan.context_len)
    return 0 if fitting == set(contexts) else 1


def _context_columns(plan: ContextPlan, per_node: int) -> str:
    if plan.step is None:
        needed, settings = plan.smallest.estimate, plan.smallest.config
        return (
            f"  does not fit: {format_gib(needed.nbytes)} on the device and {format_gib(needed.host_bytes)} on the "
            f"host with cp {settings.cp}, {_recomputation(plan.smallest)}"
        )
    step, planned = plan.step, plan.step.forecast
    cost = exchange_cost(step, plan.cluster.device, per_node)
    memory = f"{format_gib(planned.estimate.nbytes):>12}{format_gib(planned.estimate.host_bytes):>12}"
    exchange = f"{'-':>11}{'-':>11}{'-':>7}{'-':>10}"
    if cost is not None:
        exchange = (
            f"{as_gb(cost.sent_bytes):>11}{as_time(cost.seconds):>11}"
            f"{cost.seconds / step.timeline.seconds:>7.1%}{as_time(cost.seconds_across):>10}"
        )
    tokens = planned.plan.tokens_per_step / step.timeline.seconds / plan.cluster.num_devices
    speed = f"{as_time(step.timeline.seconds):>10}{tokens:>14,.0f}{step.mfu:>8.1%}"
    return f"{planned.plan.cp:>4}  {_recomputation(planned):<14}{memory}{exchange}{speed}"


def _recomputation(planned: Forecast) -> str:
    """Return what backward recomputes, and whether inputs of blocks are offloaded."""
    return planned.config.activation_checkpointing + (", offload" if planned.config.activation_offload else "")


def as_waits(timeline: StepPrediction) -> str:
    """Format what a simulated step waits for, with the time of each kind."""
    return ", ".join(f"{name} {as_time(seconds)}" for name, seconds in timeline.waits.items())


def as_gb(nbytes: float) -> str:
    """Format a decimal size in GB, or a small one in MB."""
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g} MB"


def as_time(seconds: float) -> str:
    """Format a time in seconds, or a short one in milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
