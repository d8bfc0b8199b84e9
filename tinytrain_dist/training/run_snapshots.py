"""Decide when a run takes a snapshot, and report how snapshots ended. Must not know where they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tinytrain_dist.checkpoint.snapshots.keeper import SnapshotKeeper, SnapshotResult
from tinytrain_dist.metrics.phase_timer import PhaseTimer
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.metrics.step_metrics import StepMetrics, due
from tinytrain_dist.utils.text import format_bytes

INTERVAL_SECONDS = 30.0  # between snapshots, if snapshot_every is not set
WORK_SHARE = 0.05  # of the time that the work in the background may take, which makes the interval longer


class RunSnapshots:
    """The snapshots of one run on this rank; with keeper = None it takes none."""

    def __init__(
        self, keeper: SnapshotKeeper | None, every: int | None, metrics: StepMetrics, log: RunLog, timer: PhaseTimer
    ) -> None:
        """every: the steps between snapshots; None: by time."""
        self._keeper = keeper
        self._every = every
        self._metrics = metrics
        self._log = log
        self._phase_timer = timer
        self._interval = INTERVAL_SECONDS
        self._taken_at = time.monotonic()
        self._described = False
        if keeper is not None:
            self._bytes = keeper.bytes_per_node

    def votes(self) -> tuple[bool, ...]:
        """Return this rank's votes for the next step: whether it is time, by the clock of rank 0, and whether not now.

        Clocks differ, so only one rank's counts.
        """
        if self._keeper is None:
            return ()
        is_time = self._log.main and time.monotonic() - self._taken_at >= self._interval
        return is_time, self._keeper.busy

    def after_step(self, step: int, record: Callable[[], dict[str, Any]]) -> None:
        """Take a snapshot of this step's state if one is due. A collective. record: as in a checkpoint, when asked."""
        keeper = self._keeper
        if keeper is None:
            return
        self._report(keeper.take_result())
        if self._every is not None:
            if not due(step, self._every):
                return
            self._metrics.settle()
        is_time, is_busy = self._metrics.take_other_votes() or (False, True)
        if is_busy or not (is_time or self._every is not None):
            return
        self._metrics.settle()
        if self._metrics.stopping or self._metrics.skipping:
            return
        self._metrics.take_other_votes()  # this vote was before the snapshot
        self._phase_timer.enter("checkpoint")
        with self._metrics.watch.paused():
            keeper.take(step, record())
        self._taken_at = time.monotonic()

    def _report(self, result: SnapshotResult | None) -> None:
        if result is None:
            return
        self._interval = max(INTERVAL_SECONDS, result.seconds / WORK_SHARE)
        if result.problem:
            self._log.event(result.step, "snapshot_failed", f"the snapshot of step {result.step}: {result.problem}")
        elif not self._described:
            self._described = True
            often = f"every {self._every} steps" if self._every else f"about every {self._interval:.0f} s"
            text = f"first snapshot in memory ({result.seconds:.1f} s); {often}, {format_bytes(self._bytes)} per node"
            self._log.event(result.step, "snapshot", text)

    def close(self) -> None:
        """Delete the snapshots: the state is on disk, or the run has ended."""
        if self._keeper is not None:
            self._keeper.close()
