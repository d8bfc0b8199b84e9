"""Read what a run has recorded about its steps and about the changes of its nodes. Must not know how nodes are run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinytrain_dist.reliability.restart_history import Change, read_changes

PARTS = ("detection", "stop", "rendezvous", "start", "load", "first_step")


@dataclass(frozen=True)
class Recovery:
    """A change of nodes after which the run has trained on: the record of the agents, and that of the new world."""

    change: Change
    times: Change

    @property
    def lost_steps(self) -> int:
        """The completed steps that were computed again."""
        return int(self.times["repeated_steps"])

    @property
    def loaded_step(self) -> int:
        """The step of the snapshot or checkpoint with which the new world began."""
        return int(self.times["loaded_step"])

    @property
    def parts(self) -> dict[str, float]:
        """The seconds of each part of the time without training."""
        return {name: float(self.times["recovery_seconds"][name]) for name in PARTS}


def changes_of(run: Path) -> list[Change]:
    """Return the records of the worlds that began after the first one, whether or not they have completed a step."""
    return [change for change in read_changes(run) if "nodes" in change]


def caused_by(change: Change) -> list[str]:
    """Return the addresses of the nodes that have failed or were lost."""
    return [*change.get("failed", []), *change.get("lost", [])]


def recoveries(run: Path) -> list[Recovery]:
    """Return all changes of nodes after which a step was completed, oldest first."""
    changes = {_world(change): change for change in changes_of(run)}
    times = [change for change in read_changes(run) if change["kind"] == "recovered"]
    return [Recovery(changes[_world(each)], each) for each in times if _world(each) in changes]


def nodes_that_train(run: Path) -> list[str]:
    """Return the nodes of the newest world; none if it has not completed a step, or is the first world."""
    changes, trained = changes_of(run), recoveries(run)
    if not trained or _world(trained[-1].change) != _world(changes[-1]):
        return []
    return list(map(str, changes[-1]["nodes"]))


def train_steps(run: Path) -> list[int]:
    """Return the step of each record of a step, in the order in which they were written."""
    path = run / "logs" / "metrics.jsonl"
    if not path.exists():
        return []
    steps = []
    for line in path.read_bytes().splitlines():
        if line.startswith(b"{") and line.endswith(b"}") and b'"train"' in line:
            record = json.loads(line)
            if record["kind"] == "train":
                steps.append(int(record["step"]))
    return steps


def last_step(run: Path) -> int:
    """Return the newest step that was recorded; 0 if there is none. Reads the end of the file only."""
    path = run / "logs" / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 20_000))
        lines = file.read().split(b"\n")[:-1]  # the last one may be incomplete
    for line in reversed(lines):
        if b'"train"' in line and line.startswith(b"{"):
            return int(json.loads(line)["step"])
    return 0


def gap_in_steps(steps: Sequence[int]) -> str:
    """Return a sentence about the first step that is missing or was recorded twice; "" if all are there once."""
    for position, step in enumerate(steps, start=1):
        if step != position:
            return (
                f"record {position} of metrics.jsonl is about step {step}: another process has written, or one is lost"
            )
    return ""


def _world(change: Change) -> tuple[object, object]:
    return change.get("session"), change.get("round")
