"""Keep the history of the worlds of a run: why each one ended, how long it took until the next one trained.

RUN/restarts.jsonl has a line for each change of nodes, and a second one with its times when the next step is complete.
From it follows which nodes are excluded, and whether a run that keeps failing ends. Must not know torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinytrain_dist.config.run_folder import restarts_file
from tinytrain_dist.utils.json_files import is_number, parse_json, to_json
from tinytrain_dist.utils.text import format_list

MOST_FAILURES_OF_A_NODE = 3  # in one session; the node is then excluded
MOST_FAILURES_AT_A_STEP = 3  # in a row; the run then ends

# kind: "failed" (a rank failed), "lost" (a node was lost), "left" (it was asked to), "joined", or "excluded" (a node
# was refused).
# session, round (the world that began), time, reason, step (last completed one of the world that has ended; null if it
# has completed none), trained_until (last completed one of the run), nodes (of the new world), failed, lost, left and
# joined (addresses of nodes), all_failed, idle_since, detection_seconds, stop_seconds, rendezvous_seconds.
# A second line with the kind "recovered" has the parts in recovery_seconds, repeated_steps and loaded_step.
Change = dict[str, Any]


def append_change(run: Path, change: Change) -> None:
    """Add a line to the history of a run. Ignores a full disk: the run matters more."""
    with contextlib.suppress(OSError):
        run.mkdir(parents=True, exist_ok=True)
        with restarts_file(run).open("a", encoding="utf-8") as file:
            file.write(to_json(change) + "\n")


def read_changes(run: Path) -> list[Change]:
    """Return all lines of the history, oldest first. Skips damaged ones."""
    changes = []
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in restarts_file(run).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                change = parse_json(line)
                if isinstance(change, dict) and isinstance(change.get("kind"), str):
                    changes.append(change)
    return changes


def failures_of(changes: Sequence[Change], session: str) -> list[Change]:
    """Return the changes of a session that a failure has caused, oldest first."""
    return [change for change in changes if change.get("session") == session and change["kind"] in ("failed", "lost")]


def why_excluded(changes: Sequence[Change], session: str, address: str) -> str:
    """Return why the node with this address may not join any more, as a sentence; "" if it may."""
    caused = [
        change
        for change in failures_of(changes, session)
        if not change.get("all_failed") and address in [*change.get("failed", []), *change.get("lost", [])]
    ]
    if len(caused) < MOST_FAILURES_OF_A_NODE:
        return ""
    steps = ", ".join(str(change.get("step")) for change in caused)
    return (
        f"node {address} is excluded: it has caused {len(caused)} restarts of this run (after steps {steps}), the last "
        f"one because {caused[-1].get('reason')}; repair it or use another node; a new start of the run admits it"
    )


def why_over(changes: Sequence[Change], session: str) -> str:
    """Return why a run that keeps failing ends, as a sentence; "" if it goes on."""
    failures = failures_of(changes, session)
    if not failures:
        return ""
    last = failures[-1]
    if last.get("all_failed"):
        return (
            f"all {len(last.get('failed', []))} nodes failed at once, after step {last.get('step')}, so no node is to "
            f"blame and no restart would help: {last.get('reason')}"
        )
    recent = failures[-MOST_FAILURES_AT_A_STEP:]
    steps = [change.get("step") for change in recent]
    if len(recent) == MOST_FAILURES_AT_A_STEP and len(set(steps)) == 1:
        return (
            f"the run has failed {MOST_FAILURES_AT_A_STEP} times after step {steps[0]}, so another restart would not "
            f"help; the last time: {last.get('reason')}"
        )
    return ""


def change_of(changes: Sequence[Change], session: str, round_number: int) -> Change | None:
    """Return the change with which a world began; None for the first world of a session."""
    found = [
        change
        for change in changes
        if (change.get("session"), change.get("round")) == (session, round_number)
        and change["kind"] in ("failed", "lost", "left", "joined")
    ]
    return found[-1] if found else None


def describe_changes(changes: Sequence[Change]) -> dict[str, str]:
    """Return lines for `tinytrain status`: the present nodes, lost time, the last recovery, and excluded nodes."""
    worlds = [change for change in changes if isinstance(change.get("nodes"), list)]
    measured = [change for change in changes if is_number(change.get("lost_seconds"))]
    if not worlds:
        return {}
    total = sum(change["lost_seconds"] for change in measured)
    excluded = [str(change.get("node")) for change in changes if change["kind"] == "excluded"]
    last = measured[-1].get("recovery_seconds") if measured else None
    nodes = [str(node) for node in worlds[-1]["nodes"]]
    return {
        "nodes": f"{len(nodes)} since the last change: {format_list(nodes)}",
        "changes": f"{len(worlds)} of the nodes, {total:.0f} s without training",
        "  last": describe_parts(last) if isinstance(last, dict) and all(map(is_number, last.values())) else "",
        "excluded": format_list(sorted(set(excluded))) if excluded else "",
    }


def describe_parts(parts: dict[str, float]) -> str:
    """Return the seconds of each part of a recovery, and their sum."""
    listed = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
    return f"{sum(parts.values()):.1f} s from the last completed step to the next one ({listed})"
