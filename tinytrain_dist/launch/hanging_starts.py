"""End ranks that hang in their start after a request to stop: they may be blocked where no signal handler runs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

from tinytrain_dist.config.run_folder import STATE_FILE
from tinytrain_dist.launch.agent_state import agent, exit_now, handles, rank_pids, say
from tinytrain_dist.reliability import error_report
from tinytrain_dist.reliability.heartbeats import read_heartbeats
from tinytrain_dist.reliability.run_state import write_state
from tinytrain_dist.reliability.start_marks import claim
from tinytrain_dist.utils.atomic_files import read_json_object

STOP_IN_START_SECONDS = 5.0  # for a rank in its start to end by itself after a request to stop
WRITING_SECONDS = 5.0  # for the storage of the run folder to take the state
KILLED_SECONDS = 10.0  # for killed ranks to end; the kernel keeps those that wait for a device or for storage


def begin_to_stop_hanging_starts() -> None:
    """Start the thread for that, once, if the ranks run our training program."""
    if agent.stopper is None and agent.run_folder is not None:
        agent.stopper = threading.Thread(target=_stop_hanging_starts, daemon=True)
        agent.stopper.start()


def _stop_hanging_starts() -> None:
    """After a request to stop, end each rank that is in its start and does not end by itself; the body of a thread.

    A rank may be blocked in a system call, and then none of its threads runs. It has nothing to save yet.
    """
    assert agent.folder_note is not None
    first_seen: dict[int, float] = {}
    hanging: list[int] = []
    while not hanging:
        time.sleep(0.5)
        pids = list(rank_pids())
        now = time.monotonic()
        for pid in pids:
            is_late = now - first_seen.setdefault(pid, now) > STOP_IN_START_SECONDS
            # a rank without a handler for our own signal has not come as far as its mark
            if is_late and (claim(agent.folder_note, pid) or not handles(pid, signal.SIGUSR1)):
                hanging.append(pid)
    agent.stopped_in_start = True
    say("stopped during the start, before the first step, so nothing was saved")
    writer = threading.Thread(target=_write_preempted, args=(pids, hanging), daemon=True)
    writer.start()
    writer.join(WRITING_SECONDS)  # it may be this storage that hangs
    for pid in hanging:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(KILLED_SECONDS)
    exit_now(0)


def _write_preempted(pids: list[int], hanging: list[int]) -> None:
    """Write what ranks that hang in their start cannot: state.json, and the request to the ranks of other nodes.

    pids: the ranks of this node. The state is written as the watchdog of rank 0 would.
    """
    assert agent.run_folder is not None
    assert agent.folder_note is not None
    folder = agent.run_folder
    host = socket.gethostname()
    launch_ids = [beat["world"] for beat in read_heartbeats(folder) if beat["host"] == host and beat["pid"] in hanging]
    for launch_id in filter(None, launch_ids):
        error_report.request_abort(folder, launch_id, "stopped during the start", state="preempted")
    if any(_has_rank_0(pid) for pid in pids) and (agent.folder_note.is_file() or "TINYTRAIN_ATTEMPT" in os.environ):
        folder.mkdir(parents=True, exist_ok=True)
        write_state(folder, "preempted", read_json_object(folder / STATE_FILE).get("step"))


def _has_rank_0(pid: int) -> bool:
    if pid in agent.called_up:  # the system shows the environment in which it waited
        return "RANK=0" in agent.called_up[pid]
    with contextlib.suppress(OSError):
        return b"RANK=0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False
