"""The history of nodes: who is excluded, when a run ends, what `tinytrain status` shows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinytrain_dist.config.run_folder import restarts_file
from tinytrain_dist.errors import TrainingError
from tinytrain_dist.reliability.restart_history import (
    append_change,
    change_of,
    describe_changes,
    read_changes,
    why_excluded,
    why_over,
)
from tinytrain_dist.training.recovery import Recovery


def change(kind: str = "lost", step: int | None = 5, session: str = "a", **values: Any) -> dict[str, Any]:
    values = {"failed": [], "lost": ["node2"] if kind == "lost" else [], "joined": [], **values}
    return {"kind": kind, "session": session, "step": step, "reason": f"{kind} it", "nodes": ["node1"], **values}


def test_a_node_is_excluded_after_three_restarts_of_this_start_that_it_has_caused() -> None:
    twice = [change(step=3), change("joined", joined=["node2"]), change("failed", step=8, failed=["node2"])]
    assert why_excluded(twice, "a", "node2") == ""
    assert why_excluded([*twice, change(step=9, session="earlier")], "a", "node2") == ""
    assert why_excluded([*twice, change("failed", step=9, failed=["node1"])], "a", "node2") == ""
    everybody = change("failed", step=9, failed=["node1", "node2"], all_failed=True)
    assert why_excluded([*twice, everybody], "a", "node2") == "", "then no node is to blame"
    why = why_excluded([*twice, change(step=9)], "a", "node2")
    assert why.startswith("node node2 is excluded: it has caused 3 restarts of this run (after steps 3, 8, 9)")
    assert "lost it" in why
    assert why_excluded([*twice, change(step=9)], "a", "node1") == ""


def test_a_run_ends_after_three_failures_at_a_step_or_one_of_all_nodes() -> None:
    assert why_over([], "a") == ""
    assert why_over([change(step=7), change(step=7)], "a") == ""
    assert why_over([change(step=7), change(step=7), change(step=8)], "a") == ""
    assert why_over([change(step=7, session="b")] * 3, "a") == ""
    between = [change(step=7), change("joined", step=7), change(step=7), change(step=7)]
    assert why_over(between, "a").startswith("the run has failed 3 times after step 7, so another restart would not")
    at_once = change("failed", failed=["node1", "node2"], all_failed=True)
    assert why_over([at_once], "a").startswith("all 2 nodes failed at once, after step 5")
    assert why_over([at_once, change(step=9)], "a") == ""


def test_the_history_survives_damage_and_says_nothing_about_other_runs(tmp_path: Path) -> None:
    assert read_changes(tmp_path) == []
    assert describe_changes([]) == {}
    append_change(tmp_path, change(round=1))
    with restarts_file(tmp_path).open("a") as file:
        file.write('{"kind": "lo\n[3]\n{"kind": 3}\n')
    append_change(tmp_path, {"kind": "recovered", "lost_seconds": 9.5, "recovery_seconds": {"start": 9.0, "load": 0.5}})
    append_change(tmp_path, {"kind": "excluded", "node": "node2"})
    changes = read_changes(tmp_path)
    assert [each["kind"] for each in changes] == ["lost", "recovered", "excluded"]
    assert change_of(changes, "a", 1) == changes[0]
    assert change_of(changes, "a", 2) is None
    assert describe_changes(changes) == {
        "nodes": "1 since the last change: node1",
        "changes": "1 of the nodes, 10 s without training",
        "  last": "9.5 s from the last completed step to the next one (start 9.0, load 0.5)",
        "excluded": "node2",
    }


def test_the_ranks_of_a_run_that_keeps_failing_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYTRAIN_WORLD", raising=False)
    for number in range(3):
        append_change(tmp_path, change(step=7, round=number + 1))
    assert Recovery.begin(tmp_path) is None, "the run is not elastic"
    monkeypatch.setenv("TINYTRAIN_WORLD", '{"session": "b", "round": 3, "ready": 1.0}')
    assert Recovery.begin(tmp_path) is None, "that was an earlier start"
    monkeypatch.setenv("TINYTRAIN_WORLD", '{"session": "a", "round": 3, "ready": 1.0}')
    with pytest.raises(TrainingError, match="has failed 3 times after step 7"):
        Recovery.begin(tmp_path)


def test_steps_that_an_earlier_world_has_completed_are_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as when a second node is lost before the survivors of the first loss have completed a step."""
    append_change(tmp_path, change(step=None, trained_until=9, round=2))
    monkeypatch.setenv("TINYTRAIN_WORLD", '{"session": "a", "round": 2, "ready": 1.0}')
    recovery = Recovery.begin(tmp_path)
    assert recovery is not None
    events: list[str] = []
    recovery.report(SimpleNamespace(event=lambda step, kind, text, **values: events.append(text)), 5, {})  # type: ignore[arg-type]
    assert "4 step(s) are repeated" in events[0]
    assert (read_changes(tmp_path)[-1]["repeated_steps"], read_changes(tmp_path)[-1]["loaded_step"]) == (4, 5)
