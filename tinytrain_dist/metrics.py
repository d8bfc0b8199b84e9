"""Owns what a run tells: console lines, metrics.jsonl (the plain record), TensorBoard, and honest clocks.

Must not know how the numbers come about. Only rank 0 has sinks; every rank calls the same methods.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from tinytrain_dist.config import TrainingConfig
from tinytrain_dist.files import write_atomically

# Dense bf16 peak in FLOP/s by device name; data sheets, without sparsity. No entry, no MFU.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


class HostCopy:
    """Device values on their way to the host; `read` waits for these values only, not for what was queued after."""

    def __init__(self, values: Tensor, clock: Callable[[], float] = time.perf_counter) -> None:
        """`values`: any tensor; the copy starts now and does not block."""
        self._values, self._clock = values.detach(), clock
        self.ready_at = clock()  # on the CPU they are there already
        self._ready: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values.detach(), non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> list[float]:
        """The values as numbers."""
        if self._ready is not None:
            self._ready.synchronize()
            self.ready_at = self._clock()
        numbers: list[float] = self._values.tolist()
        return numbers


class Stopwatch:
    """Time spent in steps, without what happened inside `paused`: evaluation and saving are not training."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock`: seconds, monotonic."""
        self._clock = clock
        self._start, self._off = clock(), 0.0

    def lap(self, now: float) -> float:
        """Seconds from the last lap to the moment `now`, pauses left out."""
        seconds, self._start, self._off = now - self._start - self._off, now, 0.0
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside, such as evaluation and saving."""
        start = self._clock()
        try:
            yield
        finally:
            self._off += self._clock() - start


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class RunLog:
    """Writes records to every sink. Without `main` it writes nothing, so that callers need not ask."""

    def __init__(self, config: TrainingConfig, main: bool, resumed_step: int) -> None:
        """Cut the record back to `resumed_step` and hide TensorBoard's points after it, so that no curve folds."""
        self.config, self.main = config, main
        self._progress: Any = None
        self._warned = False
        if not main:
            return
        folder = config.logs_dir
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{config.log_save_prefix}.jsonl"
        cut_back(self.path, resumed_step)
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        per_step = config.batch_size * config.context_len
        self._board = SummaryWriter(str(folder), purge_step=resumed_step + 1, flush_secs=10)
        # steps and tokens in separate folders: purge_step is compared with the axis of every point in the folder
        self._by_tokens = SummaryWriter(
            str(folder / "by_tokens"), purge_step=resumed_step * per_step + 1, flush_secs=10
        )
        if sys.stdout.isatty():
            self._start_progress(resumed_step)

    def say(self, text: str) -> None:
        """A line for people."""
        if self.main and self._progress:
            self._progress.console.print(text, highlight=False, markup=False)
        elif self.main:
            print(text, flush=True)

    def train(self, step: int, values: dict[str, float], per_rank: dict[str, list[float]]) -> None:
        """The record of a logged step; `per_rank` by rank."""
        if not self.main:
            return
        with self._sinks():
            self._write_train(step, values, per_rank)
        left = (self.config.last_step - step) * values["step_seconds"]
        text = (
            f"loss {values['loss']:.4f} | lr {values['lr']:.2e} | norm {values['grad_norm']:.3f} | "
            f"{values['tokens_per_second']:,.0f} tok/s"
        )
        if self._progress:
            self._progress.update(self._task, completed=step, numbers=text)
        else:
            print(f"step {step}/{self.config.total_steps} | {text} | {duration(left)} left", flush=True)

    def _write_train(self, step: int, values: dict[str, float], per_rank: dict[str, list[float]]) -> None:
        tokens = step * self.config.batch_size * self.config.context_len
        self._record("train", step, {"tokens": tokens, **values, **per_rank})
        for name in ("loss", "lr", "grad_norm", "mfu"):
            if name in values:
                self._board.add_scalar(f"train/{name}" if name == "loss" else name, values[name], step)
        for name in ("tokens_per_second", "step_seconds", "data_wait_seconds", "memory_gib", "skipped_steps"):
            self._board.add_scalar(f"health/{name}" if name == "skipped_steps" else f"speed/{name}", values[name], step)
        self._board.add_scalar("tokens", tokens, step)
        for rank, speed in enumerate(per_rank["tokens_per_second_by_rank"]):
            self._board.add_scalar(f"speed_by_rank/tokens_per_second_{rank}", speed, step)
        self._by_tokens.add_scalar("train/loss", values["loss"], tokens)

    def evaluation(self, step: int, loss: float, seconds: float, others: dict[str, float] | None = None) -> None:
        """The record of an evaluation; loss in nats per token, `others` what else was measured, by name."""
        perplexity, others = math.exp(min(loss, 700.0)), others or {}
        more = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in others.items())
        self.say(f"step {step}: eval loss {loss:.4f}, perplexity {perplexity:.2f}{more} ({seconds:.1f} s)")
        if not self.main:
            return
        with self._sinks():
            self._record("eval", step, {"loss": loss, "perplexity": perplexity, **others, "seconds": seconds})
            self._board.add_scalar("eval/loss", loss, step)
            self._board.add_scalar("eval/perplexity", perplexity, step)
            for name, value in others.items():
                self._board.add_scalar(f"eval/{name}", value, step)
            self._by_tokens.add_scalar("eval/loss", loss, step * self.config.batch_size * self.config.context_len)

    def event(self, step: int, kind: str, text: str) -> None:
        """Something that happened once: resumed, saved, skipped, stopped."""
        self.say(f"step {step}: {text}")
        if not self.main:
            return
        with self._sinks():
            self._record(kind, step, {"text": text})
            self._board.add_text(kind, text, step)

    def flush(self) -> None:
        """Bring everything to the files."""
        if not self.main:
            return
        with self._sinks():
            self._board.flush()
            self._by_tokens.flush()

    def close(self) -> None:
        """Flush and end."""
        if self.main:
            if self._progress:
                self._progress.stop()
            for sink in (self._board, self._by_tokens, self._file):
                with self._sinks():
                    sink.close()

    @contextlib.contextmanager
    def _sinks(self) -> Iterator[None]:
        """A record that cannot be written is dropped, with one word: a full disk must not end the training."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                print(f"WARNING: records cannot be written ({error}); training goes on without them", flush=True)
            self._warned = True

    def _record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        # repr of a float round-trips, so two runs can be compared to the last bit from this file
        self._file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")

    def _start_progress(self, step: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("steps", total=self.config.last_step, completed=step, numbers="")
        self._progress.start()


def cut_back(path: Path, step: int) -> None:
    """Drop the records after `step`, and a torn last line, by writing the rest aside and renaming."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # the line a crash cut short
    write_atomically(path, "".join(line + "\n" for line in kept))


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
