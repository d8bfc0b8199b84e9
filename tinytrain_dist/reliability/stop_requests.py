"""Collect requests to stop: signals, a stop file and a deadline set a flag here, and nothing else happens.

Must not know torch or ranks: handlers are installed before torch is imported, and the loop decides with all ranks.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from tinytrain_dist.config.run_folder import STOP_FILE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_received: list[str] = []
PROCESS_START = time.monotonic()  # about when the process began: this is imported first


def _remember(number: int, _: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)  # a second signal changes nothing: the first is being obeyed


def install_signal_handlers() -> None:
    """Let SIGTERM, SIGINT and SIGUSR1 only raise the flag. Call it at the very top of a program."""
    for number in STOP_SIGNALS:
        signal.signal(number, _remember)


def received_signal() -> str:
    """Return the first stop signal by name, also one that the agent received before this process; "" if none."""
    return _received[0] if _received else os.environ.get("TINYTRAIN_STOP", "")


class StopRequests:
    """Says why this process wants to stop: a signal, a file named `stop` in the run folder, or the time limit."""

    def __init__(self, folder: Path, time_limit: float | None, look_at_file: bool, since: float | None = None) -> None:
        """time_limit: seconds after `since` (None: now). The file is looked at once a second, by one rank only.

        A batch script says in TINYTRAIN_DEADLINE (seconds since 1970) when its allocation ends; the earlier one counts.
        """
        self._file, self._look = folder / STOP_FILE, look_at_file
        limits = [(time.monotonic() if since is None else since) + time_limit] if time_limit else []
        if ends := os.environ.get("TINYTRAIN_DEADLINE"):
            limits.append(time.monotonic() + float(ends) - time.time())
        self._deadline = min(limits, default=None)
        self._next_look = 0.0

    def reason(self, reserve_seconds: float = 0.0) -> str:
        """Return why to stop, or ""; `reserve_seconds` (the time of a save) are kept before the deadline."""
        now = time.monotonic()
        if name := received_signal():
            return name
        if self._deadline is not None and now + reserve_seconds > self._deadline:
            return "time_limit"
        if self._look and now > self._next_look:
            self._next_look = now + 1.0
            if self._file.exists():
                return f"stop file {self._file}"
        return ""

    def obeyed(self) -> None:
        """Remove the stop file, so that the next start trains on; called by the rank that looks at it."""
        if self._look:
            self._file.unlink(missing_ok=True)
