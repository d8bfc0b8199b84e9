"""Collect requests to stop the run: signals, a stop file and a deadline.

Nothing is stopped here: the training loop asks for the reason to stop, and all ranks decide together. Must not know
torch or ranks, because the signal handlers are installed before torch is imported.

A signal that a program was started to ignore stays ignored, in every program of this project. `nohup` relies on that
for SIGHUP, and shells for SIGINT and SIGQUIT of a job in the background.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType

from tinytrain_dist.config.run_folder import STOP_FILE
from tinytrain_dist.reliability.world import REGROUP_REASON, regroup_requested, stop_reason_of_agent

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
EXIT_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # of a verb; Python turns SIGINT into KeyboardInterrupt
FILE_CHECK_SECONDS = 1.0  # between two checks for the stop file

# The names of the stop signals that this process received. This is a global variable, because a signal handler belongs
# to the process and cannot be given an object. Only the first signal counts: the run is already stopping because of it.
_received_signals: list[str] = []


def handle_unless_ignored(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> None:
    """Install a handler for signals, except for those that this process was started to ignore.

    SIGUSR1 is handled in any case: only this project sends it, and what starts a rank ignores
    it until Python handles it.
    """
    for number in numbers:
        if number == signal.SIGUSR1 or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
    unblock_stop_signals()


def block_stop_signals() -> None:
    """Keep stop signals back until the program that this process becomes has installed its handlers.

    Python takes tenths of a second to start. A signal in that time would kill the program, or print a traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def unblock_stop_signals() -> None:
    """Undo `block_stop_signals`. What was kept back is delivered."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _note_signal(number: int, _: FrameType | None) -> None:
    _received_signals.append(signal.Signals(number).name)


def install_signal_handlers() -> None:
    """Let the stop signals only set a flag. Call this at the very top of a program."""
    handle_unless_ignored(STOP_SIGNALS, _note_signal)


def _exit(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def exit_on_stop_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit in this block, so that a verb removes what it has half written."""
    former = {number: signal.getsignal(number) for number in EXIT_SIGNALS}
    handle_unless_ignored(EXIT_SIGNALS, _exit)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def received_signal() -> str:
    """Return the name of the first stop signal; "" if there is none.

    This may be a signal that the agent received before this process started.
    """
    return _received_signals[0] if _received_signals else os.environ.get("TINYTRAIN_STOP", "")


def signals_received() -> int:
    """Return how many stop signals this process has received."""
    return len(_received_signals)


class StopRequests:
    """Why this process wants to stop: a signal, a file named `stop` in the run folder, or the time limit."""

    def __init__(self, folder: Path, time_limit: float | None, check_file: bool, since: float | None = None) -> None:
        """Begin to watch for requests to stop the run in `folder`.

        time_limit: seconds after `since` (by time.monotonic(); None: now). check_file: whether this rank checks for the
        stop file, once a second; one rank is enough.

        A batch script sets TINYTRAIN_DEADLINE (seconds since 1970) to the end of its allocation. The earlier of the two
        limits counts.
        """
        self._file = folder / STOP_FILE
        self._check_file = check_file
        self._next_file_check = 0.0
        deadlines = []  # by time.monotonic()
        if time_limit:
            start = time.monotonic() if since is None else since
            deadlines.append(start + time_limit)
        self._allocation_end = math.inf
        if allocation_end := os.environ.get("TINYTRAIN_DEADLINE"):
            seconds_left = float(allocation_end) - time.time()
            self._allocation_end = time.monotonic() + seconds_left
            deadlines.append(self._allocation_end)
        self._deadline = min(deadlines, default=None)

    def seconds_to_allocation_end(self) -> float:
        """Return the seconds until the allocation of the job ends; infinite if that is not known."""
        return self._allocation_end - time.monotonic()

    def reason(self, reserve_seconds: float = 0.0) -> str:
        """Return why to stop, or "". reserve_seconds: how long before the deadline to stop, so that a save fits."""
        now = time.monotonic()
        if name := received_signal():
            return REGROUP_REASON if regroup_requested() else stop_reason_of_agent() or name
        if self._deadline is not None and now + reserve_seconds > self._deadline:
            return "time_limit"
        if self._check_file and now > self._next_file_check:
            self._next_file_check = now + FILE_CHECK_SECONDS
            if self._file.exists():
                return f"stop file {self._file}"
        return ""

    def clear(self) -> None:
        """Remove the stop file, so that the next start trains again. Only the rank that checks for it removes it."""
        if self._check_file:
            self._file.unlink(missing_ok=True)
