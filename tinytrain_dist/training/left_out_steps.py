"""Leave batches out of training: a step that `skip_steps` names only advances the number of steps.

Learning rate and data stay functions of the step, and the steps after it are the same as without the setting, except
for the weights. PaLM's authors left out the batches around a spike like this (Chowdhery et al. 2022, arXiv 2204.02311,
section 5.1). Must not know how a step is computed.
"""

from __future__ import annotations

import math

import torch

from tinytrain_dist.metrics.step_metrics import StepResult
from tinytrain_dist.metrics.step_timer import HostCopy
from tinytrain_dist.optim.lr_schedule import learning_rate
from tinytrain_dist.training.train_step import Batches, TrainStep


class StepRunner:
    """Runs each step of a run with its TrainStep, except for those that are left out."""

    def __init__(self, train_step: TrainStep) -> None:
        """Take the steps to leave out from the settings."""
        self.train_step = train_step
        self.left_out = train_step.config.left_out_steps

    def run(self, step: int, batches: Batches, wants_stop: bool = False, *votes: bool) -> StepResult:
        """Run step `step` + 1, or leave it out; see `TrainStep.run`. A collective."""
        for left_out in self.left_out:
            if step + 1 in left_out:
                return self._leave_out(step, batches, (wants_stop, *votes), left_out)
        return self.train_step.run(step, batches, wants_stop, *votes)

    def first_computed(self, step: int) -> int:
        """Return the first step from `step` on that is not left out."""
        for left_out in self.left_out:  # in ascending order
            step = left_out.stop if step in left_out else step
        return step

    def _leave_out(self, step: int, batches: Batches, votes: tuple[bool, ...], left_out: range) -> StepResult:
        """Take the batch of a step, and do nothing with it. The ranks vote on a stop as in every step."""
        phase_timer = self.train_step.phase_timer
        phase_timer.enter("data", step)
        batches.get(step)
        phase_timer.enter("reading", step + 1)
        return StepResult(
            step=step + 1,
            lr=learning_rate(self.train_step.config, step),
            numbers=HostCopy(torch.tensor([math.nan, math.nan, 1.0], dtype=torch.float64)),
            micro_batch_losses=torch.zeros(0),
            vote=self.train_step.context.start_vote(*votes),
            data_wait=0.0,
            forward=[],
            phases=phase_timer.take(),
            layer_norms=None,
            left_out=left_out,
        )
