"""Track the current phase of a process: its name, when it began, and at which step.

Must not know torch, ranks or what happens in a phase. The trainer enters the phases; other modules read or record them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# The names of all phases, in the order in which a process goes through them.
START_PHASES = ("join", "open_data", "build", "load")  # a process that ends in one of these loses no training
UPDATE_PHASES = ("data", "forward_backward", "reduction", "optimizer")  # of one optimizer step
BETWEEN_PHASES = ("reading", "evaluation", "checkpoint")  # after a step is complete, before the next one begins
STEP_PHASES = (*UPDATE_PHASES, *BETWEEN_PHASES)  # the phases in the records of a run
# Between two increases of its number of completed steps, a rank goes through the phases in this order.
PHASE_ORDER = (*START_PHASES, *BETWEEN_PHASES, *UPDATE_PHASES)


class PhaseTimer:
    """Measure the time in each phase.

    On a GPU, this is the time to queue the work of the phase; on a CPU, the time to do it.
    """

    def __init__(self, phase: str = "start", step: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin in `phase` after `step` completed steps. clock: returns seconds, monotonic."""
        self._clock = clock
        self.phase = phase
        self.step = step  # completed optimizer steps
        self.since = clock()  # when the current phase began
        self.follower: Callable[[str, int], None] | None = None  # called with each new phase and its step
        self._seconds: dict[str, float] = {}  # by phase, since the last `take`

    def enter(self, phase: str, step: int | None = None) -> None:
        """End the current phase and begin another one. step: number of completed steps, if it has changed."""
        now = self._clock()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self.since
        self.phase = phase
        self.since = now
        if step is not None:
            self.step = step
        if self.follower is not None:
            self.follower(phase, self.step)

    def take(self) -> dict[str, float]:
        """Return the seconds in each phase since the last call, including the current phase."""
        self.enter(self.phase)
        seconds = self._seconds
        self._seconds = {}
        return seconds
