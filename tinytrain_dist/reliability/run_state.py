"""Write state.json, which tells batch scripts how a run ended, and track whether this process still owns it.

The state is a file, because launchers do not pass exit codes on. Must not know torch or ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from tinytrain_dist.config.run_folder import STATE_FILE
from tinytrain_dist.utils.atomic_files import read_json_object, write_atomically

# The run folders that this process has claimed, each with a function that returns whether another process has taken the
# run over since. This is a global variable, because the watchdog and the error handler need it even if building the
# trainer has failed.
_claimed_runs: dict[Path, Callable[[], bool]] = {}


def claim_run(folder: Path, taken_over: Callable[[], bool]) -> None:
    """Record that from now on this process owns the run in `folder`, until `taken_over` returns True."""
    _claimed_runs[folder] = taken_over
    if note := os.environ.get("TINYTRAIN_AGENT"):
        # the agent needs the folder to report a rank that was killed
        Path(note).write_text(str(folder.resolve()), encoding="utf-8")


def owns_run(folder: Path) -> bool:
    """Return whether this process owns the run in `folder`, and so may write how it ended."""
    return folder in _claimed_runs and not _claimed_runs[folder]()


def lost_run(folder: Path) -> bool:
    """Return whether another process has taken over a run of this one. Happens when a partitioned node reconnects."""
    return folder in _claimed_runs and _claimed_runs[folder]()


def ended_within(folder: Path, seconds: float) -> bool:
    """Return whether a run has written within the last seconds that it is done or preempted, so all is saved."""
    try:
        age = time.time() - (folder / STATE_FILE).stat().st_mtime
    except OSError:
        return False
    return age <= seconds and has_saved_and_ended(folder)


def has_saved_and_ended(folder: Path) -> bool:
    """Return whether a run has written that it is done or preempted, so all is saved."""
    return read_json_object(folder / STATE_FILE).get("state") in ("done", "preempted")


def write_state(folder: Path, state: str, step: int | None, reason: str = "") -> None:
    """Write state.json. state: running, done, preempted or failed; reason: what requested the stop.

    If a batch script has set TINYTRAIN_ATTEMPT, two more values are written:

    - `attempt`: distinguishes this state from one that an earlier attempt left
    - `first_step`: the step at which the attempt began, before any restart in place; shows whether it made progress
    """
    values: dict[str, str | int | None] = {"state": state, "step": step}
    if reason:
        values["reason"] = reason
    if attempt := os.environ.get("TINYTRAIN_ATTEMPT"):
        previous = read_json_object(folder / STATE_FILE)
        same_attempt = previous.get("attempt") == attempt
        values["attempt"] = attempt
        values["first_step"] = previous.get("first_step") if same_attempt else step
    write_atomically(folder / STATE_FILE, values)
