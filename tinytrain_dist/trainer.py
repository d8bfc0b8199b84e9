"""Owns a run: building everything in order, the loop, one step, evaluation, and when to save and stop.

Must not know how gradients are summed, files are written or numbers are shown; it calls those who do.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinytrain_dist import __version__
from tinytrain_dist.checkpoint import init_from_folder, model_tensors, pieces_of
from tinytrain_dist.config import TrainingConfig, resolve_vocab_size
from tinytrain_dist.data import (
    EVAL_STREAM,
    Prefetcher,
    fingerprint,
    load_token_dataset,
    micro_batches,
    num_windows,
    read_windows,
    window_starts,
)
from tinytrain_dist.distributed import DistributedContext, Vote, together
from tinytrain_dist.errors import CheckpointError, ConfigError, TrainingError
from tinytrain_dist.files import write_atomically
from tinytrain_dist.layout import BatchPlan, choose_layout
from tinytrain_dist.metrics import HostCopy, RunLog, Stopwatch, memory_bytes, peak_flops
from tinytrain_dist.optim import AdamW, decay_groups, local
from tinytrain_dist.parallel import build_model, check_replicas, unwrap
from tinytrain_dist.preflight import RunLock, check_host_memory, check_space, prove_shared
from tinytrain_dist.reduction import CanonicalReduction, NativeReduction
from tinytrain_dist.saver import Checkpoints
from tinytrain_dist.schedule import learning_rate
from tinytrain_dist.stopping import STARTED, StopRequests, own, write_state

CLIP_EPS = 1e-6


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


class Trainer:
    """A run of one configuration in one process of the world. `fit` is the whole life of it.

    Errors: ConfigError, DataError, CheckpointError and TrainingError, each before anything is changed on disk where
    that can be known.
    """

    def __init__(self, config: TrainingConfig, context: DistributedContext) -> None:
        """Build in order: data, layout, model, optimizer, what is resumed, logs. A collective."""
        self.config = config = resolve_vocab_size(config)
        together(self._open_data)
        bits = decide_bits(config, context.device)
        fits = not context.agree(not _fits(config, context))
        self.context = context = context.with_layout(
            choose_layout(config, context.world_size, context.local_world_size, fits)
        )
        assert context.layout is not None
        self.plan = BatchPlan.make(config, context.layout)
        self.leaves = [self.plan.leaf(context.replica, context.shard, k) for k in range(self.plan.accumulation_steps)]
        self.slots = [slot for leaf in self.leaves for slot in self.plan.slots(leaf)]
        self.model = build_model(config, context)
        self.reduction = (CanonicalReduction if config.reproducible else NativeReduction)(
            self.model, self.plan, context
        )
        self.optimizer = AdamW(
            decay_groups(self.model, config.weight_decay), config.lr_max, config.betas, config.eps, config.weight_decay
        )
        self.optimizer.materialize()
        data = {"train": fingerprint(config.train_data or "", self.train)}
        self.checkpoints = Checkpoints(config, context, data, bits)
        self.step, self.skipped, self.skipped_in_row = 0, 0, 0
        self.report: dict[str, Any] = {}
        self.unread: StepReport | None = None
        self.failed_saves, self.saved_step = 0, -1
        self.stopping = False
        self._resume()
        self._check()

    def _open_data(self) -> None:
        c = self.config
        assert c.train_data is not None, "resolve_vocab_size has checked"
        self.train = load_token_dataset(c.train_data, vocab_size=c.vocab_size)
        self.windows = num_windows(self.train, c.context_len, c.train_data)
        self.val = load_token_dataset(c.val_data, vocab_size=c.vocab_size) if c.val_data else None
        self.val_windows = num_windows(self.val, c.context_len, c.val_data or "") if self.val is not None else 0

    def _resume(self) -> None:
        """Take the state of the checkpoint that the `resume` setting names, or the weights of init_from."""
        config, auto = self.config, self.config.resume_from == "auto"
        path = None if auto else self.checkpoints.find()  # a wrong path leaves no new folder behind
        self._claim_folder()
        path = self.checkpoints.find() if auto else path
        notes: list[str] = []
        if path is not None:
            found = path
            state, notes = together(lambda: self.checkpoints.load(found, self.model, self.optimizer))
            self.step, self.report = state["step"], state["report"]
            if path == self.checkpoints.folder(self.step):
                self.saved_step = self.step
        elif config.init_from:
            source = Path(config.init_from)
            together(lambda: init_from_folder(source, self.model, config))
        self._write_run_folder()
        self.log = RunLog(config, self.context.is_main, self.step)
        self.log.say(f"{self.context.layout}\n{self.plan}")
        if path is not None:
            changes = f"; changed settings: {', '.join(notes)}" if notes else ""
            self.log.event(self.step, "resumed", f"resumed from {path}{changes}")

    def _claim_folder(self) -> None:
        """Prove before step 1 that saving will work: shared, writable, enough room, and nobody else's."""
        config, context = self.config, self.context
        if config.ckpt_writers > context.world_size:
            raise ConfigError(
                f"ckpt_writers: {config.ckpt_writers} is more than the {context.world_size} ranks there are; lower it"
            )
        prove_shared(config.checkpoints_dir, context)
        if context.is_main:
            Path(config.target_dir).mkdir(parents=True, exist_ok=True)
        self.lock = RunLock(Path(config.target_dir), context)
        own(Path(config.target_dir))
        kinds, _ = pieces_of(self.model, self.optimizer, config.max_shard_bytes, config.ckpt_writers)
        pieces = [piece for kind in kinds.values() for piece in kind]
        whole = sum(math.prod(piece.shape) * piece.dtype.itemsize for piece in pieces)
        if context.is_main:
            self.checkpoints.remove_leftovers()
        existing = len(self.checkpoints.committed()) if context.is_main else 0
        check_space(config.checkpoints_dir, whole, config.keep_last + 1, existing, context)
        if config.ckpt_async:
            check_host_memory(sum(piece.local.nbytes for piece in pieces), context)

    def _check(self) -> None:
        """Prove what wrappers get wrong by themselves: equal replicas, and ranks that draw different windows."""
        check_replicas(model_tensors(self.model).items(), self.context)
        starts = window_starts(self.config.seed, self.step, self.slots, self.windows).tolist()
        everyone = self.context.gather_objects((self.slots, starts))
        slots = sorted(slot for theirs, _ in everyone for slot in theirs)
        if slots != list(range(self.config.batch_size)):
            raise TrainingError(
                f"ranks draw slots {slots[:8]}... instead of 0 .. {self.config.batch_size - 1}, each once"
            )
        drawn = [tuple(theirs) for _, theirs in everyone]
        if len(set(drawn)) < len(drawn) and self.windows > 1000 * self.config.batch_size:
            raise TrainingError(f"two ranks draw the same windows at step {self.step}: {drawn[:2]}")

    def fit(self) -> str:
        """Train to the last step or until told to stop; returns "done" or "preempted". A collective."""
        config = self.config
        stop = StopRequests(Path(config.target_dir), config.time_limit, self.context.is_main, since=STARTED)
        self.batches = Prefetcher(self._read_rows, self.step)
        self.watch, self.logged_step = Stopwatch(), self.step
        self.saving_seconds, self.step_seconds, self.stop_reason = 0.0, 0.0, ""
        try:
            while self.step < config.last_step and not self.stopping:
                self.stop_reason = self.stop_reason or stop.reason(2 * self.saving_seconds + 3 * self.step_seconds)
                report = self.train_step(self.stop_reason)
                self._settle()  # the step before: its numbers are there, and this one is under way
                self.unread = report
                self._collect_save()
                if due(self.step, config.eval_every):
                    self.evaluate()
                if due(self.step, config.ckpt_every):
                    self.save()
        finally:
            self.batches.close()
        return self._finish(stop)

    def train_step(self, stop_reason: str = "") -> StepReport:
        """One optimizer step over the global batch: forward, backward, reduce, clip, update. Waits for nothing."""
        waiting = time.perf_counter()
        rows = self.batches.get(self.step)
        waited = time.perf_counter() - waiting
        sums = []
        for k, (ids, targets) in enumerate(micro_batches(rows, self.plan.micro_batch_size, self.context.device)):
            self.reduction.before_micro_step(k)
            loss_sum = self.model(ids, targets)
            (loss_sum / self.plan.tokens_per_step).backward()  # divided once, by the global count
            self.reduction.after_micro_step(k)
            sums.append(loss_sum.detach())
        self.reduction.finish()
        leaf_losses = self.reduction.losses(self.leaves, sums, self.plan.leaves)
        loss = leaf_losses.sum() / self.plan.tokens_per_step
        norm = self.reduction.squared_norm().sqrt()
        skip = (~(loss.isfinite() & norm.isfinite())).float()
        self._clip(norm)
        lr = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step(skip=skip)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        numbers = HostCopy(torch.stack([loss, norm, skip.double()]))
        return StepReport(self.step, lr, numbers, leaf_losses, self.context.start_vote(bool(stop_reason)), waited)

    def _clip(self, norm: Tensor) -> None:
        if self.config.grad_clip_norm is not None:
            factor = (self.config.grad_clip_norm / (norm + CLIP_EPS)).clamp(max=1.0).float()
            grads = [local(param.grad) for param in self.model.parameters() if param.grad is not None]
            torch._foreach_mul_(grads, factor)

    def _read_rows(self, step: int) -> Tensor:
        """The windows of this rank's slots, in the order of its micro-steps."""
        starts = window_starts(self.config.seed, step, self.slots, self.windows)
        rows = read_windows(self.train, starts, self.config.context_len)
        return rows.pin_memory() if self.context.device.type == "cuda" else rows

    def _settle(self) -> None:
        """Read the unread step: count what was skipped, log it if it is due, note whether all agreed to stop."""
        report, self.unread = self.unread, None
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
        starts = window_starts(self.config.seed, report.step - 1, slots, self.windows).tolist()
        owners = sorted(rank for rank, leaves in enumerate(self._leaves_by_rank()) if set(leaves) & set(bad))
        where = f"rank(s) {owners}, windows starting at {starts[:16]}" if bad else "in the gradient only"
        text = f"not finite (loss {loss}, gradient norm {norm}; {where}); update skipped"
        self.log.event(report.step, "skipped", text)
        if self.skipped_in_row >= self.config.max_skipped_steps:
            self._collect_save(wait=True)  # what is being written is good
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
            values["mfu"] = values["tokens_per_second"] * self._flops_per_token() / (peak * self.plan.ranks)
        self.log.train(report.step, values, {"tokens_per_second_by_rank": [own / theirs[0] for theirs in everyone]})

    def _flops_per_token(self) -> float:
        flops: float = unwrap(self.model).flops_per_token()  # type: ignore[operator]
        return flops

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Loss over the evaluation windows, the same all run and on any number of ranks; None without val_data.

        A collective: every rank takes its share, sums are reduced, and the quotient is taken once.
        """
        if self.val is None:
            return None
        self._settle()
        started, plan = time.perf_counter(), self.plan
        leaves = [batch * plan.leaves + leaf for batch in range(self.config.eval_steps) for leaf in self.leaves]
        sums = []
        with self.watch.paused():
            for leaf in leaves:
                starts = window_starts(0, 0, plan.slots(leaf), self.val_windows, EVAL_STREAM)
                rows = read_windows(self.val, starts, self.config.context_len)
                for ids, targets in micro_batches(rows, plan.micro_batch_size, self.context.device):
                    sums.append(self.model(ids, targets))
            total = self.reduction.losses(leaves, sums, self.config.eval_steps * plan.leaves).sum()
            loss = float(total / (self.config.eval_steps * plan.tokens_per_step))
        self.report |= {"eval_loss": loss, "eval_step": self.step}
        self.log.evaluation(self.step, loss, time.perf_counter() - started)
        return loss

    def save(self) -> None:
        """Start to save the current step, after the save before has ended. A collective.

        The state is whole: steps that were not finite are skipped, and a state that is not finite is never written.
        """
        self._settle()
        with self.watch.paused():
            self._collect_save(wait=True)
            self.checkpoints.save(self.model, self.optimizer, self.step, self.report)

    def _collect_save(self, wait: bool = False, last: bool = False) -> None:
        """Tell how a save that has ended went. A full disk ends the save, not the run, unless it was the last one."""
        pending = self.checkpoints.pending
        if wait and not last and pending is not None and pending.is_alive():
            self.log.say(f"step {self.step}: waiting for the save of step {pending.step} to end")
        save = self.checkpoints.collect(wait)
        if save is None:
            return
        self.saving_seconds = save.seconds
        path = self.checkpoints.folder(save.step)
        if save.error is None:
            self.saved_step = save.step
            self.log.event(save.step, "saved", f"saved {path} ({save.seconds:.1f} s)")
        elif isinstance(save.error, OSError) and not last:
            self.failed_saves += 1
            text = f"SAVE FAILED ({save.error}); {self.failed_saves} so far. The last good checkpoint is kept, training"
            self.log.event(save.step, "save_failed", f"{text} goes on, the next try is at the next ckpt_every")
        elif isinstance(save.error, OSError):
            raise CheckpointError(f"{path}: could not be saved ({save.error}); make room or mend the disk and resume")
        else:
            raise save.error
        self.log.flush()

    def _finish(self, stop: StopRequests) -> str:
        self._settle()
        state = "preempted" if self.step < self.config.last_step else "done"
        if state == "done" and self.report.get("eval_step") != self.step:
            self.evaluate()
        self._collect_save(wait=True)
        if self.saved_step != self.step:
            self.save()
        self._collect_save(wait=True, last=True)
        reasons = [reason for reason in self.context.gather_objects(self.stop_reason) if reason]
        why = f" ({reasons[0]})" if state == "preempted" and reasons else ""
        self.log.event(self.step, "stopped", f"{state}{why} at step {self.step} of {self.config.total_steps}")
        stop.obeyed()
        self.log.close()
        if self.context.is_main:
            write_state(Path(self.config.target_dir), state, self.step)
        self.lock.release()
        return state

    def _write_run_folder(self) -> None:
        if self.context.is_main:
            folder = Path(self.config.target_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "config.toml", self.config.to_toml())
            write_state(folder, "running", self.step)
            (folder / "error.json").unlink(missing_ok=True)
        environment = self.context.gather_objects((self.context.host, str(self.context.device), os.getpid()))
        if self.context.is_main:
            write_atomically(Path(self.config.target_dir) / "environment.json", _environment(environment))


def _fits(config: TrainingConfig, context: DistributedContext) -> bool:
    """Whether weights, gradients and both moments (16 bytes a parameter) take less than 60 % of one device."""
    if context.device.type != "cuda":
        return True
    embedding = (config.vocab_size or 0) * config.d_model * (1 if config.tie_embeddings else 2)
    attention = 2 * config.d_model * config.head_width * (config.num_heads + config.kv_heads)
    parameters = embedding + config.num_layers * (attention + 3 * config.d_model * config.ffn_dim)
    return 16 * parameters < 0.6 * torch.cuda.get_device_properties(context.device).total_memory


def decide_bits(config: TrainingConfig, device: torch.device) -> dict[str, Any]:
    """Choose the kernels that a reproducible run needs; what decides the last bit besides the run's identity."""
    threads = config.cpu_threads or (1 if config.reproducible else None)
    if threads is not None:
        torch.set_num_threads(threads)
    if config.reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - costs time; we read none
        if config.compile:
            import torch._inductor.config as inductor

            # without it fused kernels skip roundings to bf16 where they see both sides of a cast, and FSDP's weights,
            # which arrive in bf16, get other gradients than DDP's, which are cast inside (measured: other bits)
            inductor.emulate_precision_casts = True
    kernels = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    settings = ("reproducible", "micro_batch_size", "precision", "compile", "loss_chunk_tokens")
    return {
        **{name: getattr(config, name) for name in settings},
        "torch": torch.__version__,
        "kernels": f"{device.type} {kernels}",
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def _environment(ranks: list[Any]) -> dict[str, Any]:
    """What the run ran on. Variables are an allow-list: an environment holds people's keys."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    wanted = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST")
    return {
        "tinytrain_dist": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": git.stdout.strip() or None,
        "threads": torch.get_num_threads(),
        "ranks": [{"host": host, "device": device, "pid": pid} for host, device, pid in ranks],
        "variables": {name: os.environ[name] for name in wanted if name in os.environ},
    }
