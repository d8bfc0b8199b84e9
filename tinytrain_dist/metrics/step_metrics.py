"""Read the numbers of a step while the next one runs: skipped steps, logged values, votes to stop.

Must not know how a step is made. Every rank has one and calls it at the same steps, since logging gathers from all.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.context import DistributedContext, Vote
from tinytrain_dist.errors import ReplicaMismatchError, TrainingError
from tinytrain_dist.metrics.device_stats import peak_flops, peak_memory_bytes
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.metrics.timers import ForwardTimer, HostCopy, StepTimer
from tinytrain_dist.parallel.replica_check import compare_fingerprints

PHASES = ("data", "forward_backward", "reduction", "optimizer", "reading", "evaluation", "checkpoint")
LAYER_NORMS_EVERY = 10  # logged steps from one look at the norms by layer to the next
SLOW_RANK_RATIO = 1.2  # a rank whose own work takes so many times the median's


@dataclass
class StepResult:
    """What one step leaves behind; its numbers are read while the next step runs."""

    step: int
    lr: float
    numbers: HostCopy  # loss, gradient norm, skipped (0 or 1)
    micro_batch_losses: Tensor
    vote: Vote
    data_wait: float
    forward: list[Any]  # marks of the WorkClock
    phases: dict[str, float]  # seconds in each since the step before
    layer_norms: HostCopy | None  # of gradients and of weights, by layer


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return step % every == 0


class StepMetrics:
    """Takes the report of each step and reads the one before it, whose numbers are there by then."""

    def __init__(
        self,
        config: TrainingConfig,
        context: DistributedContext,
        plan: BatchPlan,
        log: RunLog,
        *,
        step: int,
        data: TokenDataset,
        flops_per_token: float,
        clock: ForwardTimer,
        layers: list[str],
        process_start: float,
    ) -> None:
        """step: where the run starts; data: what the steps draw from; flops_per_token: forward and backward.

        clock: times this rank's own work; layers: what `layer_norms` are of; process_start: by time.monotonic().
        """
        self.config, self.context, self.plan, self.log = config, context, plan, log
        self.data, self.flops_per_token = data, flops_per_token
        self.clock, self.layers = clock, layers
        self.process_start = process_start
        self.hosts = context.all_gather_object(context.host)
        self.watch, self.logged_step = StepTimer(), step
        self.useful_seconds, self.useful_steps = 0.0, 0
        self.waited, self.worked, self.phases = 0.0, 0.0, Counter[str]()
        self.suspect: int | None = None
        self.named: int | None = None
        self._prints: tuple[int, list[str], HostCopy] | None = None
        self.skipped, self.skipped_in_row = 0, 0
        self.step_seconds, self.stopping = 0.0, False
        self._unread: StepResult | None = None

    def take(self, report: StepResult) -> None:
        """Read the report before this one and keep this one."""
        self.settle()
        self._unread = report

    def settle(self) -> None:
        """Read the unread step. A collective. Errors: TrainingError after max_skipped_steps bad steps in a row."""
        report, self._unread = self._unread, None
        if report is None:
            return
        loss, norm, skipped = report.numbers.read()
        self.waited += report.data_wait
        self.worked += self.clock.seconds(report.forward)
        self.phases.update(report.phases)  # adds
        self.skipped += int(skipped)
        self.useful_steps += 1 - int(skipped)
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        if skipped:
            self._report_skip(report, loss, norm)
        if due(report.step, self.config.log_every):
            self._log(report, loss, norm)
        self.stopping = self.stopping or report.vote.result()

    def _report_skip(self, report: StepResult, loss: float, norm: float) -> None:
        bad = [index for index, value in enumerate(report.micro_batch_losses.tolist()) if not math.isfinite(value)]
        slots = [slot for index in bad for slot in self.plan.slots(index)]
        places = self.data.places(self.config.seed, report.step - 1, slots[:16])
        owners = sorted(rank for rank, indices in enumerate(self._micro_batches_by_rank()) if set(indices) & set(bad))
        where = f"rank(s) {owners}, windows starting at {', '.join(places)}" if bad else "in the gradient only"
        text = f"not finite (loss {loss}, gradient norm {norm}; {where}); update skipped"
        self.log.event(report.step, "skipped", text)
        if self.skipped_in_row >= self.config.max_skipped_steps:
            raise TrainingError(
                f"step {report.step}: {text}; it was the {self.skipped_in_row}th in a row (max_skipped_steps), so the "
                "run stops. The last checkpoint is good; lower lr_max or look at those windows"
            )

    def _micro_batches_by_rank(self) -> list[list[int]]:
        plan = self.plan
        return [
            [plan.micro_batch_index(rank // plan.shard, rank % plan.shard, k) for k in range(plan.accumulation_steps)]
            for rank in range(plan.ranks)
        ]

    def fingerprint(self, step: int, names: list[str], prints: HostCopy) -> None:
        """Keep what the bits of this step's state add up to; replicas compare it with the next logged step."""
        self._prints = (step, names, prints)

    def _compare_replicas(self) -> None:
        """Compare what `fingerprint` has kept. A collective. Errors: ReplicasDiffer naming the rank that is odd."""
        kept, self._prints = self._prints, None
        if kept is not None:
            step, names, prints = kept
            try:
                compare_fingerprints(names, prints.read(), self.context)
            except ReplicaMismatchError as error:
                self.log.event(step, "replicas_differ", str(error))
                raise

    def _log(self, report: StepResult, loss: float, norm: float) -> None:
        self._compare_replicas()
        steps = report.step - self.logged_step
        seconds = self.watch.lap(report.numbers.ready_at) / steps
        self.logged_step, self.step_seconds = report.step, seconds
        self.useful_seconds += seconds * self.useful_steps
        own = [seconds, self.waited / steps, self.worked / steps, peak_memory_bytes(self.context.device) / 2**30]
        everyone = self.context.all_gather_numbers(own + [self.phases[name] / steps for name in PHASES])
        self.waited, self.worked, self.useful_steps, self.phases = 0.0, 0.0, 0, Counter()
        slowest, waits, works, gib, *by_phase = (list(column) for column in zip(*everyone, strict=True))
        works = [wait + work for wait, work in zip(waits, works, strict=True)]
        values = {
            "loss": loss,
            "lr": report.lr,
            "grad_norm": norm,
            "tokens_per_second": self.plan.tokens_per_step / max(slowest),
            "step_seconds": max(slowest),
            "data_wait_seconds": max(waits),
            "memory_gib": max(gib),
            "skipped_steps": float(self.skipped),
            "goodput": self.useful_seconds / (time.monotonic() - self.process_start),
            **self._slowest(report.step, waits, works),
        }
        peak = peak_flops(self.context.device)
        if peak is not None:
            values["mfu"] = values["tokens_per_second"] * self.flops_per_token / (peak * self.plan.ranks)
        groups = {"step_time": {name: statistics.mean(times) for name, times in zip(PHASES, by_phase, strict=True)}}
        if report.layer_norms is not None:
            norms, count = report.layer_norms.read(), len(self.layers)
            groups["grad_norm_by_layer"] = dict(zip(self.layers, norms[:count], strict=True))
            groups["weight_norm_by_layer"] = dict(zip(self.layers, norms[count:], strict=True))
        self.log.train(report.step, values, groups, works)

    def _slowest(self, step: int, waits: list[float], works: list[float]) -> dict[str, float]:
        """Find the rank whose own work takes longest; warn after two slow intervals in a row, until it has recovered.

        Steps take equally long on all ranks, since all wait for the slowest: only what a rank does before it waits for
        the others tells them apart, which is waiting for data and the forward pass.
        """
        rank, median = max(range(len(works)), key=works.__getitem__), statistics.median_low(works)
        ratio = works[rank] / median if median > 0 else 1.0
        suspect = rank if ratio > SLOW_RANK_RATIO else None
        if suspect is not None and suspect == self.suspect and suspect != self.named:
            self.log.event(
                step,
                "slow",
                f"rank {rank} ({self.hosts[rank]}) is slow: {works[rank]:.3f} s of its own work a step, {ratio:.1f} "
                f"times the median {median:.3f} s; {waits[rank]:.3f} s of it waiting for data, the rest in forward. "
                "All ranks wait for it",
            )
            self.named = suspect
        self.named = self.named if suspect is not None else None
        self.suspect = suspect
        return {"slowest_rank": float(rank), "slowest_to_median": ratio}
