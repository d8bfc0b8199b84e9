"""An agent may end a rank in its start, or the rank goes on, and never both."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinytrain_dist.reliability import start_marks


class WaitsError(Exception):
    pass


def wait(_: float) -> None:
    raise WaitsError


def test_a_rank_that_has_left_its_start_cannot_be_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "run"
    monkeypatch.setenv("TINYTRAIN_AGENT", str(note))
    start_marks.leave_start()
    assert not start_marks.create_mark(note, os.getpid())


def test_a_rank_that_its_agent_ends_does_not_leave_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "run"
    monkeypatch.setenv("TINYTRAIN_AGENT", str(note))
    monkeypatch.setattr(start_marks.time, "sleep", wait)
    assert start_marks.create_mark(note, os.getpid())
    with pytest.raises(WaitsError):
        start_marks.leave_start()


def test_without_an_agent_or_its_folder_the_start_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYTRAIN_AGENT", raising=False)
    start_marks.leave_start()
    monkeypatch.setenv("TINYTRAIN_AGENT", str(tmp_path / "gone" / "run"))
    start_marks.leave_start()
    with pytest.raises(OSError, match="gone"):
        start_marks.create_mark(tmp_path / "gone" / "run", os.getpid())
