"""Propose the settings of a run that fills a given time on given hardware.

The size of the model depends on the speed, and the speed on the size. So a first guess of the speed gives a model, its
step is timed, and the found speed gives the next model, until the model stays the same. Must not know how steps are
timed: on this machine they are run, for other machines they are simulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.training.scaling_rules import (
    MAX_EPOCHS,
    Budget,
    batch_sequences,
    batch_tokens,
    best_model,
    flops_per_token,
    highest_learning_rate,
    trained_tokens,
)

MAX_ROUNDS = 4  # of choosing a model and timing its step
EVALUATIONS = 20  # in the whole run
EVAL_STEPS = 4  # batches of each evaluation; a forward pass takes a third of a step
CHECKPOINTS = 10
USED_SHARE = 0.95  # of the time, so that the last save and slower steps have room
MICRO_BATCH_TOKENS = 1024  # of a forward pass on a CPU: more is no faster there
MODEL_NAMES = ("vocab_size", "num_layers", "num_heads", "d_model", "context_len")
TIMED_SETTINGS = (*MODEL_NAMES, "batch_size")  # on which the time of a step depends
LONGEST_WARMUP = 2000  # steps; DeepSeek LLM and Llama


@dataclass(frozen=True)
class Timing:
    """How long a step takes, the seconds from the command to the first step, and settings that were needed for it."""

    step_seconds: float
    start_seconds: float
    extra_settings: dict[str, Any]


@dataclass(frozen=True)
class Hardware:
    """Where a run is to take place. flops: those that all devices together are guessed to compute in a second."""

    ranks: int
    on_cpu: bool
    flops: float


@dataclass(frozen=True)
class Proposal:
    """Settings of a run, and the numbers from which they follow."""

    settings: dict[str, Any]
    model: ModelConfig
    data_tokens: int
    timing: Timing
    limited_by_data: bool

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step."""
        return int(self.settings["batch_size"]) * self.model.context_len

    @property
    def tokens(self) -> int:
        """Tokens that the whole run trains on."""
        return int(self.settings["total_steps"]) * self.tokens_per_step

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return self.tokens * flops_per_token(self.model)

    @property
    def seconds(self) -> float:
        """Predicted duration of the whole run."""
        steps = int(self.settings["total_steps"]) + EVALUATIONS * EVAL_STEPS / 3
        return self.timing.start_seconds + steps * self.timing.step_seconds


def propose(
    seconds: float,
    vocab_size: int,
    data_tokens: int,
    hardware: Hardware,
    time_steps: Callable[[dict[str, Any]], Timing],
) -> Proposal:
    """Return a run that takes about so many seconds.

    Args:
        seconds: the time for the whole run
        vocab_size: of the tokenizer
        data_tokens: tokens to train on
        hardware: where it is to run
        time_steps: times a step with these settings

    Errors: ConfigError if there is no time for a step.
    """
    planned = USED_SHARE * seconds
    budget = Budget(planned * hardware.flops, data_tokens)
    settings = _settings(vocab_size, budget, hardware)
    for _ in range(MAX_ROUNDS):
        timed = settings
        timing = time_steps(timed)
        model = _model(settings)
        tokens_per_step = settings["batch_size"] * model.context_len
        usable = planned - timing.start_seconds
        if usable < timing.step_seconds:
            raise ConfigError(
                f"--hours: in {seconds:.0f} s, of which {timing.start_seconds:.0f} s pass before the first step, there "
                f"is no time for one step of {timing.step_seconds:.2g} s; give more time",
                "the proposal",
            )
        budget = Budget(usable * tokens_per_step * flops_per_token(model) / timing.step_seconds, data_tokens)
        settings = _settings(vocab_size, budget, hardware)
        if all(settings[name] == timed[name] for name in TIMED_SETTINGS):
            break
    settings |= {name: timed[name] for name in TIMED_SETTINGS}  # also if the rounds did not settle
    evaluated_steps = EVALUATIONS * EVAL_STEPS / 3  # all evaluations take as long as so many steps
    by_time = math.floor(usable / timing.step_seconds - evaluated_steps)
    by_data = math.ceil(budget.most_tokens / tokens_per_step)
    settings |= timing.extra_settings | _length(max(1, min(by_time, by_data)))
    return Proposal(settings, model, data_tokens, timing, limited_by_data=by_data < by_time)


def _model(settings: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**{name: settings[name] for name in MODEL_NAMES})


def _settings(vocab_size: int, budget: Budget, hardware: Hardware) -> dict[str, Any]:
    """Return the settings that follow from the budget, without those of the length."""
    model = best_model(vocab_size, budget)
    flops = trained_tokens(model, budget) * flops_per_token(model)
    sequences = batch_sequences(batch_tokens(flops), model.context_len, hardware.ranks)
    rate = float(f"{highest_learning_rate(flops):.2g}")
    settings: dict[str, Any] = {
        **{name: getattr(model, name) for name in MODEL_NAMES},
        "batch_size": sequences,
        "total_steps": max(1, round(trained_tokens(model, budget) / sequences / model.context_len)),
        "lr_max": rate,
        "lr_min": float(f"{rate / 10:.2g}"),
        "eval_steps": EVAL_STEPS,
    }
    if hardware.on_cpu:
        settings["micro_batch_size"] = min(sequences // hardware.ranks, max(1, MICRO_BATCH_TOKENS // model.context_len))
    return settings


def _length(steps: int) -> dict[str, Any]:
    """Return the settings that follow from the number of steps."""
    return {
        "total_steps": steps,
        "warmup_iters": min(LONGEST_WARMUP, max(1, steps // 50)),
        "eval_every": math.ceil(steps / EVALUATIONS),  # upwards, because the time is planned for so many at most
        "ckpt_every": math.ceil(steps / CHECKPOINTS),
    }


def reasons(proposal: Proposal, hours: float, where: str, speed_from: str) -> list[str]:
    """Return the reasoning in ten lines, each with its source.

    where: the hardware; speed_from: how the speed was found.
    """
    model, settings = proposal.model, proposal.settings
    parameters = model.approximate_parameter_count
    rate = proposal.tokens_per_step / proposal.timing.step_seconds
    epochs = proposal.tokens / proposal.data_tokens
    limit = (
        f"the data ends the run: more than {MAX_EPOCHS} epochs help little, so it takes less than {hours:g} h"
        if proposal.limited_by_data
        else f"the time ends the run, before {MAX_EPOCHS} epochs"
    )
    return [
        f"time       {hours:g} h on {where}; {USED_SHARE:.0%} of it is planned",
        f"speed      {proposal.timing.step_seconds:.3g} s per step, {rate:,.0f} tokens/s: {speed_from}",
        f"model      {model.num_layers} layers x {model.d_model}, {parameters / 1e6:,.1f}M parameters; any ratio of "
        "width to depth from 30 to 300 would do (Kaplan et al. 2020)",
        f"tokens     {proposal.tokens / 1e6:,.1f}M, {proposal.tokens / parameters:.1f} per parameter; 20 are best for "
        "the compute (Hoffmann et al. 2022)",
        f"epochs     {epochs:.2f} of {proposal.data_tokens / 1e6:,.1f}M tokens; {limit} (Muennighoff et al. 2023)",
        f"batch      {settings['batch_size']} x {model.context_len} = {proposal.tokens_per_step:,} tokens; "
        f"{batch_tokens(proposal.flops):,.0f} are best for {proposal.flops:.2g} FLOPs (DeepSeek LLM 2024)",
        f"rate       {settings['lr_max']:g}, best for so many FLOPs (DeepSeek LLM 2024), falling along a cosine that "
        "ends with the run to a tenth (Hoffmann et al. 2022)",
        f"warm-up    {settings['warmup_iters']} steps, 2 % of the run, at most {LONGEST_WARMUP}; AdamW with betas 0.9, "
        "0.95 and decay 0.1 (GPT-3, Llama)",
        f"checks     evaluation every {settings['eval_every']} steps, checkpoint every {settings['ckpt_every']}",
        f"duration   {settings['total_steps']:,} steps in {proposal.seconds / 3600:.3g} h",
    ]
