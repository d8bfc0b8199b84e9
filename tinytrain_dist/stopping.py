"""Owns the wish to stop: signals, a stop file and a deadline raise a flag here, and nothing else happens.

Must not know torch or ranks: handlers are installed before torch is imported, and the loop decides with all ranks.
Also owns state.json, in which a batch script reads how the run ended: exit codes do not survive launchers.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from tinytrain_dist.files import read_object, write_atomically

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_received: list[str] = []
_owned: dict[Path, Callable[[], bool]] = {}
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


def own(folder: Path, taken: Callable[[], bool]) -> None:
    """Note that this process holds the run in `folder` from here on, until `taken` says that another one does."""
    _owned[folder] = taken
    if note := os.environ.get("TINYTRAIN_AGENT"):  # it says how a rank died that can no longer say it
        Path(note).write_text(str(folder.resolve()), encoding="utf-8")


def owns(folder: Path) -> bool:
    """Whether this process holds the run in `folder`, and may say how it ended."""
    return folder in _owned and not _owned[folder]()


def lost(folder: Path) -> bool:
    """Whether another process has taken the run that this one held: a node that was cut off may come back so."""
    return folder in _owned and _owned[folder]()


def write_state(folder: Path, state: str, step: int | None, reason: str = "") -> None:
    """Write state.json: running, done, preempted or failed, the step, and what asked for the stop.

    A batch script names its attempt in TINYTRAIN_ATTEMPT; with it a state that an earlier attempt left is told apart,
    and `first_step`, where the attempt began (restarts in place included), tells whether it has made a step.
    """
    values: dict[str, str | int | None] = {"state": state, "step": step}
    if reason:
        values["reason"] = reason
    if attempt := os.environ.get("TINYTRAIN_ATTEMPT"):
        before = read_object(folder / "state.json")
        first = before.get("first_step") if before.get("attempt") == attempt else step
        values |= {"attempt": attempt, "first_step": first}
    write_atomically(folder / "state.json", values)


class StopRequests:
    """Says why this process wants to stop: a signal, a file named `stop` in the run folder, or the time limit."""

    def __init__(self, folder: Path, time_limit: float | None, look_at_file: bool, since: float | None = None) -> None:
        """time_limit: seconds after `since` (None: now). The file is looked at once a second, by one rank only.

        A batch script says in TINYTRAIN_DEADLINE (seconds since 1970) when its allocation ends; the earlier one counts.
        """
        self._file, self._look = folder / "stop", look_at_file
        limits = [(time.monotonic() if since is None else since) + time_limit] if time_limit else []
        if ends := os.environ.get("TINYTRAIN_DEADLINE"):
            limits.append(time.monotonic() + float(ends) - time.time())
        self._deadline = min(limits, default=None)
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
