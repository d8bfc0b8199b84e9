"""What a rank does that the present world cannot use: it waits until the world changes or the run ends."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from tinytrain_dist.config.run_folder import STATE_FILE, STOP_FILE
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.reliability.run_state import has_saved_and_ended
from tinytrain_dist.reliability.start_marks import leave_start
from tinytrain_dist.reliability.stop_requests import received_signal
from tinytrain_dist.reliability.world import REGROUP_EXIT_CODE, regroup_requested

LOOK_SECONDS = 0.5


def wait_as_spare(config: TrainingConfig, why: str) -> NoReturn:
    """Wait, and exit when the agent asks for it, when the agent has ended or when the run has. why: a sentence."""
    print(f"tinytrain: this process waits as a spare: {why}", flush=True)
    agent = os.getppid()
    state = Path(config.target_dir) / STATE_FILE
    first_written = _written_at(state)
    asked = False
    leave_start()
    while True:
        time.sleep(LOOK_SECONDS)
        code: int | None = None
        if received_signal() and regroup_requested():
            code = REGROUP_EXIT_CODE
        elif os.getppid() != agent:
            code = 1
        elif _written_at(state) != first_written and has_saved_and_ended(state.parent):
            code = 0
        elif received_signal() and not asked:
            asked = True
            (state.parent / STOP_FILE).touch()  # a stop on one node stops all; the ranks that train see this file
        if code is not None:
            sys.stdout.flush()
            os._exit(code)


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
