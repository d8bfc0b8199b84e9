"""Tell processes apart, and raise limits of this one. Must not know what processes do."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from pathlib import Path


def process_start_time(pid: int) -> str | None:
    """Return when a process of this host started, in the kernel's units; None if there is no such process.

    The time distinguishes the process from a later one with the same ID. Where /proc does not show the process, the
    result is "running". A process that has ended and that its parent has not waited for (a zombie) counts as none.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:  # it belongs to another user, whose processes /proc may hide
        return "running"
    return "running"


def process_age(pid: int) -> float:
    """Return for how many seconds a process of this host has run; infinity where /proc does not show that."""
    try:
        ticks = int(process_start_time(pid) or "")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (ValueError, AttributeError, OSError):  # AttributeError: not on Linux
        return math.inf


def raise_open_file_limit() -> None:
    """Let this process, and those that it starts, have as many open files as the system administrator allows.

    A run on many ranks has two connections from each rank to each other one. The usual limit of 1,024 is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses an infinite limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def has_ended(pid: int, started: str | None) -> bool:
    """Return whether the process that had this ID and this start time on this host has ended."""
    current = process_start_time(pid)
    return current is None or (current != started and "running" not in (current, started))
