"""Measure how long a run did not train because its nodes changed, and end a run that keeps failing.

The agents write to the history of the run why the last world ended (reliability/restart_history.py). Must not know how
nodes are noticed to be lost.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tinytrain_dist.errors import TrainingError
from tinytrain_dist.metrics.phase_timer import start_seconds
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.reliability.restart_history import (
    Change,
    append_change,
    change_of,
    describe_parts,
    read_changes,
    why_over,
)
from tinytrain_dist.reliability.start_times import rank_start
from tinytrain_dist.reliability.world import World, own_world

TRAINING_PARTS = ("load", "first_step")


@dataclass(frozen=True)
class Recovery:
    """The change of nodes with which the world of this process began."""

    run: Path
    world: World
    change: Change

    @classmethod
    def begin(cls, run: Path) -> Recovery | None:
        """Return the change with which this world began; None for the first world, or if the run is not elastic.

        Errors: TrainingError if the run keeps failing, so that another try makes no sense.
        """
        world = own_world()
        if world is None:
            return None
        changes = read_changes(run)
        if reason := why_over(changes, world.session):
            raise TrainingError(reason)
        change = change_of(changes, world.session, world.round)
        return None if change is None else cls(run, world, change)

    @property
    def reason(self) -> str:
        """A sentence about why the last world ended."""
        return str(self.change.get("reason", ""))

    def report(self, log: RunLog, loaded_step: int, phases: Mapping[str, float]) -> None:
        """Record the parts of the time without training, after the first step. phases: of this process until then."""
        started = time.time() - (time.monotonic() - rank_start())
        own = start_seconds(phases)
        parts = {name: float(self.change.get(f"{name}_seconds") or 0.0) for name in ("detection", "stop", "rendezvous")}
        # `launch` is the age of the agent, which may have waited for this world
        before_load = sum(seconds for name, seconds in own.items() if name not in (*TRAINING_PARTS, "launch"))
        parts["start"] = max(0.0, started - self.world.ready) + before_load
        parts |= {name: own.get(name, 0.0) for name in TRAINING_PARTS}
        rounded = {name: round(seconds, 3) for name, seconds in parts.items()}
        step = self.change.get("trained_until", self.change.get("step"))
        repeated = max(0, step - loaded_step) if isinstance(step, int) else 0
        text = f"trained again {describe_parts(parts)}; {repeated} step(s) are repeated"
        values = {
            "recovery_seconds": rounded,
            "lost_seconds": round(sum(parts.values()), 3),
            "repeated_steps": repeated,
        }
        log.event(loaded_step + 1, "recovered", text, **values)
        about = {"session": self.world.session, "round": self.world.round, "time": time.time()}
        append_change(self.run, {"kind": "recovered", **about, **values, "loaded_step": loaded_step})
