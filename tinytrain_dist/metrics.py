"""Owns what a run tells: console lines, metrics.jsonl (the plain record), when TensorBoard hears of it, honest clocks.

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
from torch import Tensor, nn

from tinytrain_dist.board import Board, code
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


class WorkClock:
    """Time inside some modules' forward, by the host's clock, or on a GPU by events on its stream, read when past."""

    def __init__(self, modules: list[nn.Module], cuda: bool, compiled: bool = False) -> None:
        """`modules`: must not contain each other; compiled: their calls are, hooks included, which a clock must not."""
        self._cuda = cuda
        self._marks: list[Any] = []
        mark = torch.compiler.disable(self._mark) if compiled else self._mark
        for module in modules:
            module.register_forward_pre_hook(mark)
            module.register_forward_hook(mark)

    def _mark(self, *_: Any) -> None:
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def take(self) -> list[Any]:
        """The marks since the last call, for `seconds`."""
        marks, self._marks = self._marks, []
        return marks

    def seconds(self, marks: list[Any]) -> float:
        """Seconds between each odd mark and the next. On a GPU the work must be done, or this is an error."""
        pairs = zip(marks[0::2], marks[1::2], strict=True)
        return float(sum(a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in pairs))


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device, None where it is not known: then there is no MFU.

    MFU = tokens per second x flops per token (TransformerLM.flops_per_token) / (peak x ranks), in seconds of steps:
    without evaluation and saving. Work that is done twice (activation checkpointing) does not count.
    """
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
        self._board = Board(config, resumed_step)
        if sys.stdout.isatty():
            self._start_progress(resumed_step)

    def say(self, text: str) -> None:
        """A line for people."""
        if self.main and self._progress:
            self._progress.console.print(text, highlight=False, markup=False)
        elif self.main:
            print(text, flush=True)

    def train(
        self, step: int, values: dict[str, float], groups: dict[str, dict[str, float]], work_by_rank: list[float]
    ) -> None:
        """The record of a logged step. groups: numbers that belong together, by name; work_by_rank: seconds a step."""
        if not self.main:
            return
        tokens = step * self.config.batch_size * self.config.context_len
        with self._sinks():
            self._record("train", step, {"tokens": tokens, **values, **groups, "work_seconds_by_rank": work_by_rank})
            self._board.numbers(step, values, groups)
            self._board.loss("train", step, values["loss"])
            self._board.histogram("by_rank/work_seconds", work_by_rank, step)
        left = (self.config.last_step - step) * values["step_seconds"]
        text = (
            f"loss {values['loss']:.4f} | lr {values['lr']:.2e} | norm {values['grad_norm']:.3f} | "
            f"{values['tokens_per_second']:,.0f} tok/s"
        )
        if self._progress:
            self._progress.update(self._task, completed=step, numbers=text)
        else:
            print(f"step {step}/{self.config.total_steps} | {text} | {duration(left)} left", flush=True)

    def evaluation(self, step: int, loss: float, seconds: float, others: dict[str, float] | None = None) -> None:
        """The record of an evaluation; loss in nats per token, `others` what else was measured, by name."""
        numbers = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **(others or {})}
        more = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in (others or {}).items())
        self.say(f"step {step}: eval loss {loss:.4f}, perplexity {numbers['perplexity']:.2f}{more} ({seconds:.1f} s)")
        if not self.main:
            return
        with self._sinks():
            self._record("eval", step, {**numbers, "seconds": seconds})
            self._board.numbers(step, {}, {"eval": numbers})
            self._board.loss("eval", step, loss)

    def samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """What the model wrote at an evaluation: (beginning, continuation)."""
        if not texts or not self.main:
            return
        with self._sinks():
            self._record("samples", step, {"texts": texts})
            parts = [f"**given**\n\n{code(a)}\n\n**the model goes on**\n\n{code(b)}" for a, b in texts]
            self._board.text("samples", "\n\n---\n\n".join(parts), step)

    def about(self, step: int, topic: str, text: str) -> None:
        """A text about the run for the dashboards, shown as it is: environment, arithmetic, plan."""
        if self.main:
            with self._sinks():
                self._board.text(f"about/{topic}", code(text), step)

    def event(self, step: int, kind: str, text: str) -> None:
        """Something that happened once; `kind`: one of board.EVENT_ROWS."""
        self.say(f"step {step}: {text}")
        if not self.main:
            return
        with self._sinks():
            self._record(kind, step, {"text": text})
            self._board.event(kind, text, step)

    def flush(self) -> None:
        """Bring everything to the files."""
        if not self.main:
            return
        with self._sinks():
            self._board.flush()

    def close(self) -> None:
        """Flush and end."""
        if self.main:
            if self._progress:
                self._progress.stop()
            for sink in (self._board, self._file):
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
