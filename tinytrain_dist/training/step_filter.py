"""Decide on the device which steps change neither weights nor optimizer state, without waiting for the device.

A rule gets the loss and the gradient norm of each step, which are the same on every rank and in every layout. So all
ranks decide the same without a message. Must not know models, optimizers or logs.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.metrics.loss_level import SPIKE_WINDOW_KEY
from tinytrain_dist.parallel.tree_reduction import halving_row_sums


class StepFilter(Protocol):
    """The rule of a run; made by `build_step_filter`."""

    def decide(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return the decision about a step, and what it was made from: float64 on the device.

        loss, norm: float64 scalars on the device. The first number is 1 if the step is skipped, else 0.
        """

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep, as values of its run record. Waits for the device."""

    def load(self, record: dict[str, Any]) -> None:
        """Take what `state` has put into the record of a checkpoint, and remove it there."""


class FiniteSteps:
    """Skip the steps whose loss or gradient norm is not finite. `decide` returns no more than the decision."""

    def decide(self, loss: Tensor, norm: Tensor) -> Tensor:
        """See StepFilter."""
        return (~(loss.isfinite() & norm.isfinite())).double().view(1)

    def state(self) -> dict[str, Any]:
        """Return nothing: every step is decided on its own."""
        return {}

    def load(self, record: dict[str, Any]) -> None:
        """Forget the window of an earlier run of these weights with `skip_spikes`."""
        record.pop(SPIKE_WINDOW_KEY, None)


class SpikeFilter:
    """Also skip the steps whose loss or gradient norm is far above its mean over the last steps.

    Far means: by more than `skip_spikes` standard deviations. The rule and its usual numbers (6 deviations, 128 steps,
    no decision before half of them) are those of OLMo's SkipStepOptimizer (OLMo-core, optim/skip_step_optimizer.py).
    There, the values of skipped steps enter the window. Here they do not, because one large value raises the deviation
    so much that the next spikes pass. If the loss has risen for good, all steps are skipped, and `max_skipped_steps`
    ends the run with a message. Values far below the mean are no reason to skip a step.

    `decide` returns five numbers: the decision, the means of loss and norm, their standard deviations.
    """

    def __init__(self, max_deviations: float, window: int, device: torch.device) -> None:
        """Begin with an empty window of so many steps."""
        self.max_deviations = max_deviations
        self.min_steps = max(2, window // 2)  # fewer steps say too little about the deviation
        # Columns are the accepted steps, the newest last. Rows: loss, norm, and 1 (0 in columns not used yet).
        self.window = torch.zeros(3, window, dtype=torch.float64, device=device)

    def decide(self, loss: Tensor, norm: Tensor) -> Tensor:
        """See StepFilter. Every sum is taken in one fixed order, so that the bits depend only on the values."""
        values = torch.stack([loss, norm])
        is_used = self.window[2]
        count = is_used.sum()  # exact in any order
        means = halving_row_sums(self.window[:2].clone()) / count.clamp(min=1)
        squares = ((self.window[:2] - means[:, None]) * is_used).square()
        deviations = (halving_row_sums(squares) / (count - 1).clamp(min=1)).sqrt()
        is_spike = (values - means > self.max_deviations * deviations).any() & (count >= self.min_steps)
        skip = is_spike | ~values.isfinite().all()
        accepted = torch.cat([values, torch.ones_like(values[:1])])[:, None]
        self.window = torch.where(skip, self.window, torch.cat([self.window[:, 1:], accepted], dim=1))
        return torch.cat([skip.double().view(1), means, deviations])

    def state(self) -> dict[str, Any]:
        """Return the window: two lists of numbers, which JSON keeps exactly."""
        losses, norms, is_used = self.window.tolist()
        count = int(sum(is_used))
        return {SPIKE_WINDOW_KEY: {"loss": losses[len(losses) - count :], "grad_norm": norms[len(norms) - count :]}}

    def load(self, record: dict[str, Any]) -> None:
        """Continue with the window of a checkpoint, as far as it fits into this one, else with an empty one."""
        saved = record.pop(SPIKE_WINDOW_KEY, {})
        pairs = list(zip(saved.get("loss", []), saved.get("grad_norm", []), strict=True))
        columns = [(loss, norm, 1.0) for loss, norm in pairs if math.isfinite(loss) and math.isfinite(norm)]
        size = self.window.shape[1]
        columns = [(0.0, 0.0, 0.0)] * (size - len(columns)) + columns[-size:]
        self.window = torch.tensor(columns, dtype=torch.float64, device=self.window.device).T.contiguous()


def build_step_filter(config: TrainingConfig, device: torch.device) -> StepFilter:
    """Return the rule that the settings choose."""
    if config.skip_spikes is None:
        return FiniteSteps()
    return SpikeFilter(config.skip_spikes, config.spike_window, device)
