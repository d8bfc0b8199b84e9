"""Write what a run reports: console lines, metrics.jsonl (the plain record) and TensorBoard.

Must not know how the numbers come about. Only rank 0 writes; every rank calls the same methods.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.metrics.tensorboard import TensorBoardWriter, indented_code
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.text import format_duration


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
        truncate_records(self.path, resumed_step)
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        self._board = TensorBoardWriter(config, resumed_step)
        if sys.stdout.isatty():
            self._start_progress(resumed_step)

    def say(self, text: str) -> None:
        """Print a line for people."""
        if self.main and self._progress:
            self._progress.console.print(text, highlight=False, markup=False)
        elif self.main:
            print(text, flush=True)

    def train(
        self, step: int, values: dict[str, float], groups: dict[str, dict[str, float]], work_by_rank: list[float]
    ) -> None:
        """Record a logged step. groups: numbers that belong together, by name; work_by_rank: seconds per step."""
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
            print(f"step {step}/{self.config.total_steps} | {text} | {format_duration(left)} left", flush=True)

    def evaluation(self, step: int, loss: float, seconds: float, others: dict[str, float] | None = None) -> None:
        """Record an evaluation; loss in nats per token, `others`: what else was measured, by name."""
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
        """Record what the model wrote at an evaluation: (prompt, continuation)."""
        if not texts or not self.main:
            return
        with self._sinks():
            self._record("samples", step, {"texts": texts})
            parts = [
                f"**given**\n\n{indented_code(a)}\n\n**the model goes on**\n\n{indented_code(b)}" for a, b in texts
            ]
            self._board.text("samples", "\n\n---\n\n".join(parts), step)

    def about(self, step: int, topic: str, text: str) -> None:
        """Show a text about the run on the dashboards, as it is: environment, arithmetic, plan."""
        if self.main:
            with self._sinks():
                self._board.text(f"about/{topic}", indented_code(text), step)

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
        """Drop a record that cannot be written, with one warning: a full disk must not end the training."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                print(f"WARNING: records cannot be written ({error}); training continues without them", flush=True)
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


def truncate_records(path: Path, step: int) -> None:
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
