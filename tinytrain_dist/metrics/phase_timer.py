"""Time the phases of a process: which phase it is in, since when, at which step.

Must not know torch, ranks or what a phase means: the trainer names the phases, others read or record them.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class PhaseTimer:
    """The phase in progress. On a GPU a phase is the time to queue its work, on a CPU the time to do it."""

    def __init__(self, phase: str = "start", step: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds, monotonic."""
        self._clock = clock
        self.phase, self.step, self.since = phase, step, clock()
        self.follower: Callable[[str, int], None] | None = None  # called with each phase and the steps completed
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str, step: int | None = None) -> None:
        """End the present phase and begin another one."""
        now = self._clock()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now
        if step is not None:
            self.step = step
        if self.follower is not None:
            self.follower(phase, self.step)

    def take(self) -> dict[str, float]:
        """Return the seconds in each phase since the last call, including the phase in progress."""
        self.enter(self.phase)
        seconds, self._seconds = self._seconds, {}
        return seconds
