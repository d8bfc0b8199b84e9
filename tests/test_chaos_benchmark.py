"""benchmarks/chaos.py --nodes: nodes in networks of their own are killed, cut off and brought back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from chaos_nodes.events import Outcome  # noqa: E402
from chaos_nodes.network import why_no_networks  # noqa: E402
from chaos_nodes.report import broken_rules, table, warnings  # noqa: E402
from chaos_nodes.run_history import Recovery, gap_in_steps, nodes_that_train, recoveries  # noqa: E402

from tinytrain_dist.reliability.restart_history import append_change  # noqa: E402

PARTS = dict.fromkeys(("detection", "stop", "rendezvous", "start", "load", "first_step"), 1.0)


def chaos(*arguments: str, timeout_seconds: float = 600) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it finds the checkout itself
    command = [sys.executable, str(BENCHMARKS / "chaos.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=env, timeout=timeout_seconds, cwd="/"
    )


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(why_no_networks() != "", reason=why_no_networks())
def test_a_run_outlives_a_kill_and_a_cut_network_with_the_same_bits() -> None:
    done = chaos("--nodes", "2", "--plan", "kill,return,isolate,return", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    kinds = [line.partition(" 10.98.0.")[0] for line in lines[:4]]
    assert kinds == ["1: kill", "2: return after kill", "3: isolate", "4: return after isolate"]
    assert "4 events on 2 nodes (fsdp, seed 3)" in lines[-1]
    assert lines[-1].endswith("digests equal")


def test_a_number_of_nodes_or_an_event_that_cannot_be_is_named() -> None:
    if reason := why_no_networks():
        pytest.skip(reason)
    assert "--nodes: 9 is not from 2 to 5" in chaos("--nodes", "9").stdout
    done = chaos("--nodes", "3", "--plan", "kill,flood")
    assert (done.returncode, done.stderr) == (1, "")
    assert "'flood' is not an event; there are kill, double, rank, stop, cut, isolate, slow, return" in done.stdout


def outcome(kind: str, seconds: float | None, lost: int, restarts: int = 1) -> Outcome:
    recovery = Recovery({}, {"recovery_seconds": PARTS, "repeated_steps": lost})
    return Outcome(kind, "node1", seconds, lost, 20, recovery if restarts else None, restarts)


def test_lost_steps_break_a_rule_and_seconds_are_a_warning() -> None:
    outcomes = [outcome("kill", 9.0, 20), outcome("kill", 16.0, 21), outcome("return after cut", 13.0, 0)]
    outcomes += [outcome("slow", None, 0, 0), outcome("slow", None, 0, 1)]
    assert broken_rules(outcomes) == ["event 2, kill of node1, lost 21 steps; 20 are allowed"]
    assert [text.partition(",")[0] for text in warnings(outcomes)] == [
        "event 2",
        "event 3",
        "event 5: the run left the slow node node1 behind",
    ]
    assert "| kill | 2 | 12.5 | 16.0 | 21 | 0 |" in table(outcomes)
    assert "| slow | 2 | - | - | 0 | 0 |" in table(outcomes)


def test_only_a_world_that_has_completed_a_step_trains(tmp_path: Path) -> None:
    assert nodes_that_train(tmp_path) == []
    append_change(tmp_path, {"kind": "lost", "session": "a", "round": 1, "nodes": ["node1"]})
    assert nodes_that_train(tmp_path) == []
    append_change(tmp_path, {"kind": "recovered", "session": "a", "round": 1})
    assert nodes_that_train(tmp_path) == ["node1"]
    append_change(tmp_path, {"kind": "joined", "session": "a", "round": 2, "nodes": ["node1", "node2"]})
    assert nodes_that_train(tmp_path) == []
    assert len(recoveries(tmp_path)) == 1


def test_a_step_that_is_missing_or_written_twice_is_found() -> None:
    assert gap_in_steps([1, 2, 3]) == ""
    assert "record 3 of metrics.jsonl is about step 2" in gap_in_steps([1, 2, 2, 3])
    assert "record 2 of metrics.jsonl is about step 3" in gap_in_steps([1, 3])
