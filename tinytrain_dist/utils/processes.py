"""Tell processes apart. Must not know what they do."""

from __future__ import annotations

import os
from pathlib import Path


def process_start_time(pid: int) -> str | None:
    """Return when a process of this host started, in the kernel's units; None if there is no such process.

    The time distinguishes the process from a later one with the same ID. Without /proc, the result is "running" for
    every process.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
        return "running"
    except (ProcessLookupError, PermissionError):
        return None
