"""Read the result of a step while the next step runs: skipped updates, logged values, votes to stop.

Must not know how a step is computed. Every rank has one `StepMetrics` and calls it at the same steps, because logging
gathers values from all ranks. The classes in reading order:

- `StepResult`: the result of one step; its numbers may still be on the device
- `Interval`: sums over the steps since the last logged one
- `RankTimes`: what one rank sends to all others when a step is logged
- `StepMetrics`: reads the results and logs them
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.token_dataset import TokenDataset, short_names
from tinytrain_dist.distributed.batch_plan import BatchPlans
from tinytrain_dist.distributed.context import DistributedContext, Vote
from tinytrain_dist.errors import ReplicaMismatchError
from tinytrain_dist.metrics.device_specs import product_type
from tinytrain_dist.metrics.device_stats import peak_flops, peak_memory_bytes
from tinytrain_dist.metrics.loss_level import LossLevel
from tinytrain_dist.metrics.phase_timer import STEP_PHASES, start_seconds
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.metrics.skipped_steps import SkippedSteps
from tinytrain_dist.metrics.slow_ranks import SlowRankDetector
from tinytrain_dist.metrics.source_metrics import ended_epochs, source_groups
from tinytrain_dist.metrics.stability_metrics import stability_groups
from tinytrain_dist.metrics.step_timer import ForwardTimer, HostCopy, StepTimer
from tinytrain_dist.parallel.replica_check import compare_fingerprints

LAYER_NORMS_EVERY = 10  # norms by layer are recorded once in this many logged steps


def due(step: int, every: int) -> bool:
    """Return whether something that happens every `every` steps happens after step `step`."""
    return step % every == 0


@dataclass
class StepResult:
    """The result of one step; its numbers are read while the next step runs."""

    step: int  # completed steps, this one included
    lr: float
    # loss in nats per token, gradient norm before clipping, skipped (0 or 1); with skip_spikes also the means of loss
    # and norm, and their standard deviations
    numbers: HostCopy
    micro_batch_losses: Tensor  # summed losses of all micro-batches of the global batch: [num_micro_batches]
    vote: Vote  # on whether the run stops after this step
    data_wait: float  # seconds that this rank waited for data
    forward: list[Any]  # marks of the ForwardTimer
    phases: dict[str, float]  # seconds in each phase since the previous step
    layer_norms: HostCopy | None  # the norms of gradients by layer, then those of weights; None if not computed
    source_sums: HostCopy | None = None  # of this rank since the last logged step, see SourceSums; None: one source
    z_losses: HostCopy | None = None  # of this rank's micro-batches, per token of the global batch; None: no z_loss
    stability: HostCopy | None = None  # of this rank, see stability_metrics.py; None: not measured in this step
    left_out: range | None = None  # the steps of skip_steps to which this one belongs; None: it was computed


@dataclass
class Interval:
    """Sums of this rank over the steps since the last logged one; each interval begins with a new object."""

    data_wait_seconds: float = 0.0
    forward_seconds: float = 0.0
    useful_steps: int = 0  # steps whose update was not skipped
    phase_seconds: dict[str, float] = field(default_factory=dict)

    def add(self, result: StepResult, forward_seconds: float, skipped: bool) -> None:
        """Count one more step."""
        self.data_wait_seconds += result.data_wait
        self.forward_seconds += forward_seconds
        self.useful_steps += 0 if skipped else 1
        for phase, seconds in result.phases.items():
            self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + seconds


@dataclass(frozen=True)
class RankTimes:
    """What one rank measured since the last logged step: seconds per step, and its peak memory."""

    step_seconds: float
    data_wait_seconds: float
    forward_seconds: float
    memory_gib: float
    phase_seconds: tuple[float, ...]  # in the order of STEP_PHASES

    @property
    def work_seconds(self) -> float:
        """Seconds per step of the rank's own work, before it waits for other ranks."""
        return self.data_wait_seconds + self.forward_seconds

    def to_row(self) -> list[float]:
        """Return the numbers as a list that ranks can exchange; `from_row` is the inverse."""
        return [
            self.step_seconds,
            self.data_wait_seconds,
            self.forward_seconds,
            self.memory_gib,
            *self.phase_seconds,
        ]

    @classmethod
    def from_row(cls, row: Sequence[float]) -> RankTimes:
        """Return the object from which `to_row` has made this list."""
        step_seconds, data_wait_seconds, forward_seconds, memory_gib, *phase_seconds = row
        return cls(
            step_seconds,
            data_wait_seconds,
            forward_seconds,
            memory_gib,
            tuple(phase_seconds),
        )


@dataclass(frozen=True)
class Fingerprints:
    """The fingerprints of a state, to be compared between replicas at the next logged step."""

    step: int
    names: list[str]  # of the tensors
    values: HostCopy


class StepMetrics:
    """Take the result of each step, and read the previous one, whose numbers have reached the host by then."""

    def __init__(
        self,
        config: TrainingConfig,
        context: DistributedContext,
        plans: BatchPlans,
        log: RunLog,
        *,
        step: int,
        record: dict[str, Any],
        data: TokenDataset,
        flops_per_token: float,
        forward_timer: ForwardTimer,
        layer_sizes: dict[str, int],
        rank_start: float,
        after_first_step: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Begin after `step` steps. A collective: ranks exchange their host names.

        record: kept in every checkpoint, see LossLevel. data: the training data, to name the windows of a skipped step.
        flops_per_token: of forward and backward. forward_timer: measures the forward passes of this rank.
        layer_sizes: parameters of each layer in `layer_norms`. rank_start: by time.monotonic().
        after_first_step: called once with the seconds of each phase until the end of the first step.
        """
        self.config = config
        self.context = context
        self.plans = plans
        self.log = log
        self.data = data
        self.flops_per_token = flops_per_token
        self.forward_timer = forward_timer
        self.layer_sizes = layer_sizes
        self.rank_start = rank_start
        self.after_first_step = after_first_step
        self.watch = StepTimer()  # paused during evaluations and saves
        self.slow_ranks = SlowRankDetector(context.all_gather_object(context.host))
        self.stopping = False  # all ranks have agreed to stop
        self.skips = SkippedSteps(config, plans, log, data, step)
        self.level = LossLevel(record)
        self.first_step = step + 1
        self.read_step = step  # the newest step whose numbers were read
        self.logged_step = step  # the last logged step
        self.step_seconds = 0.0  # per step, in the last logged interval
        self.useful_seconds = 0.0  # in steps that were not skipped, since the start of this rank
        self._interval = Interval()
        self._unread: StepResult | None = None
        self._other_votes: list[bool] = []  # see take_other_votes
        self._fingerprints: Fingerprints | None = None

    def take(self, result: StepResult) -> None:
        """Read the previous result, and keep this one for later. A collective, see `settle`."""
        self.settle()
        self._unread = result

    def settle(self) -> None:
        """Read the unread result, if there is one. A collective.

        Errors: DivergenceError after max_skipped_steps skipped steps in a row; ReplicaMismatchError if kept
        fingerprints differ.
        """
        result = self._unread
        self._unread = None
        if result is None:
            return
        loss, norm, skipped, *usual = result.numbers.read()
        if result.step == self.first_step:
            self.log.first_step(result.step, start_seconds(result.phases))
            if self.after_first_step is not None:
                self.after_first_step(result.phases)
        # as if all ranks had the largest share: a rank with more micro-batches than another is not slow
        share = self.plans.at(result.step - 1).relative_share(self.context.replica)
        self._interval.add(result, self.forward_timer.seconds(result.forward) / share, bool(skipped))
        self.read_step = result.step
        if result.left_out is not None:
            self.skips.leave_out(result.step, result.left_out)
        elif skipped:
            self.skips.skip(result, loss, norm, usual)
        else:
            self.skips.accept(result.step)
            self.level.update(result.step, loss)
        if ended := ended_epochs(self.data, result.step):
            self.log.event(result.step, "epoch", ended)
        if due(result.step, self.config.log_every) and result.left_out is None:
            self._compare_replicas()
            self._log(result, loss, norm)
        stops, *self._other_votes = result.vote.results()
        self.stopping = self.stopping or stops

    def take_other_votes(self) -> list[bool]:
        """Return what the newest vote that was read has decided besides the stop; [] if it was returned before.

        The same on all ranks, if they call this at the same places.
        """
        votes, self._other_votes = self._other_votes, []
        return votes

    @property
    def skipped(self) -> int:
        """The updates that were skipped by this process."""
        return self.skips.total

    @property
    def skipping(self) -> bool:
        """Whether the update of the newest step that was read was skipped."""
        return self.skips.in_row > 0

    def fingerprint(self, step: int, names: list[str], prints: HostCopy) -> None:
        """Keep the fingerprints of this step's state; replicas compare them at the next logged step."""
        self._fingerprints = Fingerprints(step, names, prints)

    def _compare_replicas(self) -> None:
        """Compare the fingerprints that were kept. A collective.

        Errors: ReplicaMismatchError naming the rank that deviates.
        """
        kept = self._fingerprints
        self._fingerprints = None
        if kept is None:
            return
        try:
            compare_fingerprints(kept.names, kept.values.read(), self.context)
        except ReplicaMismatchError as error:
            self.log.event(kept.step, "replicas_differ", str(error))
            raise

    def _log(self, result: StepResult, loss: float, norm: float) -> None:
        """Write the record of a logged step, and begin the next interval. A collective."""
        tokens = self.plans.tokens_before(result.step) - self.plans.tokens_before(self.logged_step)
        tokens_per_step = tokens / (result.step - self.logged_step)
        ranks = self._gather_times(result)
        wait_seconds = [times.data_wait_seconds for times in ranks]
        work_seconds = [times.work_seconds for times in ranks]
        slowest = self.slow_ranks.update(wait_seconds, work_seconds)
        if slowest.warning:
            self.log.event(result.step, "slow", slowest.warning)
        step_seconds = max(times.step_seconds for times in ranks)
        values = {
            "loss": loss,
            "lr": result.lr,
            "grad_norm": norm,
            "tokens_per_second": tokens_per_step / step_seconds,
            "step_seconds": step_seconds,
            "data_wait_seconds": max(wait_seconds),
            "memory_gib": max(times.memory_gib for times in ranks),
            "skipped_steps": float(self.skipped),
            "goodput": self.useful_seconds / (time.monotonic() - self.rank_start),
            "slowest_rank": float(slowest.rank),
            "slowest_to_median": slowest.ratio,
        }
        peak = peak_flops(self.context.device, product_type(self.config.precision, self.config.reproducible))
        if self.plans.sizes.varies:
            values["batch_size"] = float(self.plans.sizes.at(result.step - 1))
        epochs = self.data.epochs(result.step)
        if epochs is not None:
            values["epoch"] = epochs
        if result.z_losses is not None:
            values["z_loss"] = math.fsum(chain(*self.context.all_gather_uneven_numbers(result.z_losses.read())))
        if peak is not None:
            values["mfu"] = values["tokens_per_second"] * self.flops_per_token / (peak * self.context.world_size)
        self.log.train(result.step, values, self._groups(result, ranks), work_seconds)

    def _gather_times(self, result: StepResult) -> list[RankTimes]:
        """End the interval with `result`, and return the times of every rank in it. A collective."""
        steps = result.step - self.logged_step
        interval = self._interval
        self._interval = Interval()
        self.logged_step = result.step
        self.step_seconds = self.watch.lap(result.numbers.ready_at) / steps
        self.useful_seconds += self.step_seconds * interval.useful_steps
        own = RankTimes(
            step_seconds=self.step_seconds,
            data_wait_seconds=interval.data_wait_seconds / steps,
            forward_seconds=interval.forward_seconds / steps,
            memory_gib=peak_memory_bytes(self.context.device) / 2**30,
            phase_seconds=tuple(interval.phase_seconds.get(phase, 0.0) / steps for phase in STEP_PHASES),
        )
        return [RankTimes.from_row(row) for row in self.context.all_gather_numbers(own.to_row())]

    def _groups(self, result: StepResult, ranks: list[RankTimes]) -> dict[str, dict[str, float]]:
        """Return the groups of related numbers: seconds by phase; norms by layer if computed; sources if several.

        With stability_every also those of stability_metrics.py.
        A collective.
        """
        by_phase = zip(*(times.phase_seconds for times in ranks), strict=True)
        groups = {
            "step_time": {phase: statistics.mean(times) for phase, times in zip(STEP_PHASES, by_phase, strict=True)}
        }
        if result.layer_norms is not None:
            norms = result.layer_norms.read()
            count = len(self.layer_sizes)
            groups["grad_norm_by_layer"] = dict(zip(self.layer_sizes, norms[:count], strict=True))
            groups["weight_norm_by_layer"] = dict(zip(self.layer_sizes, norms[count:], strict=True))
            if result.stability is not None:
                rows = self.context.all_gather_uneven_numbers(result.stability.read())
                groups |= stability_groups(rows, groups["grad_norm_by_layer"], self.layer_sizes)
        if result.source_sums is not None:
            names = short_names(self.config.train_files)
            groups |= source_groups(names, self.context.all_gather_numbers(result.source_sums.read()))
            epochs = self.data.epochs_of_sources(result.step)
            if epochs:
                groups["source_epoch"] = dict(zip(names, epochs, strict=True))
        return groups
