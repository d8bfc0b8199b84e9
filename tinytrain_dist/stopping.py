"""Owns the wish to stop: signals, a stop file and a deadline raise a flag here, and nothing else happens.

Must not know torch or ranks: handlers are installed before torch is imported, and the loop decides with all ranks.
Also owns state.json, in which a batch script reads how the run ended: exit codes do not survive launchers.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from tinytrain_dist.files import write_atomically

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_received: list[str] = []
_owned: list[Path] = []
STARTED = time.monotonic()  # about when the process began: this is imported first


def _remember(number: int, _: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)  # a second signal changes nothing: the first is being obeyed


def install_handlers() -> None:
    """Let SIGTERM, SIGINT and SIGUSR1 only raise the flag. Call it at the very top of a program."""
    for number in SIGNALS:
        signal.signal(number, _remember)


def received() -> str:
    """The first signal that came, by name, or that came to the agent before this process was there; "" if none."""
    return _received[0] if _received else os.environ.get("TINYTRAIN_STOP", "")


def own(folder: Path) -> None:
    """Note that this process holds the run in `folder` from here on."""
    _owned.append(folder)
    if note := os.environ.get("TINYTRAIN_AGENT"):  # it says how a rank died that can no longer say it
        Path(note).write_text(str(folder.resolve()), encoding="utf-8")


def owns(folder: Path) -> bool:
    """Whether this process holds the run in `folder`, and may say how it ended."""
    return folder in _owned


def write_state(folder: Path, state: str, step: int | None) -> None:
    """Write state.json: running, done, preempted or failed, and the step.

    A batch script names its attempt in TINYTRAIN_ATTEMPT; with it a state that an earlier attempt left is told apart.
    """
    values: dict[str, str | int | None] = {"state": state, "step": step}
    if attempt := os.environ.get("TINYTRAIN_ATTEMPT"):
        values["attempt"] = attempt
    write_atomically(folder / "state.json", values)


class StopRequests:
    """Says why this process wants to stop: a signal, a file named `stop` in the run folder, or the time limit."""

    def __init__(self, folder: Path, time_limit: float | None, look_at_file: bool, since: float | None = None) -> None:
        """time_limit: seconds after `since` (None: now). The file is looked at once a second, by one rank only."""
        self._file, self._look = folder / "stop", look_at_file
        self._deadline = (time.monotonic() if since is None else since) + time_limit if time_limit else None
        self._next_look = 0.0

    def reason(self, reserve_seconds: float = 0.0) -> str:
        """A few words, or "" to go on; `reserve_seconds` (what a save takes) are kept before the deadline."""
        now = time.monotonic()
        if name := received():
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
