"""The report of the doctor: what is printed, and its exit code."""

from __future__ import annotations

import pytest

from tinytrain_dist.cli.doctor_checks.report import NOTE, OK, PROBLEM, Report


def test_report_prints_each_finding_once_and_counts_problems(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report([(NOTE, "name: a"), (PROBLEM, "limits: b")], title="doctor on a")
    report.add("clock", [], "fine")
    report.add("disk", ["disk: full"], "not shown")
    report.add_problems(["disk: full"])
    report.tables.append([["host", "GB/s"], ["node1", "1"], ["n2", "22"]])
    report.print()
    assert capsys.readouterr().out.splitlines() == [
        "doctor on a",
        "  note     name: a",
        "  PROBLEM  limits: b",
        "  ok       clock: fine",
        "  PROBLEM  disk: full",
        "",
        "  host   GB/s",
        "  node1     1",
        "  n2       22",
        "",
        "2 problems found",
    ]
    assert report.exit_code == 1


def test_notes_are_no_problems(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report([(NOTE, "name: a"), (OK, "limits: b")])
    report.print()
    assert capsys.readouterr().out.endswith("no problems found\n")
    assert report.exit_code == 0
