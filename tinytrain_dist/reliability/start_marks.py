"""Let an agent end ranks that hang in their start, and never one that may have something to save.

Each rank that ends its start creates a mark: an empty file in the folder of its agent. An agent that wants to end a
rank creates the same mark. Only one of them can create it, so the agent and the rank cannot both go ahead. Must not
know torch, or what happens in a start.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from tinytrain_dist.reliability.run_lock import process_start_time


def create_mark(note: Path, pid: int) -> bool:
    """Create the mark of a rank; return whether it did not exist before. note: TINYTRAIN_AGENT. Errors: OSError."""
    mark = note.with_name(f"started-{pid}-{process_start_time(pid)}")  # process IDs are used again
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def leave_start() -> None:
    """End the start of this rank. Does not return if its agent has decided to end it, because of a stop request."""
    note = os.environ.get("TINYTRAIN_AGENT")
    if not note:
        return
    try:
        may_continue = create_mark(Path(note), os.getpid())
    except OSError:  # the folder is gone; the agent cannot create a mark in it either
        return
    while not may_continue:
        time.sleep(1.0)  # the agent is about to kill this process
