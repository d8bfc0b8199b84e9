"""Owns a run: building everything in order, the loop, evaluation, and when to save and stop.

Must not know how a step is made, files are written or numbers are shown; it calls those who do.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinytrain_dist.checkpoint.hf_import import init_from_hf_folder
from tinytrain_dist.checkpoint.manager import CheckpointManager
from tinytrain_dist.checkpoint.state import model_tensors
from tinytrain_dist.config.loading import resolve_vocab_size
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.batches import Prefetcher, split_micro_batches
from tinytrain_dist.data.sampling import EVAL_STREAM
from tinytrain_dist.data.token_dataset import TokenDataset, bytes_per_token, short_names
from tinytrain_dist.distributed.collectives import run_on_all_ranks
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import CheckpointError, ConfigError, ReplicaMismatchError, TrainingError
from tinytrain_dist.metrics.environment import environment_record
from tinytrain_dist.metrics.phase_timer import PhaseTimer
from tinytrain_dist.metrics.profiler import StepProfiler
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.metrics.step_metrics import StepMetrics, StepResult, due
from tinytrain_dist.metrics.timers import HostCopy
from tinytrain_dist.parallel.compile import compiled_graph_count, resolve_compile
from tinytrain_dist.parallel.replica_check import check_replicas, fingerprints
from tinytrain_dist.parallel.wrappers import unwrap
from tinytrain_dist.reliability import error_report, rank_consistency
from tinytrain_dist.reliability.run_lock import RunLock
from tinytrain_dist.reliability.run_state import claim_run, owns_run, write_state
from tinytrain_dist.reliability.stop_requests import PROCESS_START, StopRequests, received_signal
from tinytrain_dist.reliability.storage_checks import check_disk_space, check_host_memory, check_shared_storage
from tinytrain_dist.training.determinism import collect_garbage, configure_determinism
from tinytrain_dist.training.text_samples import TextSampler
from tinytrain_dist.training.train_step import TrainStep
from tinytrain_dist.utils.atomic_files import write_atomically

GARBAGE_EVERY, WARM_UP_STEPS = 200, 2


class Trainer(TrainStep):
    """A run of one configuration in one process of the world. `fit` is the whole life of it.

    Errors: ConfigError, DataError, CheckpointError and TrainingError, each before anything is changed on disk where
    that can be known.
    """

    log: RunLog
    bytes_per_token: Any  # how many bytes each id stands for, None where that is not known

    def __init__(
        self, config: TrainingConfig, context: DistributedContext, phase_timer: PhaseTimer | None = None
    ) -> None:
        """Build in order: data, layout, model, optimizer, what is resumed, logs. A collective."""
        self.hints = rank_consistency.check_rank_consistency(config, context)
        config, self.compile_note = resolve_compile(resolve_vocab_size(config), context)
        super().__init__(config, context, phase_timer)
        self.trace: StepProfiler | None = None
        if config.profile and context.is_main:
            steps = config.profiled_steps
            self.trace = StepProfiler(
                steps, config.logs_dir / "profile", context.device, lambda text: self.log.say(text)
            )
            self.phase_timer.follower = self.trace.enter
        self.phase_timer.enter("open_data")
        run_on_all_ranks(self._open_data)
        if context.any_rank(self.bytes_per_token is None):  # a folder that only some ranks have would halve the bytes
            self.bytes_per_token = None
        bits = configure_determinism(config, context.device)
        self.phase_timer.enter("build")
        self.context = context = self.spread(context)
        self.assemble_fitting()
        config = self.config
        prints = self.train.fingerprints  # of one file without a list, as checkpoints have it since there was only one
        data = {"train": prints if len(prints) > 1 else prints[0]}
        self.checkpoints = CheckpointManager(config, context, self.model, self.optimizer, data, bits)
        self.report: dict[str, Any] = {}
        self.failed_saves, self.saved_step, self.finishing = 0, -1, False
        self.saving_seconds, self.stop_reason = 0.0, ""
        self.phase_timer.enter("load")
        self._resume()
        self._check()
        self.samples = TextSampler(config, context, self._eval_beginnings)
        self.observer = self._observer()
        self.stop = StopRequests(Path(config.target_dir), config.time_limit, context.is_main, since=PROCESS_START)

    def _open_data(self) -> None:
        c = self.config
        self.train = TokenDataset(c.train_files, c.context_len, vocab_size=c.vocab_size, weights=c.train_weights)
        self.val = [TokenDataset([path], c.context_len, vocab_size=c.vocab_size) for path in c.val_files]
        self.val_names = short_names(c.val_files)
        assert c.vocab_size is not None, "resolve_vocab_size has filled it"
        tables = (bytes_per_token(Path(path).parent, c.vocab_size) for path in (*c.train_files, *c.val_files))
        self.bytes_per_token = next((table for table in tables if table is not None), None)

    def _resume(self) -> None:
        """Take the state of the checkpoint that the `resume` setting names, or the weights of init_from."""
        config, auto = self.config, self.config.resume_from == "auto"
        loading = partial(self.phase_timer.enter, "load")  # start_limit counts for each reading by itself
        resume = partial(self.checkpoints.resume, loading)
        found = None if auto else resume()  # a wrong path leaves no new folder behind
        self._claim_folder()
        found = resume() if auto else found
        if found:
            path, state, notes = found
            self.step, self.report = state["step"], state["report"]
            if path == self.checkpoints.folder(self.step):
                self.saved_step = self.step
        elif config.init_from:
            source = Path(config.init_from)
            run_on_all_ranks(lambda: init_from_hf_folder(source, self.model, config))
        about = self._write_run_folder()
        self.log = RunLog(config, self.context.is_main, self.step)
        plans = [str(self.context.parallel_dims), *self.remarks, str(self.plan), self.compile_note, *self.hints]
        self.log.say("\n".join(filter(None, plans)))
        self.log.about(self.step, "batch", f"{self.context.parallel_dims}\n{self.plan}")
        hosts = Counter(rank["host"] for rank in about.get("ranks", []))
        self.log.about(self.step, "environment", json.dumps(about | {"ranks": hosts}, indent=1))
        if found:
            changes = f"; changed settings: {', '.join(notes)}" if notes else ""
            self.log.event(self.step, "resumed", f"resumed from {path}{changes}")
        if self.failure_before:
            self.log.event(self.step, "restarted", f"restarted, because {self.failure_before}")

    def _claim_folder(self) -> None:
        """Prove before step 1 that saving will work: shared, writable, enough room, and nobody else's."""
        config, context = self.config, self.context
        if config.ckpt_writers > context.world_size:
            raise ConfigError(
                f"ckpt_writers: {config.ckpt_writers} is more than the {context.world_size} ranks there are; lower it"
            )
        check_shared_storage(config.checkpoints_dir, context)
        if context.is_main:
            Path(config.target_dir).mkdir(parents=True, exist_ok=True)
        self.lock = RunLock(Path(config.target_dir), context)
        claim_run(Path(config.target_dir), self.lock.taken)
        self.failure_before = error_report.read_and_clear_error(Path(config.target_dir)) if context.is_main else ""
        shards = self.checkpoints.all_shards
        whole = sum(math.prod(shard.shape) * shard.dtype.itemsize for shard in shards)
        if context.is_main:
            self.checkpoints.remove_leftovers()
        existing = len(self.checkpoints.committed()) if context.is_main else 0
        check_disk_space(config.checkpoints_dir, whole, config.keep_last + 1, existing, context)
        beside_training = config.ckpt_every < config.last_step or config.early_stop_patience is not None
        if config.ckpt_async and (beside_training or context.device.type == "cuda"):
            check_host_memory(sum(shard.rows_to_save.nbytes for shard in shards), context)
            self.checkpoints.buffers.copy()  # the memory is taken now, so that the first save stalls no longer

    def _check(self) -> None:
        """Prove what wrappers get wrong by themselves: equal replicas, and ranks that draw different windows."""
        check_replicas(model_tensors(self.model).items(), self.context)
        everyone = self.context.all_gather_object(
            (self.slots, self.train.places(self.config.seed, self.step, self.slots))
        )
        slots = sorted(slot for theirs, _ in everyone for slot in theirs)
        if slots != list(range(self.config.batch_size)):
            raise TrainingError(
                f"ranks draw slots {slots[:8]}... instead of 0 .. {self.config.batch_size - 1}, each once"
            )
        drawn = [tuple(theirs) for _, theirs in everyone]
        if len(set(drawn)) < len(drawn) and len(drawn) ** 2 * self.train.meeting ** len(self.slots) < 1e-9:
            raise TrainingError(f"two ranks draw the same windows at step {self.step}: {drawn[:2]}")

    def fit(self) -> str:
        """Train to the last step or until told to stop; returns "done" or "preempted". A collective."""
        config = self.config
        observer, self.first_step = self.observer, self.step + 1
        self._agree_to_begin()
        if self.step and due(self.step, config.eval_every) and self.report.get("eval_step") != self.step:
            self.evaluate()  # a stop came before it
        self.batches = Prefetcher(self._read_rows, self.step)
        try:
            collect_garbage(first=True)
            while self.step < config.last_step and not (observer.stopping or self.out_of_patience):
                observer.take(self._observed_step())
                if config.fingerprint_every and due(self.step, config.fingerprint_every):
                    self._fingerprint()
                self._collect_save()
                if due(self.step, GARBAGE_EVERY):
                    collect_garbage()
                if due(self.step, config.eval_every):
                    self.evaluate()
                if due(self.step, config.ckpt_every) or self.at_best:
                    self.save()
        except TrainingError:
            self._collect_save(wait=True)  # what is being written is good, or says what is nearer to the cause
            raise
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"{error}\n{self.memory_report()}") from error
        finally:
            self.batches.close()
            if self.trace:
                self.trace.close()
            gc.unfreeze()
            gc.enable()
        return self._finish()

    def _agree_to_begin(self) -> None:
        """A signal during the start ends the run before its first step; no rank is in a start phase after this."""
        self.phase_timer.enter("data", self.step)
        self.stop_reason = received_signal()
        if self.context.any_rank(bool(self.stop_reason)):
            self.observer.stopping, self.saved_step = True, self.step

    def _wish_to_stop(self) -> str:
        """Why this rank wants to stop, "" to go on; a wish stays."""
        reserve = 2 * self.saving_seconds + 3 * self.observer.step_seconds
        self.stop_reason = self.stop_reason or self.checkpoints.failure or self.stop.reason(reserve)
        return self.stop_reason

    def _observed_step(self) -> StepResult:
        """train_step, and a word if it waited for a compiler although the first steps had everything compiled."""
        before = compiled_graph_count()
        report = self.train_step(self._wish_to_stop())
        made = compiled_graph_count() - before
        if made and self.step >= self.first_step + WARM_UP_STEPS:
            text = (
                f"torch.compile made {made} graph(s) again; TORCH_LOGS=recompiles says why, compile = false avoids it"
            )
            self.log.event(self.step, "recompiled", text)
        return report

    def _observer(self) -> StepMetrics:
        flops: float = unwrap(self.model).flops_per_token()  # type: ignore[operator]
        return StepMetrics(
            self.config,
            self.context,
            self.plan,
            self.log,
            step=self.step,
            data=self.train,
            flops_per_token=flops,
            clock=self.clock,
            layers=self.reduction.layers,
        )

    def _read_rows(self, step: int) -> Tensor:
        """The windows of this rank's slots, in the order of its micro-steps."""
        rows = self.train.read(*self.train.draw(self.config.seed, step, self.slots))
        return rows.pin_memory() if self.context.device.type == "cuda" else rows

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Loss over the evaluation windows, the same all run and on any number of ranks; None without val_data.

        Each file of val_data counts the same; beside their mean stand the loss of each, and bits per byte where the
        bytes of every id are known. A collective: every rank takes its share, and quotients are taken of global sums.
        A wish to stop is agreed on between batches, as it is between steps; there is no number then.
        """
        if not self.val:
            return None
        self.observer.settle()
        if self.observer.stopping:
            return None
        started, tokens = time.perf_counter(), self.config.eval_steps * self.plan.tokens_per_step
        with self.observer.watch.paused():
            found = [result for files in self.val if (result := self._evaluate_file(files)) is not None]
            if len(found) < len(self.val):
                return None
            self.log.samples(self.step, self.samples.write(self.model, self.step))
            nats, sizes = zip(*found, strict=True)
            size = sum(sum(theirs) for theirs in self.context.all_gather_object(sizes))
        loss: float = sum(nats) / (tokens * len(nats))
        others = {f"loss/{name}": nat / tokens for name, nat in zip(self.val_names, nats, strict=True)}
        others = others if len(nats) > 1 else {}
        if size > 0:
            others["bits_per_byte"] = sum(nats) / math.log(2) / size
        self.report |= {"eval_loss": loss, "eval_step": self.step}
        if due(self.step, self.config.eval_every):  # one more at the end of a part of a run must not count
            self._compare_with_best(loss)
        self.log.evaluation(self.step, loss, time.perf_counter() - started, others)
        return loss

    def _evaluate_file(self, files: TokenDataset) -> tuple[float, int] | None:
        """The summed loss of one file's evaluation windows, of all ranks; the bytes of this rank's targets."""
        plan, sums, size, vote = self.plan, [], 0, None
        leaves = [
            batch * plan.num_micro_batches + leaf for batch in range(self.config.eval_steps) for leaf in self.leaves
        ]
        for k, leaf in enumerate(leaves):
            self.phase_timer.enter("evaluation")
            if k % plan.accumulation_steps == 0:
                self.observer.stopping = self.observer.stopping or (vote is not None and vote.result())
                if self.observer.stopping:
                    return None
                vote = self.context.start_vote(bool(self._wish_to_stop()))
            rows = files.read(*files.draw(0, 0, plan.slots(leaf), EVAL_STREAM))
            size += int(self.bytes_per_token[rows[:, 1:].numpy()].sum()) if self.bytes_per_token is not None else 0
            for ids, targets in split_micro_batches(rows, plan.micro_batch_size, self.context.device):
                sums.append(self.model(ids, targets))
        return float(self.reduction.losses(leaves, sums, self.config.eval_steps * plan.num_micro_batches).sum()), size

    def _compare_with_best(self, loss: float) -> None:
        """Note whether this evaluation is the best of the run, and how many came since. A collective."""
        if self.context.any_rank(loss < self.report.get("best_eval_loss", math.inf)):
            self.report |= {"best_eval_loss": loss, "best_eval_step": self.step, "evals_since_best": 0}
        else:
            self.report["evals_since_best"] = self.report.get("evals_since_best", 0) + 1

    @property
    def at_best(self) -> bool:
        """Whether early stopping is on and no step was better than this one, which is therefore saved."""
        return self.config.early_stop_patience is not None and self.report.get("best_eval_step") == self.step

    @property
    def out_of_patience(self) -> bool:
        """Whether so many evaluations were no better than the best that the run ends; the same on all ranks."""
        patience = self.config.early_stop_patience
        return patience is not None and self.report.get("evals_since_best", 0) >= patience

    def save(self) -> None:
        """Start to save the current step, after the save before has ended. A collective.

        The state is whole: steps that were not finite are skipped, and a state that is not finite is never written.
        """
        self.observer.settle()
        self.phase_timer.enter("checkpoint")
        with self.observer.watch.paused():
            self._collect_save(wait=True)
            last = self.finishing or self.step == self.config.last_step
            self.checkpoints.save(self.step, self.report, last)
            if not self.config.ckpt_async:
                self._collect_save(wait=True)

    def _fingerprint(self) -> None:
        """Take fingerprints of weights and moments, where other ranks should have the same."""
        if self.plan.replicate > 1:
            held = {shard.name: shard.local_rows for shard in self.checkpoints.all_shards}
            self.observer.fingerprint(self.step, list(held), HostCopy(fingerprints(held.values())))

    def _eval_beginnings(self, rows: int, tokens: int) -> Tensor:
        """The first ids of the first windows of the evaluation: [rows, tokens]."""
        return self.val[0].read(*self.val[0].draw(0, 0, range(rows), EVAL_STREAM))[:, :tokens].long()

    def _collect_save(self, wait: bool = False, last: bool = False) -> None:
        """Tell how a save that has ended went. A full disk ends the save, not the run, unless it was the last one."""
        pending = self.checkpoints.pending
        if wait:
            self.phase_timer.enter("checkpoint")
        if wait and pending is not None and pending.is_alive():
            self.log.say(f"step {self.step}: waiting for the save of step {pending.step} to end")
        save = self.checkpoints.collect(wait)
        if save is None:
            return
        self.saving_seconds = save.seconds
        path = self.checkpoints.folder(save.step)
        if save.error is None:
            self.saved_step = save.step
            with contextlib.suppress(OSError):  # a run that is killed leaves no word; this is how far it surely came
                if self.context.is_main and owns_run(Path(self.config.target_dir)):
                    write_state(Path(self.config.target_dir), "running", save.step)
            self.log.event(save.step, "saved", f"saved {path} ({save.seconds:.1f} s)")
        elif isinstance(save.error, OSError) and not last:
            self.failed_saves += 1
            text = f"SAVE FAILED ({save.error}); {self.failed_saves} so far. The last good checkpoint is kept, training"
            self.log.event(save.step, "save_failed", f"{text} goes on, the next try is at the next ckpt_every")
        elif isinstance(save.error, OSError):
            raise CheckpointError(f"{path}: could not be saved ({save.error}); make room or mend the disk and resume")
        else:
            kind = "replicas_differ" if isinstance(save.error, ReplicaMismatchError) else "save_failed"
            self.log.event(save.step, kind, str(save.error))
            self.log.flush()
            raise save.error
        self.log.flush()

    def _finish(self) -> str:
        self.finishing = True
        self.observer.settle()
        early = self.out_of_patience
        state = "preempted" if self.step < self.config.last_step and not early else "done"
        if state == "done" and self.val and self.report.get("eval_step") != self.step:
            state = "preempted" if self.evaluate() is None else "done"
        self._collect_save(wait=True)
        if self.saved_step != self.step:
            self.save()
        self._collect_save(wait=True, last=True)
        reasons = [reason for reason in self.context.all_gather_object(self.stop_reason) if reason]
        reason = reasons[0] if state == "preempted" and reasons else ""
        why = f" ({reason})" if reason else ""
        if early:
            best, step = self.report.get("best_eval_loss", math.nan), self.report.get("best_eval_step")
            why = f" (no better eval loss than {best:.4f} in {self.report['evals_since_best']} evaluations, "
            why += f"early_stop_patience; the best is {self.checkpoints.folder(step).name if step else 'none'})"
        self.log.event(self.step, "stopped", f"{state}{why} at step {self.step} of {self.config.total_steps}")
        self.stop.obeyed()
        self.log.close()
        if self.context.is_main and owns_run(Path(self.config.target_dir)):
            write_state(Path(self.config.target_dir), state, self.step, reason)
        self.lock.release()
        return state

    def _write_run_folder(self) -> dict[str, Any]:
        """Write what is run, and on what; returns the latter on the main rank."""
        ranks = self.context.all_gather_object((self.context.host, str(self.context.device), os.getpid()))
        about: dict[str, Any] = {}
        if self.context.is_main:
            about = environment_record(ranks)
            folder = Path(self.config.target_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "config.toml", self.config.to_toml())
            write_state(folder, "running", self.step)
            write_atomically(folder / "environment.json", about)
        return about
