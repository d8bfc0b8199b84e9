"""Let an agent end ranks that hang in their start, and never one that may have something to save.

A rank in its start has a mark: an empty file in the folder of its agent. The rank removes it when the start ends. An
agent that wants to end the rank removes it as well, and only one of them can: either the rank trains, or the agent ends
it. Must not know torch, or what happens in a start.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from tinytrain_dist.utils.processes import process_start_time

_own_mark: list[Path] = []  # of this process; the start of a process ends once


def _mark(folder_note: Path, pid: int) -> Path:
    return folder_note.with_name(f"starting-{pid}-{process_start_time(pid)}")  # process IDs are used again


def begin_start() -> None:
    """Create the mark of this rank. Without an agent, or on a full disk, there is none, and no agent ends the rank."""
    if folder_note := os.environ.get("TINYTRAIN_AGENT"):
        mark = _mark(Path(folder_note), os.getpid())
        with contextlib.suppress(OSError):
            mark.touch()
            _own_mark.append(mark)


def claim(folder_note: Path, pid: int) -> bool:
    """Remove the mark of a rank for its agent; return whether it was there. folder_note: TINYTRAIN_AGENT."""
    try:
        _mark(folder_note, pid).unlink()
    except OSError:
        return False
    return True


def leave_start() -> None:
    """End the start of this rank. Does not return if its agent ends the rank, because of a stop request."""
    while _own_mark:
        mark = _own_mark.pop()
        try:
            mark.unlink()
        except FileNotFoundError:
            while mark.parent.is_dir():  # else the folder was removed, and not the mark
                time.sleep(1.0)  # the agent is about to kill this process
        except OSError:
            continue  # the agent cannot remove it either
