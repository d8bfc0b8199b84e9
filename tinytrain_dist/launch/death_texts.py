"""Describe in a sentence how a process died."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path


def describe_death(process: str, exit_code: int, step: int | None, kills_before: int) -> str:
    """Return a sentence about how a process ended, with a remedy if memory may have run out."""
    text = f"{process} {describe_exit(exit_code)}"
    if exit_code > 0:
        text += ", without an error message"
    if step is not None:
        text += f", after step {step}"
    if exit_code == -signal.SIGKILL:
        text += "; the kernel does this when memory runs out; a smaller micro_batch_size needs less memory"
        kills = out_of_memory_kills() - kills_before
        if kills > 0:
            text += f" (it has killed {kills} process(es) for lack of memory since this run started)"
    return text


def describe_exit(exit_code: int) -> str:
    """Return how a process ended; negative codes are signals, as in subprocess."""
    return f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"


def out_of_memory_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory; 0 where it does not count them."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/vmstat").read_text().split("oom_kill ")[1].split()[0])
    return 0
