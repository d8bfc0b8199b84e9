"""Count the steps that changed no weights, and report why: not finite, a spike, or left out.

Must not know who decides it (training/step_filter.py, training/left_out_steps.py); it reads the numbers of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.step_ranges import format_step_ranges
from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.distributed.batch_plan import BatchPlan, BatchPlans
from tinytrain_dist.errors import DivergenceError
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.utils.text import format_list

if TYPE_CHECKING:
    from tinytrain_dist.metrics.step_metrics import StepResult

MAX_WINDOWS_NAMED = 16  # in the message about a skipped step
QUANTITIES = {"loss": "loss", "grad_norm": "gradient norm"}  # name in records: in messages


class SkippedSteps:
    """The skipped steps of this process. Every rank counts them; rank 0 logs them."""

    def __init__(self, config: TrainingConfig, plans: BatchPlans, log: RunLog, data: TokenDataset, step: int) -> None:
        """Begin after `step` steps. data: the training data, to name the windows of a skipped step."""
        self.config = config
        self.plans = plans
        self.log = log
        self.data = data
        self.total = 0
        self.spikes_in_row = 0
        self.not_finite_in_row = 0
        self.last_update = step  # the newest step that changed the weights, as far as this process knows
        self.newest_is_finite = True  # loss and norm of the newest step that was read
        self._reported_range: range | None = None  # of steps that are left out

    @property
    def in_row(self) -> int:
        """How many steps were skipped since the last update. Steps that are left out do not count."""
        return self.spikes_in_row + self.not_finite_in_row

    def accept(self, step: int) -> None:
        """Note that a step changed the weights."""
        self.spikes_in_row = self.not_finite_in_row = 0
        self.last_update = step
        self.newest_is_finite = True

    def hold_save(self, last: bool) -> bool:
        """Return whether the state must not be saved, because steps are being skipped. last: the process ends here.

        The weights may be why steps are not finite. After spikes, the last save of a process is made nevertheless:
        otherwise the steps since the save before would be lost, although the loss is finite.
        """
        return self.in_row > 0 and not (last and self.newest_is_finite)

    def leave_out(self, step: int, steps: range) -> None:
        """Report the steps that `skip_steps` leaves out. step: one of them; only the first is reported."""
        if self._reported_range != steps:
            text = f"steps {steps[0]} to {steps[-1]} are left out (skip_steps): their batches are not trained on"
            self.log.event(step, "left_out", text, steps=[steps[0], steps[-1]])
        self._reported_range = steps

    def skip(self, result: StepResult, loss: float, norm: float, usual: Sequence[float]) -> None:
        """Log a skipped step with its reason and its windows.

        usual: means of loss and norm, then their standard deviations; empty without skip_spikes.
        Errors: DivergenceError after too many in a row.
        """
        self.total += 1
        self.newest_is_finite = math.isfinite(loss) and math.isfinite(norm)
        if self.newest_is_finite:
            self.spikes_in_row += 1
            text, values = self._describe_spike(result, {"loss": loss, "grad_norm": norm}, usual)
        else:
            self.not_finite_in_row += 1
            text, values = self._describe_not_finite(result, loss, norm)
        self.log.event(result.step, "skipped", text, **values)
        if self.in_row >= self.config.max_skipped_steps:
            kinds = {"not finite": self.not_finite_in_row, "spikes": self.spikes_in_row}
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
            raise DivergenceError(
                f"step {result.step}: {text}; skipped steps in a row: {self.in_row} ({counts}), max_skipped_steps: "
                f"{self.config.max_skipped_steps}, so the run stops"
            )

    def _describe_not_finite(self, result: StepResult, loss: float, norm: float) -> tuple[str, dict[str, Any]]:
        """Return the text and the values of the event."""
        losses = result.micro_batch_losses.tolist()
        bad_micro_batches = [index for index, value in enumerate(losses) if not math.isfinite(value)]
        where, values = self._locate(result.step, bad_micro_batches)
        text = f"not finite: loss {loss}, gradient norm {norm} ({where or 'only in the gradient'}); update skipped"
        return text, {"reason": "not_finite", "loss": loss, "grad_norm": norm, **values}

    def _describe_spike(
        self, result: StepResult, values: dict[str, float], usual: Sequence[float]
    ) -> tuple[str, dict[str, Any]]:
        """Return the text and the values of the event. values: by their names in records."""
        means = dict(zip(values, usual[:2], strict=True))
        above = zip(values, means.values(), usual[2:], strict=True)
        deviations = {name: _deviations(values[name] - mean, deviation) for name, mean, deviation in above}
        reason = max(values, key=lambda name: deviations[name])
        losses = result.micro_batch_losses.tolist()
        where, places = self._locate(result.step, [losses.index(max(losses))])
        text = (
            f"spike: {QUANTITIES[reason]} {values[reason]:.4g} is {deviations[reason]:.1f} standard deviations above "
            f"its mean {means[reason]:.4g} (highest loss: {where}); update skipped"
        )
        return text, {"reason": reason, **values, "mean": means[reason], "deviations": deviations[reason], **places}

    def _locate(self, step: int, micro_batches: list[int]) -> tuple[str, dict[str, Any]]:
        """Return which ranks computed these micro-batches of a step from which windows: as text, and as values."""
        if not micro_batches:
            return "", {}
        before = step - 1  # the number of completed steps, by which the windows of a step are drawn
        plan = self.plans.at(before)
        ranks = [rank for rank in range(plan.world_size) if _micro_batches_of(rank, plan).intersection(micro_batches)]
        slots = [slot for index in micro_batches for slot in plan.slots(index)]
        places = self.data.places(self.config.seed, before, slots[:MAX_WINDOWS_NAMED])
        where = f"rank(s) {ranks}, slots {format_list(slots)}, windows starting at {', '.join(places)}"
        return where, {"slots": slots, "windows": places}

    def setting_that_leaves_out(self, last: int) -> str:
        """Return the `skip_steps` that leaves out the steps after the last update, up to `last`."""
        added = format_step_ranges((range(self.last_update + 1, last + 1),))
        return f"skip_steps = {','.join(filter(None, [self.config.skip_steps, added]))}"


def _micro_batches_of(rank: int, plan: BatchPlan) -> set[int]:
    return set(plan.share(*divmod(rank // plan.cp, plan.shard)).micro_batches)


def _deviations(above: float, deviation: float) -> float:
    """Return how many standard deviations a value is above its mean."""
    if deviation == 0:  # all values before it were equal
        return math.inf if above > 0 else 0.0
    return above / deviation
