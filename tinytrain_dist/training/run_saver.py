"""Start the saves of a run, and report how each of them ended.

A full disk ends a save but not the run, unless it is the last save. Must not know when a save is due.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.async_save import SaveThread
from tinytrain_dist.checkpoint.manager import CheckpointManager
from tinytrain_dist.errors import CheckpointError, ReplicaMismatchError
from tinytrain_dist.metrics.phase_timer import PhaseTimer
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.reliability.run_state import owns_run, write_state
from tinytrain_dist.utils.progress import LINE_SECONDS

COPY_POLL_SECONDS = 1.0  # between two looks at the copies, at the end of a run
# The wait for copies ends so long before the end of a job's allocation. The batch script may still have to requeue it.
ALLOCATION_RESERVE_SECONDS = 30.0


class RunSaver:
    """Save one run. At most one save is in progress at a time."""

    def __init__(self, checkpoints: CheckpointManager, log: RunLog, phase_timer: PhaseTimer, saved_step: int) -> None:
        """Prepare to save. saved_step: the step of the checkpoint that the run resumed from, -1 without one."""
        self.checkpoints = checkpoints
        self.log = log
        self.phase_timer = phase_timer
        self.saved_step = saved_step
        self.saving_seconds = 0.0  # of the newest save
        self.failed_saves = 0

    def save(self, step: int, record: dict[str, Any], last: bool = False, sound_step: int | None = None) -> None:
        """Start to save the state after `step` steps, once the previous save has ended. A collective.

        A state that is not finite is never written. record: goes into trainer_state.json. last: whether this is the
        last step of the run. sound_step: the newest checkpoint up to this step stays.
        """
        self.phase_timer.enter("checkpoint")
        self.collect(step, wait=True)
        self.checkpoints.save(step, record, last, sound_step)
        if not self.checkpoints.config.ckpt_async:
            self.collect(step, wait=True)

    def collect(self, step: int, wait: bool = False, last: bool = False) -> None:
        """Report a save that has ended since the last call. wait: first wait for a save in progress.

        step: the current step, for messages. last: the save cannot be repeated, so a full disk is an error.
        Errors: CheckpointError if the last save failed; any other error that ended a save, such as
        ReplicaMismatchError.
        """
        if wait:
            self.phase_timer.enter("checkpoint")
            pending = self.checkpoints.pending
            if pending is not None and pending.is_alive():
                self.log.say(f"step {step}: waiting for the save of step {pending.step} to end")
        self._report_copies()
        save = self.checkpoints.collect(wait)
        if save is None:
            return
        self.saving_seconds = save.seconds
        if save.error is None:
            self._report_saved(save)
        elif isinstance(save.error, OSError):
            self._report_disk_error(save, save.error, last)
        else:
            kind = "replicas_differ" if isinstance(save.error, ReplicaMismatchError) else "save_failed"
            self.log.event(save.step, kind, str(save.error))
            self.log.flush()
            raise save.error
        self.log.flush()

    def say_held(self, step: int) -> None:
        """Say that this step is not saved, because updates are being skipped."""
        saved = self.saved_step
        newest = f"the newest checkpoint is {self.checkpoints.folder(saved)}" if saved >= 0 else "there is none yet"
        self.log.say(f"step {step}: not saved while updates are skipped; {newest}")

    def _report_copies(self) -> None:
        """Log what was copied since the last call, and what failed."""
        copier = self.checkpoints.copier
        for news in copier.take_news() if copier is not None else ():
            self.log.event(news.step, news.kind, news.text)

    def finish_copies(self, seconds_left: Callable[[], float], interrupted: Callable[[], bool]) -> None:
        """Wait for the last copies, at most `copies_end_limit` seconds. A collective: all ranks end together.

        What is not copied is copied at the next start. seconds_left: until the allocation of the job ends. interrupted:
        whether someone asks for the end again.
        """
        config, copier = self.checkpoints.config, self.checkpoints.copier
        if config.checkpoint_copies is None:
            return
        if copier is not None:
            copier.end()
        started = time.monotonic()
        last_line = started - LINE_SECONDS  # the first line comes after COPY_POLL_SECONDS
        waits = True
        while waits:
            self.phase_timer.enter("checkpoint")
            now = time.monotonic()
            if copier is not None:
                limit = min(config.copies_end_limit, now - started + seconds_left() - ALLOCATION_RESERVE_SECONDS)
                copier.join(min(COPY_POLL_SECONDS, max(0.0, limit)))
                waits = copier.is_alive() and now - started < limit and not interrupted()
                if waits and now - last_line >= LINE_SECONDS:
                    last_line = now
                    left = f"waiting {max(0.0, limit - now + started):.0f} s more at most; Ctrl-C ends the wait"
                    self.log.say(f"{copier.progress()}; {left}")
            waits = self.checkpoints.context.broadcast_object(waits)
        if copier is not None:
            late = copier.is_alive()
            copier.give_up()
            copier.join(COPY_POLL_SECONDS)
            self._report_copies()
            if late:
                self.log.say("the last checkpoint was not copied; the next start of this run copies it")

    def _report_saved(self, save: SaveThread) -> None:
        self.saved_step = save.step
        folder = Path(self.checkpoints.config.target_dir)
        with contextlib.suppress(OSError):  # if the run is killed later, state.json still has its last saved step
            if self.checkpoints.context.is_main and owns_run(folder):
                write_state(folder, "running", save.step)
        path = self.checkpoints.folder(save.step)
        self.log.event(save.step, "saved", f"saved {path} ({save.seconds:.1f} s)")

    def _report_disk_error(self, save: SaveThread, error: OSError, last: bool) -> None:
        if last:
            path = self.checkpoints.folder(save.step)
            raise CheckpointError(f"{path}: could not be saved ({error}); make room or fix the disk, then resume")
        self.failed_saves += 1
        text = (
            f"SAVE FAILED ({error}); failed saves so far: {self.failed_saves}. The last good checkpoint is kept. "
            "Training continues, and the next save is at the next multiple of ckpt_every"
        )
        self.log.event(save.step, "save_failed", text)
