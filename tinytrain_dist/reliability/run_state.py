"""Write state.json, from which batch scripts read how a run ended, and know whether this process still owns the run.

Exit codes do not survive launchers, so the state is a file. Must not know torch or ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tinytrain_dist.config.run_folder import STATE_FILE
from tinytrain_dist.utils.atomic_files import read_json_object, write_atomically

# The runs that this process has claimed, by folder, each with a function that returns whether another process has taken
# the run over since. It is state of the process, because the watchdog and the error handler must know it even if
# building the trainer has failed.
_claimed_runs: dict[Path, Callable[[], bool]] = {}


def claim_run(folder: Path, taken_over: Callable[[], bool]) -> None:
    """Note that this process owns the run in `folder` from now on, until `taken_over` returns that another one does."""
    _claimed_runs[folder] = taken_over
    if note := os.environ.get("TINYTRAIN_AGENT"):
        # with the folder the agent can report the death of a rank that cannot report it any more
        Path(note).write_text(str(folder.resolve()), encoding="utf-8")


def owns_run(folder: Path) -> bool:
    """Return whether this process owns the run in `folder`, and so may write how it ended."""
    return folder in _claimed_runs and not _claimed_runs[folder]()


def lost_run(folder: Path) -> bool:
    """Return whether another process has taken over a run of this one; happens when a partitioned node reconnects."""
    return folder in _claimed_runs and _claimed_runs[folder]()


def write_state(folder: Path, state: str, step: int | None, reason: str = "") -> None:
    """Write state.json. state: running, done, preempted or failed; reason: what asked for the stop.

    A batch script names its attempt in TINYTRAIN_ATTEMPT. Two more values are then written:

    - `attempt`: tells this state from one that an earlier attempt left
    - `first_step`: the step at which the attempt began, restarts in place included; shows whether it made progress
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
