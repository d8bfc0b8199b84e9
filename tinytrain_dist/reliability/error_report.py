"""Record why a run failed: error.json holds the first cause, in whatever order the ranks report.

Must not know torch or ranks. The first of two causes is:

- the one that is not `secondary`: an error that the failure of another rank has caused is secondary
- if that does not decide, the earlier one

This module also writes and reads the abort request, which ends a run on all its ranks. It is a file, because a rank
that waits in a collective for a dead rank cannot be reached in any other way.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path
from typing import Any

from tinytrain_dist.config.run_folder import ERROR_FILE, STATE_FILE, abort_file
from tinytrain_dist.reliability.run_state import write_state
from tinytrain_dist.utils.atomic_files import read_json_object, write_atomically
from tinytrain_dist.utils.json_files import is_number, to_json

ErrorRecord = dict[str, Any]  # message, rank, host, step, traceback, time (seconds since 1970), secondary
AbortRequest = dict[str, Any]  # world (the launch ID), message, hang, state
MAY_RETRY = "may_retry"  # in the file that torchrun reads, as the next one
FIRST_HAND = "first_hand"
NO_ERROR_MESSAGE = "the previous run ended without an error message: it was killed or its node was lost"


def write_error(folder: Path, cause: ErrorRecord) -> None:
    """Write error.json and state.json of the run in `folder`. Keeps an earlier cause. Ignores a full disk."""
    path = folder / ERROR_FILE
    with contextlib.suppress(OSError):
        known = read_json_object(path)
        if _rank_of_cause(known) <= _rank_of_cause(cause):
            return
        step = cause["step"]
        if step is None:  # it failed before its first step, so the step in state.json is still valid
            step = read_json_object(folder / STATE_FILE).get("step")
        write_state(folder, "failed", step)
        if not cause["secondary"]:
            write_atomically(path, cause)
            return
        with open(path, "x", encoding="utf-8") as file:  # "x": must not replace a first cause written meanwhile
            file.write(to_json(cause) + "\n")


def _rank_of_cause(cause: ErrorRecord) -> tuple[bool, float]:
    """Return a value that is less for the cause to keep, the first one; a record that is damaged comes last."""
    secondary, seconds = cause.get("secondary"), cause.get("time")
    if isinstance(secondary, bool) and isinstance(seconds, int | float) and is_number(seconds):
        return secondary, seconds
    return True, math.inf


def read_and_clear_error(folder: Path) -> str:
    """Return why the previous run in this folder failed, "" if it did not, and remove error.json."""
    path = folder / ERROR_FILE
    message = str(read_json_object(path).get("message", ""))
    path.unlink(missing_ok=True)
    if message:
        return message
    # a run that was killed could not write how it ended
    return NO_ERROR_MESSAGE if read_json_object(folder / STATE_FILE).get("state") == "running" else ""


def request_abort(folder: Path, launch_id: str, message: str, hang: bool = False, state: str = "failed") -> None:
    """Ask every rank of this launch to end within seconds. Keeps an earlier request. Ignores a full disk.

    launch_id: distinguishes this launch from earlier and later ones. hang: whether ranks write their stacks first.
    state: "failed", or "preempted" if no work is lost.
    """
    request: AbortRequest = {"world": launch_id, "message": message, "hang": hang, "state": state}
    with contextlib.suppress(OSError):
        if not read_abort_request(folder, launch_id):
            write_atomically(abort_file(folder), request)


def read_abort_request(folder: Path, launch_id: str) -> AbortRequest:
    """Return the abort request of this launch; an empty dictionary if there is none."""
    request = read_json_object(abort_file(folder))
    is_complete = request.keys() >= {"message", "hang", "state"}  # else it was damaged
    return request if launch_id and request.get("world") == launch_id and is_complete else {}


def report_to_launcher(message: str, may_retry: bool = True, first_hand: bool = False) -> bool:
    """Write why this rank ended to the file that its agent reads; return whether the agent will print it.

    Only our own agent prints it; plain torchrun does not. may_retry: whether a restart in place may help.
    first_hand: whether this rank failed by itself, and not because of another one.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return False
    extra = {"py_callstack": "", "timestamp": str(int(time.time())), MAY_RETRY: may_retry, FIRST_HAND: first_hand}
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(to_json({"message": {"message": message, "extraInfo": extra}}))
    except OSError:
        return False
    return "TINYTRAIN_AGENT" in os.environ
