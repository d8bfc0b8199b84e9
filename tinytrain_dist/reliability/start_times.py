"""Measure what happened before this process could measure anything: its launcher's start, and its own imports."""

from __future__ import annotations

import math
import os
from pathlib import Path

from tinytrain_dist.utils.processes import process_age


def earlier_seconds() -> dict[str, float]:
    """Return the seconds of the phases of this start that are over; call this when all modules are imported.

    * `launch`: from the start of the launcher to the start of this process. Only in the first start of a launcher,
      which may be torchrun: after a restart in place its age would count training.
    * `imports`: from the start of this process until now. The interpreter starts, reads settings and imports torch.

    A phase is left out where the system does not show it.
    """
    age = process_age(os.getpid())
    seconds = {"imports": age}
    if _is_first_start():
        seconds = {"launch": process_age(os.getppid()) - age, **seconds}
    return {phase: value for phase, value in seconds.items() if math.isfinite(value)}


def _is_first_start() -> bool:
    """Return whether this process is among the first that its launcher has started."""
    if folder_note := os.environ.get("TINYTRAIN_AGENT"):
        return not Path(folder_note).exists()  # written when all ranks have joined
    return os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
