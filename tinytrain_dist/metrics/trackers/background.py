"""Run a tracker so that it cannot disturb training: in its own thread, behind a bounded queue.

Must not know what is sent. `DirectSink` calls a tracker at once, `BackgroundSink` in a thread. A tracker that raises,
blocks or is slow costs points. It is reported once, and the lost points are counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tinytrain_dist.metrics.trackers.base import Status, TrackedRun, Tracker
from tinytrain_dist.utils.text import first_line

QUEUE_SIZE = 1000  # calls; a logged step is two
# Before step 1, how long to wait for all trackers together. The start of a tracker computes for seconds, for example
# when MLflow makes its database, and would slow down the first steps of this rank.
START_SECONDS = 10.0
UNRESPONSIVE_SECONDS = 60.0  # a call that takes longer is reported
# At the end, how long to wait for all trackers together. A run that was asked to stop may be killed soon.
FINISH_SECONDS: dict[Status, float] = {"finished": 60.0, "stopped": 10.0, "failed": 5.0}
CLONE_FS = 0x200  # of Linux: what threads share of the file system, such as the current folder

Call = Callable[[Tracker], object]


class Sink(Protocol):
    """A tracker as the run log uses it. The run log calls all methods in the thread that trains."""

    name: str  # as in the setting `trackers`

    def wait_started(self, deadline: float) -> None:
        """Wait until the tracker has started or failed to, or until `deadline` by time.monotonic()."""

    def send(self, call: Call) -> None:
        """Let the tracker do `call`."""

    def flush(self) -> None:
        """Let the tracker write what is still in memory."""

    def end(self, status: Status) -> None:
        """Ask the tracker to end."""

    def has_ended(self, deadline: float) -> bool:
        """Wait until the tracker has ended, or until `deadline` by time.monotonic(); return whether it has."""

    def report_end(self) -> None:
        """Note the points that were lost."""

    def lines(self) -> list[str]:
        """Return what the tracker wants to print since the last call."""

    def warnings(self) -> list[str]:
        """Return the problems to report since the last call."""


class DirectSink:
    """Call a tracker at once, in the thread that trains.

    This is for TensorBoard. It writes to files beside metrics.jsonl, in a thread of its own library, so another queue
    would only add a place where points can be lost. Errors of the disk are the caller's.
    """

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun) -> None:
        """Start the tracker. name: as in the setting `trackers`."""
        self.name = name
        self._tracker = tracker
        tracker.start(run)

    def wait_started(self, deadline: float) -> None:
        """Do nothing: the tracker has started."""

    def send(self, call: Call) -> None:
        """Let the tracker do `call` now. Errors: those of the call."""
        call(self._tracker)

    def flush(self) -> None:
        """Let the tracker write what is still in memory."""
        self._tracker.flush()

    def end(self, status: Status) -> None:
        """End the tracker."""
        self._tracker.finish(status)

    def has_ended(self, deadline: float) -> bool:
        """Return True: `end` has waited."""
        return True

    def report_end(self) -> None:
        """Do nothing: no point is lost without an error."""

    def lines(self) -> list[str]:
        """Return nothing."""
        return []

    def warnings(self) -> list[str]:
        """Return nothing: errors are raised."""
        return []


class BackgroundSink:
    """Call a tracker in a thread, in the order of `send`. Only `wait_started` and `has_ended` wait."""

    def __init__(self, name: str, create: Callable[[], Tracker], run: TrackedRun) -> None:
        """Begin to create and start the tracker, in the thread. name: as in the setting `trackers`."""
        self.name = name
        self._create = create
        self._tracker = Tracker()  # until `_start` has created it
        self._run = run
        self._changed = threading.Condition()  # guards what is below, except _busy_since; no call is made under it
        self._waiting: deque[Call] = deque()
        self._ending: Status | None = None  # set by `end`
        self._started = threading.Event()  # or failed to
        self._usable = True  # False if the tracker did not start
        self._finish_status: Status = "finished"
        self._busy_since: float | None = None  # by time.monotonic(): when the call in progress began
        self._lost = 0  # calls that raised, or did not fit into the queue
        self._lines: list[str] = []
        self._warnings: list[str] = []
        self._problem_reported = False
        self._folder: str | None = None  # to return to after each call; None: not needed
        # A daemon, so that a tracker that blocks for ever cannot keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def wait_started(self, deadline: float) -> None:
        """Wait until the tracker has started or failed to, or until `deadline` by time.monotonic()."""
        self._started.wait(max(0.0, deadline - time.monotonic()))

    def send(self, call: Call) -> None:
        """Put a call into the queue, or drop it if the queue is full."""
        with self._changed:
            busy_since = self._busy_since  # read once, because the thread sets it to None at any time
            if busy_since is not None and time.monotonic() - busy_since > UNRESPONSIVE_SECONDS:
                self._report(f"has not answered for {UNRESPONSIVE_SECONDS:g} s")
            if not self._usable:
                self._count_lost(call)
            elif len(self._waiting) >= QUEUE_SIZE:
                self._count_lost(call)
                self._report(f"is too slow: {QUEUE_SIZE} points wait for it, so new ones are dropped")
            else:
                self._waiting.append(call)
                self._changed.notify()

    def flush(self) -> None:
        """Let the tracker write what is still in memory, once it has done all earlier calls."""
        self.send(_flush)

    def end(self, status: Status) -> None:
        """Let the thread end after the calls in the queue."""
        with self._changed:
            self._ending = status
            self._changed.notify()

    def has_ended(self, deadline: float) -> bool:
        """Wait for the thread; return whether it has ended."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def report_end(self) -> None:
        """Report lost points."""
        with self._changed:
            if self._thread.is_alive():
                lost = self._lost + len(self._waiting) + 1  # and the call in progress
                self._warnings.append(f"tracker {self.name}: did not end in time; points that it may have lost: {lost}")
            elif self._lost:
                self._warnings.append(f"tracker {self.name}: points lost: {self._lost}; metrics.jsonl has all of them")

    def lines(self) -> list[str]:
        """Return what the tracker wants to print since the last call."""
        with self._changed:
            taken, self._lines = self._lines, []
        return taken

    def warnings(self) -> list[str]:
        """Return the problems to report since the last call."""
        with self._changed:
            taken, self._warnings = self._warnings, []
        return taken

    def _work(self) -> None:
        """Start the tracker, do the calls, and finish it. This is the body of the thread."""
        self._folder = None if have_own_current_folder() else os.getcwd()
        started = self._do(self._start)
        with self._changed:
            if not started:
                self._usable = False
                self._lost += len(self._waiting)
                self._waiting.clear()
        self._started.set()
        if not started:
            return
        while (call := self._next()) is not None:
            self._do(call)
        status = self._ending or "finished"
        self._finish_status = status
        self._do(self._finish)

    def _next(self) -> Call | None:
        """Wait for the next call; None if the tracker is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending is not None)
            return self._waiting.popleft() if self._waiting else None

    def _start(self, _: Tracker) -> None:
        self._tracker = self._create()
        self._run.folder.mkdir(parents=True, exist_ok=True)
        line = self._tracker.start(self._run)
        if line:
            with self._changed:
                self._lines.append(f"tracker {self.name}: {line}")

    def _finish(self, tracker: Tracker) -> None:
        tracker.finish(self._finish_status)

    def _count_lost(self, call: Call) -> None:
        """Count a call that was not done, if it carries something to record. Called with the lock held."""
        if call not in (_flush, self._start, self._finish):
            self._lost += 1

    def _do(self, call: Call) -> bool:
        """Do a call; return whether it worked."""
        self._busy_since = time.monotonic()
        try:
            call(self._tracker)
        except BaseException as error:  # a library that calls sys.exit must not end the thread
            with self._changed:
                self._count_lost(call)
                self._report(f"failed ({type(error).__name__}: {first_line(error)})")
            return False
        finally:
            self._busy_since = None
            if self._folder is not None:
                with contextlib.suppress(OSError):
                    os.chdir(self._folder)
        return True

    def _report(self, problem: str) -> None:
        """Report the first problem; the others are only counted. The caller holds the lock."""
        if not self._problem_reported:
            self._problem_reported = True
            self._warnings.append(
                f"tracker {self.name}: {problem}; training continues, and metrics.jsonl has all points"
            )


def have_own_current_folder() -> bool:
    """Give the calling thread a current folder of its own; return whether that is possible here.

    A tracker may call os.chdir. Training has relative paths, such as that of the run folder.
    """
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).unshare(CLONE_FS) == 0)  # os.unshare needs Python 3.12; containers may forbid it


def _flush(tracker: Tracker) -> None:
    tracker.flush()
