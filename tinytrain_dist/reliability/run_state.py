"""Write state.json, from which batch scripts read how a run ended, and know whether this process still owns the run.

Exit codes do not survive launchers, so the state is a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tinytrain_dist.config.run_folder import STATE_FILE
from tinytrain_dist.utils.atomic_files import read_json_object, write_atomically

_owned: dict[Path, Callable[[], bool]] = {}


def claim_run(folder: Path, taken: Callable[[], bool]) -> None:
    """Note that this process holds the run in `folder` from here on, until `taken` says that another one does."""
    _owned[folder] = taken
    if note := os.environ.get("TINYTRAIN_AGENT"):  # it says how a rank died that can no longer say it
        Path(note).write_text(str(folder.resolve()), encoding="utf-8")


def owns_run(folder: Path) -> bool:
    """Whether this process holds the run in `folder`, and may say how it ended."""
    return folder in _owned and not _owned[folder]()


def lost_run(folder: Path) -> bool:
    """Whether another process has taken the run that this one held: a node that was cut off may come back so."""
    return folder in _owned and _owned[folder]()


def write_state(folder: Path, state: str, step: int | None, reason: str = "") -> None:
    """Write state.json: running, done, preempted or failed, the step, and what asked for the stop.

    A batch script names its attempt in TINYTRAIN_ATTEMPT; with it a state that an earlier attempt left is told apart,
    and `first_step`, where the attempt began (restarts in place included), tells whether it has made a step.
    """
    values: dict[str, str | int | None] = {"state": state, "step": step}
    if reason:
        values["reason"] = reason
    if attempt := os.environ.get("TINYTRAIN_ATTEMPT"):
        before = read_json_object(folder / STATE_FILE)
        first = before.get("first_step") if before.get("attempt") == attempt else step
        values |= {"attempt": attempt, "first_step": first}
    write_atomically(folder / STATE_FILE, values)
