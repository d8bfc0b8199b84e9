"""Write and read heartbeats: a small file for each rank, with its current phase and step.

Must not know torch, or what happens in a phase. Heartbeats are files, so that they can be read while every rank waits
in a collective, and after all of them are dead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinytrain_dist.config.run_folder import heartbeat_file, heartbeat_folder
from tinytrain_dist.metrics.phase_timer import PHASE_ORDER
from tinytrain_dist.utils.atomic_files import read_json_object, write_atomically
from tinytrain_dist.utils.json_files import is_number, is_whole_number

HEARTBEAT_SECONDS = 10.0  # between two heartbeats of a rank
WAITING_SECONDS = 5.0  # a rank that others wait for has kept them waiting for at least this long
MISSING_RANKS_NAMED = 16  # in a message, of ranks without a heartbeat
WAITED_FOR_RANKS_NAMED = 4  # in a message, of ranks that the others wait for

# rank, world_size, host, pid, step, phase, seconds (without progress), time (seconds since 1970), world (the launch
# ID), attempt (of a batch script)
Heartbeat = dict[str, Any]


def write_heartbeat(folder: Path, heartbeat: Heartbeat) -> None:
    """Write the heartbeat of a rank of the run in `folder`. Ignores a full disk."""
    path = heartbeat_file(folder, heartbeat["rank"])
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, heartbeat)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Return the last heartbeat of each rank, with `seen` added: when it was written, by the file system's clock.

    Skips incomplete files, and files that an earlier run on more ranks has left.
    """
    heartbeats = []
    for path in sorted(heartbeat_folder(folder).glob("rank-*.json")):
        heartbeat = read_json_object(path)
        if _is_heartbeat(heartbeat):
            with contextlib.suppress(OSError):
                heartbeats.append({**heartbeat, "seen": path.stat().st_mtime})
    return [heartbeat for heartbeat in heartbeats if heartbeat["rank"] < heartbeats[0]["world_size"]]


def remove_heartbeats(folder: Path, world_size: int) -> None:
    """Remove the heartbeats of ranks that a run on `world_size` ranks does not have."""
    for path in heartbeat_folder(folder).glob("rank-*.json"):
        if path.name > heartbeat_file(folder, world_size - 1).name:
            with contextlib.suppress(OSError):
                path.unlink()


def _is_heartbeat(record: dict[str, Any]) -> bool:
    """Return whether the content of a file is what a rank writes, and not damaged."""
    numbers = all(is_whole_number(record.get(name)) for name in ("rank", "world_size", "pid", "step"))
    texts = all(isinstance(record.get(name), str) for name in ("host", "phase"))
    return numbers and texts and is_number(record.get("seconds"))


def phase_index(heartbeat: Heartbeat) -> int:
    """Return the position of a rank's phase within a step; 0 if the phase is unknown."""
    return PHASE_ORDER.index(heartbeat["phase"]) if heartbeat["phase"] in PHASE_ORDER else 0


def describe_progress(heartbeats: Sequence[Heartbeat], world_size: int, since: float) -> str:
    """Describe which ranks the others wait for in a run that may be healthy, as `describe_waiting` does.

    The heartbeats of a healthy run are from different moments of the last ten seconds, so its ranks seem to be at
    different steps. A rank is named only if it was still behind when another rank had waited for some seconds.
    """
    equal = len(set(map(_progress, heartbeats))) == 1
    silent = any(heartbeat["seen"] < since for heartbeat in heartbeats)
    if equal or silent or len(heartbeats) < world_size:
        return describe_waiting(heartbeats, world_size, since)
    waited_for = [heartbeat for heartbeat in heartbeats if _keeps_waiting(heartbeat, heartbeats)]
    least = min(map(_progress, waited_for), default=None)
    behind = [heartbeat for heartbeat in waited_for if _progress(heartbeat) == least]
    return f"all wait for {_format_ranks(behind)}" if behind else "no rank has kept the others waiting"


def _progress(heartbeat: Heartbeat) -> tuple[int, int]:
    """Return how far a rank was: after how many steps, and in which phase."""
    return heartbeat["step"], phase_index(heartbeat)


def _keeps_waiting(heartbeat: Heartbeat, others: Sequence[Heartbeat]) -> bool:
    """Return whether a rank was seen behind another one that had been in its phase for some seconds by then."""
    return any(
        _progress(heartbeat) < _progress(other)
        and heartbeat["seen"] - (other["seen"] - other["seconds"]) >= WAITING_SECONDS
        for other in others
    )


def describe_waiting(heartbeats: Sequence[Heartbeat], world_size: int, since: float) -> str:
    """Describe which ranks the others wait for in a run that hangs, as part of a sentence.

    Names the first of these groups that is not empty:

    - ranks that never wrote a heartbeat
    - ranks that have not written a heartbeat after the time `since`
    - ranks that are behind the others
    """
    missing = sorted(set(range(world_size)) - {heartbeat["rank"] for heartbeat in heartbeats})
    if missing:
        return f"rank(s) {', '.join(map(str, missing[:MISSING_RANKS_NAMED]))} of {world_size} never wrote a heartbeat"
    silent = [heartbeat for heartbeat in heartbeats if heartbeat["seen"] < since]
    if silent:
        return f"all wait for {_format_ranks(silent)}: no heartbeat since then"
    progress = [_progress(heartbeat) for heartbeat in heartbeats]
    least = min(progress)
    behind = [heartbeat for heartbeat, reached in zip(heartbeats, progress, strict=True) if reached == least]
    if len(behind) == len(heartbeats):
        return f"all {len(behind)} rank(s) are in {behind[0]['phase']} after step {behind[0]['step']}"
    return f"all wait for {_format_ranks(behind)}"


def _format_ranks(heartbeats: Sequence[Heartbeat]) -> str:
    named = [
        f"rank {heartbeat['rank']} on {heartbeat['host']} ({heartbeat['phase']} after step {heartbeat['step']})"
        for heartbeat in heartbeats[:WAITED_FOR_RANKS_NAMED]
    ]
    hidden = len(heartbeats) - len(named)
    return ", ".join(named) + (f" and {hidden} more" if hidden else "")
