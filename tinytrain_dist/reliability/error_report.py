"""Record why a run failed: error.json holds the first cause, whichever rank reports it, in whatever order.

Must not know torch or ranks. A rank's own error and a killed rank come before what peers report of them. Among equals
the earlier one counts. The abort request, which ends a run on all its ranks, is here as well: a rank that waits for a
dead one in a collective cannot be reached in another way.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from tinytrain_dist.config.run_folder import ERROR_FILE, STATE_FILE, abort_file
from tinytrain_dist.reliability.run_state import write_state
from tinytrain_dist.utils.atomic_files import read_json_object, write_atomically

ErrorRecord = dict[str, Any]  # message, rank, host, step, traceback, time (seconds since 1970), secondary
NO_ERROR_MESSAGE = "the previous run ended without an error message: it was killed or its node was lost"


def write_error(folder: Path, cause: ErrorRecord) -> None:
    """Write error.json and state.json, unless what is there is nearer to the beginning. A full disk is no matter."""
    path = folder / ERROR_FILE
    with contextlib.suppress(OSError):
        before = read_json_object(path)
        if before and (before["secondary"], before["time"]) <= (cause["secondary"], cause["time"]):
            return
        step = cause["step"]  # None in a start: then what the start before it had reached still holds
        write_state(folder, "failed", read_json_object(folder / STATE_FILE).get("step") if step is None else step)
        if not cause["secondary"]:
            write_atomically(path, cause)
            return
        with open(path, "x", encoding="utf-8") as file:  # never over a first cause that was written meanwhile
            json.dump(cause, file)


def read_and_clear_error(folder: Path) -> str:
    """Why the run before this start failed, "" if it did not; error.json is gone then."""
    path = folder / ERROR_FILE
    told = str(read_json_object(path).get("message", ""))
    path.unlink(missing_ok=True)
    return told or (NO_ERROR_MESSAGE if read_json_object(folder / STATE_FILE).get("state") == "running" else "")


def request_abort(folder: Path, world: str, message: str, hang: bool = False, state: str = "failed") -> None:
    """Tell every rank of this world to end within seconds; `world` tells it from earlier and later ones.

    hang: leave the stacks first. state: "failed", or "preempted" where nothing is lost.
    """
    notice = {"world": world, "message": message, "hang": hang, "state": state}
    with contextlib.suppress(OSError):
        if not read_abort_request(folder, world):
            write_atomically(abort_file(folder), notice)


def read_abort_request(folder: Path, world: str) -> ErrorRecord:
    """Return the abort request of this launch; an empty dictionary if there is none."""
    notice = read_json_object(abort_file(folder))
    return notice if world and notice.get("world") == world else {}


def report_to_launcher(message: str) -> bool:
    """Leave the reason of this rank's end in the file its agent gave it; whether tinytrain_dist.agent prints it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return False
    extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    except OSError:
        return False
    return "TINYTRAIN_AGENT" in os.environ
