"""Check that an agent ends a rank only during its start, never after it has begun to train."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinytrain_dist.reliability import start_marks


class WaitsError(Exception):
    pass


def wait(_: float) -> None:
    raise WaitsError


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "agent").mkdir()
    monkeypatch.setenv("TINYTRAIN_AGENT", str(tmp_path / "agent" / "run"))
    monkeypatch.setattr(start_marks.time, "sleep", wait)
    yield tmp_path / "agent" / "run"
    start_marks._own_mark.clear()


def test_a_rank_that_has_left_its_start_cannot_be_claimed(note: Path) -> None:
    start_marks.begin_start()
    start_marks.leave_start()
    assert not start_marks.claim(note, os.getpid())
    assert list(note.parent.iterdir()) == []


def test_a_rank_that_its_agent_ends_does_not_leave_its_start(note: Path) -> None:
    start_marks.begin_start()
    assert start_marks.claim(note, os.getpid())
    with pytest.raises(WaitsError):
        start_marks.leave_start()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_folder_that_is_gone_keeps_no_rank_from_training(note: Path, moment: str) -> None:
    if moment == "before":  # no mark can be made: as on a full disk
        shutil.rmtree(note.parent)
    start_marks.begin_start()
    shutil.rmtree(note.parent, ignore_errors=True)
    assert not start_marks.claim(note, os.getpid())
    start_marks.leave_start()


def test_without_an_agent_there_is_no_mark(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYTRAIN_AGENT")
    start_marks.begin_start()
    start_marks.leave_start()
    assert list(note.parent.iterdir()) == []
