"""Write the output of a run: console lines and metrics.jsonl. Send everything to the trackers, such as TensorBoard.

Must not know how the numbers are computed, or any tracker. Only rank 0 writes; every rank calls the same methods.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinytrain_dist.config.run_folder import REPLACED_SUFFIX, records_file
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.metrics.perplexity import perplexity_of
from tinytrain_dist.metrics.trackers import start_trackers
from tinytrain_dist.metrics.trackers.background import FINISH_SECONDS, START_SECONDS, Call, Sink
from tinytrain_dist.metrics.trackers.base import Status
from tinytrain_dist.metrics.trackers.tags import TAGS
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.json_files import is_whole_number, parse_json, to_json
from tinytrain_dist.utils.lost_output import call_on_lost_output
from tinytrain_dist.utils.text import format_duration

QUIET_SECONDS = 1.0  # the end may wait so long for a tracker without a line about it


class RunLog:
    """Write records to metrics.jsonl and the trackers, and lines to the console. Ranks other than 0 write nothing."""

    def __init__(self, config: TrainingConfig, main: bool, resumed_step: int) -> None:
        """Open the files and start the trackers. main: whether this is rank 0; on other ranks, methods have no effect.

        Removes records after `resumed_step`, so that no step appears twice.
        """
        self.config = config
        self.main = main
        self._progress: Any = None  # a progress bar, if the output is a terminal
        self._warned = False  # whether `_surviving_disk_errors` has printed its warning
        self._closed = False
        self._step = resumed_step  # of the last record
        self._saved_step = resumed_step  # of the newest checkpoint; 0: none yet
        if not main:
            return
        folder = config.logs_dir
        folder.mkdir(parents=True, exist_ok=True)
        self.path = records_file(folder, config.log_save_prefix)
        truncate_records(self.path, resumed_step)
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        self._sinks: list[Sink] = start_trackers(config, resumed_step)
        if sys.stdout.isatty():
            self._start_progress(resumed_step)
        call_on_lost_output(self._record_lost_output)

    def wait_for_trackers(self) -> None:
        """Wait a limited time until the trackers have started, so that their start does not slow down step 1."""
        if not self.main:
            return
        deadline = time.monotonic() + START_SECONDS
        for sink in self._sinks:
            sink.wait_started(deadline)
        self._report_trackers()

    def say(self, text: str) -> None:
        """Print a line on rank 0, above the progress bar if there is one. All output of a run goes through here."""
        if not self.main:
            return
        if self._progress:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning about a problem that does not end the run."""
        self.say(f"WARNING: {text}")

    def train(
        self, step: int, values: dict[str, float], groups: dict[str, dict[str, float]], work_by_rank: list[float]
    ) -> None:
        """Record a logged step.

        values: numbers by name, see TAG_GROUPS in trackers/tags.py. groups: further numbers by name, for each group of
        related numbers. work_by_rank: seconds per step that each rank spent on its own work.
        """
        if not self.main:
            return
        sizes = self.config.batch_sizes
        tokens = sizes.before(step) * self.config.context_len
        with self._surviving_disk_errors():
            self._record("train", step, {"tokens": tokens, **values, **groups, "work_seconds_by_rank": work_by_rank})
        numbers = {TAGS[name]: value for name, value in values.items() if name in TAGS}
        for group, others in groups.items():
            numbers |= {f"{group}/{name}": value for name, value in others.items()}
        now = time.time()
        self._track(lambda tracker: tracker.log_numbers(step, numbers, now))
        self._track(lambda tracker: tracker.log_histogram(step, "by_rank/work_seconds", work_by_rank))
        steps_left = (sizes.before(self.config.last_step) - sizes.before(step)) / sizes.at(step - 1)  # like this one
        seconds_left = steps_left * values["step_seconds"]
        text = (
            f"loss {values['loss']:.4f} | lr {values['lr']:.2e} | norm {values['grad_norm']:.3f} | "
            f"{values['tokens_per_second']:,.0f} tok/s"
        )
        if self._progress:
            self._progress.update(self._task, completed=step, numbers=self._live_numbers(values, seconds_left))
        else:
            self.say(f"step {step}/{self.config.total_steps} | {text} | {format_duration(seconds_left)} left")

    def evaluation(self, step: int, loss: float, seconds: float, others: dict[str, float] | None = None) -> None:
        """Record an evaluation. loss: nats per token; seconds: how long it took; others: further numbers by name."""
        others = others or {}
        perplexity = perplexity_of(loss)
        numbers = {"loss": loss, "perplexity": perplexity, **others}
        more = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in others.items())
        self.say(f"step {step}: eval loss {loss:.4f}, perplexity {perplexity:.2f}{more} ({seconds:.1f} s)")
        if not self.main:
            return
        with self._surviving_disk_errors():
            self._record("eval", step, {**numbers, "seconds": seconds})
        now = time.time()
        tagged = {f"eval/{name}": value for name, value in numbers.items()}
        self._track(lambda tracker: tracker.log_numbers(step, tagged, now))

    def samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """Record the texts generated at an evaluation, as (prompt, continuation)."""
        if not texts or not self.main:
            return
        with self._surviving_disk_errors():
            self._record("samples", step, {"texts": texts})
        self._track(lambda tracker: tracker.log_samples(step, texts))

    def about(self, step: int, topic: str, text: str) -> None:
        """Send a text about the run to the trackers. topic: what it is about, such as the environment."""
        if self.main:
            self._track(lambda tracker: tracker.log_text(step, f"about/{topic}", text))

    def first_step(self, step: int, start_seconds: dict[str, float]) -> None:
        """Record how long the start of this process took until its first step. start_seconds: by part."""
        rounded = {part: round(seconds, 3) for part, seconds in start_seconds.items()}
        parts = [f"{part.replace('_', ' ')} {seconds:.1f}" for part, seconds in rounded.items()]
        text = f"first step after {sum(rounded.values()):.1f} s: {', '.join(parts)}"
        self.event(step, "first_step", text, start_seconds=rounded)

    def event(self, step: int, kind: str, text: str, **values: Any) -> None:
        """Record an event. kind: one of EVENTS in trackers/tags.py; values: more for metrics.jsonl only."""
        self.say(f"step {step}: {text}")
        if self.main:
            self._record_event(step, kind, text, **values)
        if kind == "saved":
            self._saved_step = step

    def flush(self) -> None:
        """Write everything that is still in memory to the files. Trackers in a thread do it later."""
        if not self.main:
            return
        for sink in self._sinks:
            with self._surviving_disk_errors():
                sink.flush()
        self._report_trackers()

    def close(self, status: Status = "finished") -> None:
        """Flush and close all files, and wait a limited time for the trackers. Only the first call has an effect.

        status: of the run. If it failed, nothing more is printed, because the error is the last line of the log.
        """
        if not self.main or self._closed:
            return
        self._closed = True
        if self._progress:
            self._progress.stop()
        deadline = time.monotonic() + FINISH_SECONDS[status]
        for sink in self._sinks:
            with self._surviving_disk_errors():
                sink.end(status)
        late = [sink.name for sink in self._sinks if not sink.has_ended(time.monotonic() + QUIET_SECONDS)]
        if late and status != "failed":
            self.say(f"waiting up to {FINISH_SECONDS[status]:g} s for trackers to end: {', '.join(late)}")
        for sink in self._sinks:
            sink.has_ended(deadline)
            sink.report_end()
        self._report_trackers(silent=status == "failed")
        with self._surviving_disk_errors():
            self._file.close()

    @contextlib.contextmanager
    def _surviving_disk_errors(self) -> Iterator[None]:
        """Drop records that cannot be written, and warn once: a full disk must not end training."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self.warn(f"records cannot be written ({error}); training continues without them")
            self._warned = True

    def _record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._step = step
        # json writes floats by repr, which keeps every bit, so two runs can be compared exactly by their records
        self._file.write(to_json({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")

    def _record_event(self, step: int, kind: str, text: str, **values: Any) -> None:
        with self._surviving_disk_errors():
            self._record(kind, step, {"text": text, **values})
        now = time.time()
        self._track(lambda tracker: tracker.log_event(step, kind, text, now))

    def _record_lost_output(self, text: str) -> None:
        self._record_event(self._step, "output_lost", text)

    def _track(self, call: Call) -> None:
        """Let each tracker do `call`, and report what went wrong with earlier calls."""
        for sink in self._sinks:
            with self._surviving_disk_errors():
                sink.send(call)
        self._report_trackers()

    def _report_trackers(self, silent: bool = False) -> None:
        """Print and record what the trackers' threads have to say. silent: only record it."""
        for sink in self._sinks:
            for line in sink.lines():
                if not silent:
                    self.say(line)
            for text in sink.warnings():
                if not silent:
                    self.warn(text)
                with self._surviving_disk_errors():
                    self._record("tracker_failed", self._step, {"text": text})

    def _start_progress(self, step: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        # one column, because rich cuts all columns evenly on a narrow terminal, and this text begins with the step
        text = "step {task.completed:.0f}/{task.total:.0f} {task.fields[numbers]}"
        one_line = Column(no_wrap=True, overflow="ellipsis")
        self._progress = Progress(BarColumn(bar_width=12), TextColumn(text, table_column=one_line))
        self._task = self._progress.add_task("steps", total=self.config.last_step, completed=step, numbers="")
        self._progress.start()

    def _live_numbers(self, values: dict[str, float], seconds_left: float) -> str:
        """Return the text of the live line beside the step, the most important numbers first."""
        numbers = [f"loss {values['loss']:.4f}", f"{values['tokens_per_second']:,.0f} tok/s"]
        if "mfu" in values:
            numbers.append(f"MFU {100 * values['mfu']:.1f} %")
        numbers.append(f"{format_duration(seconds_left)} left")
        if self._saved_step:
            numbers.append(f"saved {self._saved_step}")
        return " | ".join(numbers)


def truncate_records(path: Path, step: int) -> None:
    """Remove the records after `step`, and lines that a crash cut short. Replaces the file atomically.

    The records are moved to NAME.replaced.jsonl: another run with the same log_dir may have written them.
    """
    if not path.exists():
        return
    kept: list[str] = []
    replaced: list[str] = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record_step = parse_json(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut short or damaged
        if is_whole_number(record_step):
            (kept if record_step <= step else replaced).append(line.decode() + "\n")
    if replaced:
        with open(path.with_suffix(REPLACED_SUFFIX), "a", encoding="utf-8") as file:
            file.writelines(replaced)
    write_atomically(path, "".join(kept))
