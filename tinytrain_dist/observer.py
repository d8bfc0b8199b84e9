"""Owns reading a step when the next one is under way: what was skipped, what is logged, whether all agreed to stop.

Must not know how a step is made. Every rank has one and calls it at the same steps, since logging gathers from all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tinytrain_dist.config import TrainingConfig
from tinytrain_dist.data import TokenFiles
from tinytrain_dist.distributed import DistributedContext, Vote
from tinytrain_dist.errors import TrainingError
from tinytrain_dist.layout import BatchPlan
from tinytrain_dist.metrics import HostCopy, RunLog, Stopwatch, memory_bytes, peak_flops


@dataclass
class StepReport:
    """What one step leaves behind; its numbers are read when the next step is under way."""

    step: int
    lr: float
    numbers: HostCopy  # loss, gradient norm, skipped (0 or 1)
    leaf_losses: Tensor
    vote: Vote
    data_wait: float


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return step % every == 0


class StepObserver:
    """Takes the report of each step and reads the one before it, whose numbers are there by then."""

    def __init__(
        self,
        config: TrainingConfig,
        context: DistributedContext,
        plan: BatchPlan,
        log: RunLog,
        *,
        step: int,
        data: TokenFiles,
        flops_per_token: float,
    ) -> None:
        """step: where the run starts; data: what the steps draw from; flops_per_token: forward and backward."""
        self.config, self.context, self.plan, self.log = config, context, plan, log
        self.data, self.flops_per_token = data, flops_per_token
        self.watch, self.logged_step = Stopwatch(), step
        self.skipped, self.skipped_in_row = 0, 0
        self.step_seconds, self.stopping = 0.0, False
        self._unread: StepReport | None = None

    def take(self, report: StepReport) -> None:
        """Read the report before this one and keep this one."""
        self.settle()
        self._unread = report

    def settle(self) -> None:
        """Read the unread step. A collective. Errors: TrainingError after max_skipped_steps bad steps in a row."""
        report, self._unread = self._unread, None
        if report is None:
            return
        loss, norm, skipped = report.numbers.read()
        self.skipped += int(skipped)
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        if skipped:
            self._report_skip(report, loss, norm)
        if due(report.step, self.config.log_every):
            self._log(report, loss, norm)
        self.stopping = self.stopping or report.vote.result()

    def _report_skip(self, report: StepReport, loss: float, norm: float) -> None:
        bad = [leaf for leaf, value in enumerate(report.leaf_losses.tolist()) if not math.isfinite(value)]
        slots = [slot for leaf in bad for slot in self.plan.slots(leaf)]
        places = self.data.places(self.config.seed, report.step - 1, slots[:16])
        owners = sorted(rank for rank, leaves in enumerate(self._leaves_by_rank()) if set(leaves) & set(bad))
        where = f"rank(s) {owners}, windows starting at {', '.join(places)}" if bad else "in the gradient only"
        text = f"not finite (loss {loss}, gradient norm {norm}; {where}); update skipped"
        self.log.event(report.step, "skipped", text)
        if self.skipped_in_row >= self.config.max_skipped_steps:
            raise TrainingError(
                f"step {report.step}: {text}; it was the {self.skipped_in_row}th in a row (max_skipped_steps), so the "
                "run stops. The last checkpoint is good; lower lr_max or look at those windows"
            )

    def _leaves_by_rank(self) -> list[list[int]]:
        plan = self.plan
        return [
            [plan.leaf(rank // plan.shard, rank % plan.shard, k) for k in range(plan.accumulation_steps)]
            for rank in range(plan.ranks)
        ]

    def _log(self, report: StepReport, loss: float, norm: float) -> None:
        seconds = self.watch.lap(report.numbers.ready_at) / (report.step - self.logged_step)
        self.logged_step, self.step_seconds = report.step, seconds
        gib = memory_bytes(self.context.device) / 2**30
        everyone = self.context.gather_objects((seconds, report.data_wait, gib))
        slowest = max(theirs[0] for theirs in everyone)
        own = self.plan.tokens_per_step / self.plan.ranks
        values = {
            "loss": loss,
            "lr": report.lr,
            "grad_norm": norm,
            "tokens_per_second": self.plan.tokens_per_step / slowest,
            "step_seconds": slowest,
            "data_wait_seconds": max(theirs[1] for theirs in everyone),
            "memory_gib": max(theirs[2] for theirs in everyone),
            "skipped_steps": float(self.skipped),
        }
        peak = peak_flops(self.context.device)
        if peak is not None:
            values["mfu"] = values["tokens_per_second"] * self.flops_per_token / (peak * self.plan.ranks)
        self.log.train(report.step, values, {"tokens_per_second_by_rank": [own / theirs[0] for theirs in everyone]})
