"""What a rank of an elastic run knows about its world, and how its agent asks it to make room for another world.

The world is the set of nodes that train together. When nodes join, the agents ask all ranks to save and to end, and
start them again in a larger world. Must not know torch, or how nodes find each other.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tinytrain_dist.utils.json_files import parse_json

REGROUP_EXIT_CODE = 75  # of a rank that has saved and waits for the next world; "try again later" in sysexits.h
REGROUP_REASON = "a change of nodes"
PROGRESS = struct.Struct("<qd")  # completed steps, time in seconds since 1970


@dataclass(frozen=True)
class World:
    """The world of this rank, from TINYTRAIN_WORLD.

    * `session`: random ID of the run since its nodes were started; it stays the same when nodes come and go.
    * `round`: number of the world in its session; later worlds have larger numbers.
    * `ready`: when the nodes of this world had found each other, in seconds since 1970.
    * `fewest_nodes`: with which the run goes on.
    """

    session: str
    round: int
    ready: float
    fewest_nodes: int = 1


def own_world() -> World | None:
    """Return the world of this rank; None if the run is not elastic."""
    text = os.environ.get("TINYTRAIN_WORLD")
    if not text:
        return None
    values = parse_json(text)
    return World(
        str(values["session"]), int(values["round"]), float(values["ready"]), int(values.get("fewest_nodes", 1))
    )


# ---------------------------------------------------------------- requests of the agent


def _note(name: str) -> Path | None:
    agent_note = os.environ.get("TINYTRAIN_AGENT")
    return Path(agent_note).with_name(name) if agent_note else None


def regroup_note(agent_note: Path) -> Path:
    """Return the file that asks the ranks of an agent to make room. agent_note: TINYTRAIN_AGENT."""
    return agent_note.with_name("regroup")


def regroup_requested() -> bool:
    """Return whether this rank was asked to make room for another world, and not to stop for good."""
    note = _note("regroup")
    return note is not None and "TINYTRAIN_STOP" not in os.environ and note.exists()


def main_reason(reasons: Iterable[str]) -> str:
    """Return the reason to stop that counts, of those of all ranks: a change of nodes only if there is no other."""
    given = [reason for reason in reasons if reason]
    return next((reason for reason in given if reason != REGROUP_REASON), given[0] if given else "")


def stop_note(agent_note: Path) -> Path:
    """Return the file with the reason for which an agent asks its ranks to stop. agent_note: TINYTRAIN_AGENT."""
    return agent_note.with_name("stop-reason")


def stop_reason_of_agent() -> str:
    """Return why the agent of this rank wants it to stop; "" if it has no reason of its own."""
    note = _note("stop-reason")
    with contextlib.suppress(OSError):
        return note.read_text(encoding="utf-8") if note is not None else ""
    return ""


# ---------------------------------------------------------------- progress, for the agent


class ProgressMark:
    """A small file beside the agent's, in which a rank keeps the number and the time of its last completed step."""

    def __init__(self) -> None:
        """Open the file. Without an agent, or on a full disk, nothing is kept."""
        self._descriptor: int | None = None
        note = _note("progress")
        if note is not None and own_world() is not None:
            with contextlib.suppress(OSError):
                self._descriptor = os.open(note, os.O_WRONLY | os.O_CREAT, 0o600)

    def set(self, step: int) -> None:
        """Note that a step is complete. One small write to a file in memory, about a microsecond."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, PROGRESS.pack(step, time.time()), 0)


def read_progress(agent_note: Path) -> tuple[int, float] | None:
    """Return the last completed step of an agent's ranks and its time; None if they have not completed any."""
    try:
        step, seconds = PROGRESS.unpack(agent_note.with_name("progress").read_bytes())
        return int(step), float(seconds)
    except (OSError, struct.error):
        return None


def forget_progress(agent_note: Path) -> None:
    """Remove the progress of the last world."""
    with contextlib.suppress(OSError):
        agent_note.with_name("progress").unlink()
