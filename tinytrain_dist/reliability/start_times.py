"""Say when this process began to be a rank, and what it has done since: its launcher's start, and its own imports.

A process that has waited as a standby (launch/standby_rank.py) begins when it gets its rank. Must not know torch.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from tinytrain_dist.utils.processes import process_age

_imported = time.monotonic()  # soon after the start of the process, for systems that do not show its age
_called_up: list[float] = []  # of a standby: when it got its rank, by time.monotonic()


def begin_as_rank() -> None:
    """Note that this process begins to be a rank now, and not when it was started."""
    _called_up[:] = [time.monotonic()]


def rank_start() -> float:
    """Return when this process began to be a rank, by time.monotonic(): when it was started, or called up."""
    if _called_up:
        return _called_up[0]
    age = process_age(os.getpid())
    return time.monotonic() - age if math.isfinite(age) else _imported


def earlier_seconds() -> dict[str, float]:
    """Return the seconds of the phases of this start that are over; call this when all modules are imported.

    * `launch`: from the start of the launcher to that of this rank. Only in the first start of a launcher,
      which may be torchrun: after a restart in place its age would count training.
    * `imports`: from the start of this rank until now. The interpreter starts, reads settings and imports torch.

    A phase is left out where the system does not show it.
    """
    age = time.monotonic() - rank_start()
    seconds = {"imports": age}
    if _is_first_start():
        seconds = {"launch": process_age(os.getppid()) - age, **seconds}
    return {phase: value for phase, value in seconds.items() if math.isfinite(value)}


def _is_first_start() -> bool:
    """Return whether this process is among the first that its launcher has started."""
    if folder_note := os.environ.get("TINYTRAIN_AGENT"):
        return not Path(folder_note).exists()  # written when all ranks have joined
    return os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
