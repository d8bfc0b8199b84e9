"""Check that error.json has the first cause, in whatever order the ranks and agents of several nodes report."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tinytrain_dist.reliability import error_report

CAUSES = {
    "peer": {"message": "peer", "time": 1.0, "secondary": True, "step": 3},  # earliest on its host's clock
    "killed": {"message": "killed", "time": 2.0, "secondary": False, "step": 4},
    "later": {"message": "later", "time": 3.0, "secondary": False, "step": 4},
}


@pytest.mark.parametrize("order", list(itertools.permutations(CAUSES)))
def test_a_death_counts_before_errors_of_other_ranks_and_earlier_before_later(tmp_path: Path, order: Any) -> None:
    for name in order:
        error_report.write_error(tmp_path, CAUSES[name])
    assert json.loads((tmp_path / "error.json").read_text()) == CAUSES["killed"]
    assert json.loads((tmp_path / "state.json").read_text())["state"] == "failed"


def test_an_error_of_another_rank_never_replaces_a_cause_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error_report.write_error(tmp_path, CAUSES["killed"])
    monkeypatch.setattr(error_report, "read_json_object", lambda path: {})  # it was written after this rank had looked
    error_report.write_error(tmp_path, CAUSES["peer"])
    assert json.loads((tmp_path / "error.json").read_text()) == CAUSES["killed"]


def test_reading_the_cause_removes_it_and_an_end_without_a_cause_is_reported(tmp_path: Path) -> None:
    assert error_report.read_and_clear_error(tmp_path) == ""
    error_report.write_error(tmp_path, CAUSES["killed"])
    assert error_report.read_and_clear_error(tmp_path) == "killed"
    assert not (tmp_path / "error.json").exists()
    (tmp_path / "state.json").write_text('{"state": "running", "step": 1}')
    assert error_report.read_and_clear_error(tmp_path) == error_report.NO_ERROR_MESSAGE
    (tmp_path / "state.json").write_text('{"state": "preempted", "step": 1}')
    assert error_report.read_and_clear_error(tmp_path) == ""


def test_an_abort_request_is_for_one_launch_and_the_first_one_stays(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    error_report.request_abort(tmp_path, "a", "first")
    error_report.request_abort(tmp_path, "a", "second")
    assert error_report.read_abort_request(tmp_path, "a")["message"] == "first"
    assert error_report.read_abort_request(tmp_path, "b") == {}
    assert error_report.read_abort_request(tmp_path, "") == {}


def test_a_full_disk_is_ignored(tmp_path: Path) -> None:
    error_report.write_error(tmp_path / "gone", CAUSES["killed"])
    error_report.request_abort(tmp_path / "gone", "a", "x")


def test_the_launcher_gets_the_message_in_its_own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.delenv("TINYTRAIN_AGENT", raising=False)
    assert not error_report.report_to_launcher("lost"), "there is no launcher"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error"))
    assert not error_report.report_to_launcher("for torchrun"), "plain torchrun does not print it"
    monkeypatch.setenv("TINYTRAIN_AGENT", str(tmp_path / "note"))
    assert error_report.report_to_launcher("for the agent")
    assert json.loads((tmp_path / "error").read_text())["message"]["message"] == "for the agent"
