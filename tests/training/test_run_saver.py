"""Check what each outcome of a save means for the run and its log."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinytrain_dist.errors import CheckpointError, ReplicaMismatchError
from tinytrain_dist.metrics.phase_timer import PhaseTimer
from tinytrain_dist.training.run_saver import RunSaver


class Log:
    """A run log that keeps what it is told to log."""

    def __init__(self) -> None:
        self.events: list[tuple[int, str, str]] = []
        self.flushed = 0

    def say(self, text: str) -> None:
        self.events.append((-1, "say", text))

    def event(self, step: int, kind: str, text: str) -> None:
        self.events.append((step, kind, text))

    def flush(self) -> None:
        self.flushed += 1


class Checkpoints:
    """A stand-in for a checkpoint manager; its next save ends with `error`."""

    def __init__(self, folder: Path, error: BaseException | None) -> None:
        self.config = SimpleNamespace(target_dir=str(folder), ckpt_async=True)
        self.context = SimpleNamespace(is_main=True)
        self.copier = None
        self.pending: Any = SimpleNamespace(step=4, seconds=1.5, error=error, is_alive=lambda: True)

    def folder(self, step: int) -> Path:
        return Path(f"checkpoint-{step:08d}")

    def collect(self, wait: bool) -> Any:
        save, self.pending = self.pending, None
        return save


def collected(tmp_path: Path, error: BaseException | None, **options: Any) -> tuple[RunSaver, Log]:
    log = Log()
    saver = RunSaver(Checkpoints(tmp_path, error), log, PhaseTimer(), saved_step=-1)  # type: ignore[arg-type]
    saver.collect(6, **options)
    return saver, log


def test_a_save_that_ended_well_is_the_newest(tmp_path: Path) -> None:
    saver, log = collected(tmp_path, None)
    assert (saver.saved_step, saver.saving_seconds, saver.failed_saves) == (4, 1.5, 0)
    assert log.events == [(4, "saved", "saved checkpoint-00000004 (1.5 s)")]
    assert log.flushed == 1


def test_waiting_is_reported_with_both_steps(tmp_path: Path) -> None:
    saver, log = collected(tmp_path, None, wait=True)
    assert log.events[0] == (-1, "say", "step 6: waiting for the save of step 4 to end")
    assert saver.phase_timer.phase == "checkpoint"


def test_a_full_disk_costs_the_save_and_not_the_run(tmp_path: Path) -> None:
    saver, log = collected(tmp_path, OSError(28, "No space left on device"))
    assert (saver.saved_step, saver.failed_saves) == (-1, 1)
    (_, kind, text), *_ = log.events
    assert kind == "save_failed"
    assert "No space left on device" in text
    assert "failed saves so far: 1" in text
    assert "next multiple of ckpt_every" in text


def test_a_full_disk_at_the_last_save_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-00000004: could not be saved .*No space.*; make room"):
        collected(tmp_path, OSError(28, "No space left on device"), last=True)


@pytest.mark.parametrize(
    ("error", "kind"), [(ReplicaMismatchError("differ"), "replicas_differ"), (CheckpointError("nan"), "save_failed")]
)
def test_other_errors_end_the_run_and_are_logged_by_kind(tmp_path: Path, error: Exception, kind: str) -> None:
    log = Log()
    saver = RunSaver(Checkpoints(tmp_path, error), log, PhaseTimer(), saved_step=-1)  # type: ignore[arg-type]
    with pytest.raises(type(error), match=str(error)):
        saver.collect(6)
    assert log.events == [(4, kind, str(error))]
    assert log.flushed == 1
