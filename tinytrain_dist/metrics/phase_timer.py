"""Track the current phase of a process: its name, when it began, and at which step.

Must not know torch, ranks or what happens in a phase. The trainer enters the phases; other modules read or record them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

# The names of all phases, in the order in which a process goes through them.
EARLIER_PHASES = ("launch", "imports")  # before there is a PhaseTimer, see reliability/start_times.py
# A process that ends in one of these loses no training.
START_PHASES = ("join", "open_data", "compiler", "build", "load")
UPDATE_PHASES = ("data", "forward_backward", "reduction", "optimizer")  # of one optimizer step
BETWEEN_PHASES = ("reading", "evaluation", "checkpoint")  # after a step is complete, before the next one begins
STEP_PHASES = (*UPDATE_PHASES, *BETWEEN_PHASES)  # the phases in the records of a run
# Between two increases of its number of completed steps, a rank goes through the phases in this order.
PHASE_ORDER = (*START_PHASES, *BETWEEN_PHASES, *UPDATE_PHASES)


class PhaseTimer:
    """Measure the time in each phase.

    On a GPU, this is the time to queue the work of the phase; on a CPU, the time to do it.
    """

    def __init__(
        self,
        phase: str = "start",
        step: int = 0,
        clock: Callable[[], float] = time.monotonic,
        earlier: Mapping[str, float] | None = None,
    ) -> None:
        """Begin in `phase` after `step` completed steps.

        clock: returns seconds, monotonic. earlier: seconds in phases before this one, for the first `take`.
        """
        self._clock = clock
        self.phase = phase
        self.step = step  # completed optimizer steps
        self.since = clock()  # when the current phase began
        self.follower: Callable[[str, int], None] | None = None  # called with each new phase and its step
        self._seconds: dict[str, float] = dict(earlier or {})  # by phase, since the last `take`

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


def start_seconds(phases: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each part of a start: its phases in their order, then all of the first step.

    phases: what the first `take` returned, at the end of the first step. The parts add up to the time since the start
    of the launcher, or of the process if no launcher started it.
    """
    parts = {phase: phases[phase] for phase in (*EARLIER_PHASES, *START_PHASES) if phase in phases}
    return {**parts, "first_step": sum(phases.values()) - sum(parts.values())}
