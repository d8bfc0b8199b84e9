"""Run the training loop: step, evaluate, save, stop.

Must not know how a step is computed, how files are written or how numbers are shown: other parts of a `Trainer` do
that. `build.py` builds the parts.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import torch

from tinytrain_dist.checkpoint.resume_rules import nothing_to_train
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.batches import Prefetcher, read_ahead_depth
from tinytrain_dist.data.training_windows import Windows
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import DivergenceError, TrainingError
from tinytrain_dist.metrics.phase_timer import PhaseTimer
from tinytrain_dist.metrics.profiler import StepProfiler
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.metrics.step_metrics import StepMetrics, StepResult, due
from tinytrain_dist.metrics.step_timer import HostCopy
from tinytrain_dist.parallel.compile import compiled_graph_count
from tinytrain_dist.parallel.replica_check import fingerprints
from tinytrain_dist.reliability.run_lock import RunLock
from tinytrain_dist.reliability.run_state import owns_run, write_state
from tinytrain_dist.reliability.start_marks import leave_start
from tinytrain_dist.reliability.stop_requests import StopRequests, received_signal, signals_received
from tinytrain_dist.reliability.world import REGROUP_REASON, ProgressMark, main_reason, regroup_requested
from tinytrain_dist.training.determinism import collect_garbage
from tinytrain_dist.training.divergence import Divergence
from tinytrain_dist.training.evaluation import EarlyStopping, Evaluator
from tinytrain_dist.training.left_out_steps import StepRunner
from tinytrain_dist.training.memory_fitting import memory_report
from tinytrain_dist.training.run_data import RunData
from tinytrain_dist.training.run_saver import RunSaver
from tinytrain_dist.training.run_snapshots import RunSnapshots
from tinytrain_dist.training.text_samples import TextSampler
from tinytrain_dist.training.train_step import TrainStep

GARBAGE_EVERY = 200  # steps between garbage collections
WARM_UP_STEPS = 2  # steps in which torch.compile may compile without a warning


class Trainer:
    """A run of one configuration on this rank. `Trainer.build` creates it, and `fit` runs it to its end."""

    batches: Prefetcher  # read ahead for the loop in progress

    def __init__(
        self,
        *,
        train_step: TrainStep,
        data: RunData,
        sampler: TextSampler,
        metrics: StepMetrics,
        saver: RunSaver,
        snapshots: RunSnapshots,
        log: RunLog,
        stop_requests: StopRequests,
        lock: RunLock,
        profiler: StepProfiler | None,
        step: int,
        record: dict[str, Any],
        source: Path | None = None,
    ) -> None:
        """Combine the parts of a run that continues after `step` steps.

        record: saved in every checkpoint, see EarlyStopping and LossLevel. source: the loaded checkpoint.
        """
        self.config = train_step.config
        self.context = train_step.context
        self.train_step = train_step
        self.data = data
        self.evaluator = Evaluator(train_step, data, sampler, lambda: bool(self.why_stop()))
        self.early_stopping = EarlyStopping(self.config.early_stop_patience, record)
        self.metrics = metrics
        self.saver = saver
        self.checkpoints = saver.checkpoints
        self.snapshots = snapshots
        self.log = log
        self.stop_requests = stop_requests
        self.lock = lock
        self.profiler = profiler
        self.phase_timer = train_step.phase_timer
        self.step = self.resumed_step = step  # number of completed optimizer steps
        self.runner = StepRunner(train_step)
        self.first_step = self.runner.first_computed(step + 1)
        self.record = record
        self.divergence = Divergence(metrics, saver, self._compute_again, source)
        self.stop_reason = ""  # why this rank wants to stop
        self.progress = ProgressMark()
        self.finishing = False  # the loop has ended, so the next save is the last one

    @classmethod
    def build(
        cls, config: TrainingConfig, context: DistributedContext, phase_timer: PhaseTimer | None = None
    ) -> Trainer:
        """Build the run of a configuration; see `build_trainer`. A collective."""
        from tinytrain_dist.training.build import build_trainer  # not at the top: it imports this module

        return build_trainer(config, context, phase_timer)

    def fit(self) -> str:
        """Train to the last step or until asked to stop. A collective.

        Returns "done", "preempted", or "regrouped" if the agents start the ranks again in another world.
        """
        self._agree_to_begin()
        try:
            self._run_loop()
            return self._finish()
        except DivergenceError as error:
            raise self.divergence.explain(error) from None

    def _run_loop(self) -> None:
        config = self.config
        if self.step and due(self.step, config.eval_every) and self.record.get("eval_step") != self.step:
            self.evaluate()  # the run was stopped before this evaluation
        plan = self.train_step.plan
        windows_per_step = plan.accumulation_steps * plan.micro_batch_size
        depth = read_ahead_depth(self.data.train.window_bytes * windows_per_step)
        self.batches = Prefetcher(self._read_rows, self.step, depth, last_step=config.last_step)
        try:
            collect_garbage(first=True)
            while self.step < config.last_step and not self.stopping:
                self.metrics.take(self.run_step())
                if config.fingerprint_every and due(self.step, config.fingerprint_every):
                    self._take_fingerprints()
                self.saver.collect(self.step)
                if due(self.step, GARBAGE_EVERY):
                    collect_garbage()
                if due(self.step, config.eval_every):
                    self.evaluate()
                if due(self.step, config.ckpt_every) or self.early_stopping.is_best(self.step):
                    self.save()
                self.snapshots.after_step(self.step, lambda: self.record | self.train_step.step_filter.state())
        except TrainingError:
            self.saver.collect(self.step, wait=True)  # that save is intact, or its error is closer to the cause
            raise
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"{error}\n{memory_report(self.config, self.context)}") from error
        finally:
            self._close_loop()

    def run_step(self) -> StepResult:
        """Run one optimizer step; log a warning if torch.compile compiled again after the first steps."""
        graphs_before = compiled_graph_count()
        result = self.runner.run(self.step, self.batches, bool(self.why_stop()), *self.snapshots.votes())
        self.step = result.step
        self.progress.set(self.step)
        new_graphs = compiled_graph_count() - graphs_before
        if new_graphs and self.step >= self.first_step + WARM_UP_STEPS:
            text = (
                f"torch.compile compiled {new_graphs} graph(s) again; TORCH_LOGS=recompiles shows why, "
                "compile = false avoids it"
            )
            self.log.event(self.step, "recompiled", text)
        return result

    def evaluate(self) -> float | None:
        """Log the loss over the evaluation windows and return it; None without val_data, or if the run stops.

        A collective.
        """
        if not self.data.evaluation:
            return None
        self.metrics.settle()
        if self.metrics.stopping:
            return None
        started = time.perf_counter()
        with self.metrics.watch.paused():
            evaluation = self.evaluator.run(self.step)
        if evaluation is None:
            self.metrics.stopping = True
            return None
        self.record |= {"eval_loss": evaluation.loss, "eval_step": self.step}
        # An extra evaluation at the end of a run must not count, nor one of weights that no update has changed.
        if due(self.step, self.config.eval_every) and not self.metrics.skipping:
            self.early_stopping.update(self.step, evaluation.loss, self.context)
        self.log.samples(self.step, evaluation.samples)
        self.log.evaluation(self.step, evaluation.loss, time.perf_counter() - started, evaluation.others)
        return evaluation.loss

    def save(self) -> None:
        """Start to save the current step, unless updates are being skipped. A collective."""
        self.metrics.settle()
        if self.context.any_rank(self.metrics.skips.hold_save(last=self.finishing)):
            self.saver.collect(self.step, wait=True)
            self.saver.say_held(self.step)
        else:
            self._start_save()

    def _start_save(self) -> None:
        ends_well = self._complete and self.metrics.level.sound_step >= self.step - 1
        sound_step = None if ends_well else self.metrics.level.sound_step
        last = self.finishing or self.step == self.config.last_step
        with self.metrics.watch.paused():
            self.saver.save(self.step, self.record | self.train_step.step_filter.state(), last, sound_step)

    @property
    def stopping(self) -> bool:
        """Whether the loop ends: all ranks agreed to stop, or early stopping is out of patience."""
        return self.metrics.stopping or self.early_stopping.out_of_patience

    @property
    def _complete(self) -> bool:
        """Whether this is the last step of the run, so that nothing will be trained after it."""
        return self.step >= self.config.last_step or self.early_stopping.out_of_patience

    def why_stop(self) -> str:
        """Return why this rank wants to stop, or "". Once there is a reason, it stays the same."""
        reserve_seconds = 2 * self.saver.saving_seconds + 3 * self.metrics.step_seconds
        self.stop_reason = self.stop_reason or self.checkpoints.failure or self.stop_requests.reason(reserve_seconds)
        return self.stop_reason

    def _agree_to_begin(self) -> None:
        """End the run before its first step if a stop signal came during the start. A collective.

        After this no rank is in a phase of the start.
        """
        leave_start()
        self.phase_timer.enter("data", self.step)
        self.stop_reason = REGROUP_REASON if regroup_requested() else received_signal()
        if self.context.any_rank(bool(self.stop_reason)):
            self.metrics.stopping = True
            self.saver.saved_step = self.step

    def _read_rows(self, step: int) -> Windows:
        """Read this rank's columns of the windows of its sample slots, in the order of its micro-batches."""
        share = self.train_step.share(step)
        windows = self.data.train.training_windows(self.config.seed, step, share.slots).take_columns(share.columns)
        return windows.pin_memory() if self.context.device.type == "cuda" else windows

    def _compute_again(self, step: int) -> tuple[float, float]:
        """Return loss and gradient norm of the batch after `step` steps, with the present weights. A collective."""
        present, self.step = self.step, step
        numbers = self.train_step.probe(step, self._read_rows(step))
        self.step = present
        return numbers

    def _take_fingerprints(self) -> None:
        """Take fingerprints of weights and optimizer state, if there are replicas that should be equal."""
        if self.context.weight_replicas > 1:
            tensors = {shard.name: shard.local_rows for shard in self.checkpoints.all_shards}
            self.metrics.fingerprint(self.step, list(tensors), HostCopy(fingerprints(tensors.values())))

    def _close_loop(self) -> None:
        self.batches.close()
        if self.profiler:
            self.profiler.close()
        gc.unfreeze()
        gc.enable()

    def _finish(self) -> str:
        """Evaluate and save the last step if that was not done, and record how the run ended. A collective."""
        self.finishing = True
        self.metrics.settle()
        self.saver.collect(self.step, wait=True)  # the last save reads the weights, which an evaluation may exchange
        early = self.early_stopping.out_of_patience
        state = "done" if self._complete else "preempted"
        if state == "done" and self.data.evaluation and self.record.get("eval_step") != self.step:
            state = "preempted" if self.evaluate() is None else "done"
        if self.saver.saved_step != self.step:
            if state == "done" and self.metrics.skipping:
                self.divergence.check_last_weights()
                self._start_save()
            else:
                self.save()
        self.saver.collect(self.step, wait=True, last=True)
        self.snapshots.close()

        reasons = self.context.all_gather_object(self.stop_reason)
        reason = main_reason(reasons) if state == "preempted" else ""
        if reason == REGROUP_REASON:
            state = "regrouped"
        why = self._early_stop_summary() if early else reason or nothing_to_train(self.config, self.resumed_step)
        ended = f"{state} ({why})" if why else state
        self.log.event(self.step, "stopped", f"{ended} at step {self.step} of {self.config.total_steps}")
        self.stop_requests.clear()
        folder = Path(self.config.target_dir)
        if self.context.is_main and owns_run(folder):
            write_state(folder, *(("running", self.step) if state == "regrouped" else (state, self.step, reason)))
        signals = signals_received()
        self.saver.finish_copies(self.stop_requests.seconds_to_allocation_end, lambda: signals_received() > signals)
        # Last, because it may wait for trackers, and a run that was asked to stop may be killed meanwhile.
        self.log.close("finished" if state == "done" else "stopped")
        self.lock.release()
        return state

    def _early_stop_summary(self) -> str:
        best_step = self.record.get("best_eval_step")
        best = self.checkpoints.folder(best_step).name if best_step else "none"
        return f"{self.early_stopping.summary()}, early_stop_patience; the best is {best}"
