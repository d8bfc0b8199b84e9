"""Define what an experiment tracker is: the class `Tracker` to derive from, and what a tracker knows about its run.

Must not know any tracking service, or torch. docs/trackers.md shows a complete tracker.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about its run."""

    name: str  # of the run folder
    logs: Path  # folder of all logs of the run
    folder: Path  # for files of this tracker alone; it exists
    settings: dict[str, Any]  # the resolved configuration, as JSON values
    config_toml: str  # the same as text
    resumed_step: int  # the step at which this process starts; 0 for a new run
    is_new: bool  # resume = "never": do not continue the tracker's earlier run


class Tracker:
    """Receive what a run logs. Derive from this class, and override the methods that you need; the others do nothing.

    Rank 0 creates the object, without arguments, and calls all methods, in one thread. It is not the thread that
    trains, so they may wait. What they raise costs the point, never the run. `start` is called first and `finish` last.
    """

    def start(self, run: TrackedRun) -> str | None:
        """Prepare to receive points. Return a line to print, or None. Nothing else is called if this fails."""

    def log_numbers(self, step: int, numbers: dict[str, float], time: float) -> None:
        """Receive numbers by tag, such as train/loss. time: when they were logged, in seconds since 1970."""

    def log_histogram(self, step: int, tag: str, values: list[float]) -> None:
        """Receive values whose distribution is of interest, one for each rank."""

    def log_event(self, step: int, kind: str, text: str, time: float) -> None:
        """Receive an event. kind: such as saved or skipped; all kinds are in EVENTS, except tracker_failed."""

    def log_text(self, step: int, tag: str, text: str) -> None:
        """Receive a text about the run, such as about/environment."""

    def log_samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """Receive the texts generated at an evaluation, as (prompt, continuation)."""

    def flush(self) -> None:
        """Write or send what is still in memory. Called after each save."""

    def finish(self, status: Status) -> None:
        """End. status: finished; stopped (asked to stop, may be resumed); failed."""
