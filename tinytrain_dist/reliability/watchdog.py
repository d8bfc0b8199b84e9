"""Watch one rank from a thread: write its heartbeat, enforce time limits on phases, end it together with all others.

Must not know torch, or what a phase does. The thread reads and writes small files, so it works while the main thread
sits in a collective. RUN/logs/heartbeat has a file per rank. RUN/logs/stacks has the stacks of each rank of a run that
hung.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinytrain_dist.config.run_folder import (
    ERROR_FILE,
    LOGS_FOLDER,
    STATE_FILE,
    abort_file,
    heartbeat_file,
    heartbeat_folder,
    stacks_file,
)
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.metrics.phase_timer import PhaseTimer
from tinytrain_dist.reliability import error_report, run_state, stop_requests
from tinytrain_dist.utils.atomic_files import read_json_object, write_atomically

TICK_SECONDS, HEARTBEAT_SECONDS, GRACE_SECONDS = 1.0, 10.0, 4.0
START_PHASES = ("join", "open_data", "build", "load")  # a process that ends in these loses nothing
# in the order in which a rank goes through them while its number of completed steps stays the same
PHASES = (*START_PHASES, "reading", "evaluation", "checkpoint", "data", "forward_backward", "reduction", "optimizer")
Heartbeat = dict[str, Any]


class Watchdog(threading.Thread):
    """Watches one rank until `close`."""

    def __init__(
        self,
        config: TrainingConfig,
        who: tuple[int, int, str],
        say: Callable[[str], None],
        flight_record: Callable[[], bytes],
    ) -> None:
        """`who`: rank, number of ranks, host; `say` prints the final error; `flight_record`: last collectives.

        For the main thread only: signals wake the watchdog from here on, also while that thread sits in a collective.
        """
        super().__init__(name="watchdog", daemon=True)
        self.folder, self.phase_timer, self.world = Path(config.target_dir), PhaseTimer("join"), ""
        self.rank, self.world_size, self.host = who
        self._say, self._flight_record = say, flight_record
        self._limits = dict.fromkeys(START_PHASES, config.start_limit) | {"checkpoint": config.save_limit}
        self._step_limit = config.step_limit
        self._parent, self._next_beat, self._told, self._closed = os.getppid(), 0.0, "", threading.Event()
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._signal = stop_requests.received_signal()
        self.start()

    @property
    def longest_limit(self) -> float:
        """The longest limit in seconds; 30 days if a limit is off."""
        limits = (*self._limits.values(), self._step_limit)
        return max(limits) if all(limits) else 30 * 86_400.0

    def joined(self, world: str) -> None:
        """Note the launch ID, which all ranks of this launch share."""
        self.world = world
        self.beat()

    def close(self) -> None:
        """Stop watching; what tells of a live process is removed, and folders that hold nothing."""
        self._closed.set()
        signal.set_wakeup_fd(-1)
        os.write(self._wake, b"\0")
        self.join()
        with contextlib.suppress(OSError):
            self._path().unlink()
            for folder in (self._path().parent, self.folder / LOGS_FOLDER, self.folder):
                folder.rmdir()  # fails, and ends this, where there is something else

    def run(self) -> None:
        """Look around once a second, and at once when a signal comes."""
        entered, age, before = None, 0.0, time.monotonic()
        while not self._closed.is_set():
            if select.select([self._woken], [], [], TICK_SECONDS)[0]:
                numbers = set(os.read(self._woken, 64)) & set(map(int, stop_requests.STOP_SIGNALS))
                self._signal = self._signal or next((signal.Signals(number).name for number in numbers), "")
            now, since = time.monotonic(), self.phase_timer.since
            # time in which this thread did not run, as in a stopped process or a sleeping laptop, does not count
            age = age + min(now - before, 2 * TICK_SECONDS) if since == entered else 0.0
            entered, before = since, now
            self._look(age)

    def _look(self, age: float) -> None:
        phase = self.phase_timer.phase
        limit = self._limits.get(phase, self._step_limit)
        if "TINYTRAIN_AGENT" in os.environ and os.getppid() != self._parent:
            os._exit(1)  # without an agent no process would end this rank together with the others
        if notice := error_report.read_abort_request(self.folder, self.world):
            self._end(notice)
        elif self._signal and phase in START_PHASES:
            self._end_all(f"{self._signal} during the start", state="preempted")
        elif limit and age > limit:
            self._end_all(f"rank {self.rank} on {self.host} was in {phase} for {limit:g} s", hang=True)
        elif time.monotonic() > self._next_beat or (self._told in START_PHASES and phase != self._told):
            self.beat(age)

    def _end_all(self, message: str, hang: bool = False, state: str = "failed") -> None:
        if self.world:
            error_report.request_abort(self.folder, self.world, message, hang, state)
        self._end({"message": message, "hang": hang, "state": state}, first=True)

    def _end(self, notice: dict[str, Any], first: bool = False) -> None:
        """Leave what the notice asks for, and end the process: the main thread may never come back."""
        message, preempted = str(notice["message"]), notice["state"] == "preempted"
        self.beat()
        try:
            if notice["hang"]:
                with contextlib.suppress(OSError, ValueError):  # a full disk must not keep the sentence from being said
                    self._leave_stacks()
                    message = self._wait_for_cause(message, first)
            if not preempted:
                self._say(message)
            elif self.rank == 0 and (run_state.owns_run(self.folder) or "TINYTRAIN_ATTEMPT" in os.environ):
                before = read_json_object(self.folder / STATE_FILE).get("step")  # this start has not come further
                run_state.write_state(self.folder, "preempted", before)
        finally:  # on a full disk too
            os._exit(0 if preempted else 1)

    def _leave_stacks(self) -> None:
        path = stacks_file(self.folder, self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            print(
                f"rank {self.rank}, process {os.getpid()} on {self.host}, {self.phase_timer.phase}",
                file=file,
                flush=True,
            )
            faulthandler.dump_traceback(file, all_threads=True)
        record = path.with_suffix(".collectives.json")  # in a thread, because native code might not come back
        threading.Thread(target=lambda: record.write_bytes(self._flight_record()), daemon=True).start()

    def _wait_for_cause(self, message: str, first: bool) -> str:
        """Find who the others wait for, on the rank that noticed the hang; other ranks wait for its answer."""
        started, end = time.time(), time.monotonic() + GRACE_SECONDS * (1 if first else 2)
        while time.monotonic() < end:
            time.sleep(0.1)
            if not first and (told := read_json_object(self.folder / ERROR_FILE).get("message")):
                return str(told)
        if first:
            beats = read_heartbeats(self.folder)
            asked = abort_file(self.folder)  # all that could have answered have
            since = asked.stat().st_mtime if self.world else max(b["seen"] for b in beats) - 3 * HEARTBEAT_SECONDS
            message += f"; {describe_waiting(beats, self.world_size, since)}"
            message += f"; stacks are in {self.folder / 'logs' / 'stacks'}"
            cause = {"message": message, "rank": self.rank, "host": self.host, "step": self.phase_timer.step}
            if run_state.owns_run(self.folder):
                error_report.write_error(self.folder, {**cause, "traceback": "", "time": started, "secondary": False})
        return message

    def _path(self) -> Path:
        return heartbeat_file(self.folder, self.rank)

    def beat(self, age: float = 0.0) -> None:
        """Write down what this rank is doing, and how many seconds it has made no progress."""
        self._next_beat, self._told = time.monotonic() + HEARTBEAT_SECONDS, self.phase_timer.phase
        beat: Heartbeat = {"rank": self.rank, "world_size": self.world_size, "host": self.host, "pid": os.getpid()}
        beat |= {"step": self.phase_timer.step, "phase": self.phase_timer.phase, "seconds": round(age, 1)}
        beat |= {"time": time.time(), "world": self.world, "attempt": os.environ.get("TINYTRAIN_ATTEMPT", "")}
        with contextlib.suppress(OSError):  # a full disk must not matter
            self._path().parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(), beat)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Return the last heartbeat of each rank, with `seen`: when it was written by the file system's clock."""
    beats = []
    for path in sorted(heartbeat_folder(folder).glob("rank-*.json")):
        if (beat := read_json_object(path)) and "phase" in beat:
            with contextlib.suppress(OSError):
                beats.append({**beat, "seen": path.stat().st_mtime})
    return [beat for beat in beats if beat["rank"] < beats[0]["world_size"]]  # others are of a larger run before


def describe_waiting(beats: list[Heartbeat], world_size: int, since: float) -> str:
    """Say which ranks the others wait for: those that are silent since then, missing, or behind."""
    missing = sorted(set(range(world_size)) - {beat["rank"] for beat in beats})
    silent = [beat for beat in beats if beat["seen"] < since]
    if missing:
        return f"rank(s) {', '.join(map(str, missing[:16]))} of {world_size} never gave a sign of life"
    if silent:
        return f"all wait for a heartbeat of {_format_ranks(silent)}: no sign of life since then"
    places = [(beat["step"], PHASES.index(beat["phase"]) if beat["phase"] in PHASES else 0) for beat in beats]
    behind = [beat for beat, place in zip(beats, places, strict=True) if place == min(places)]
    if len(behind) == len(beats):
        return f"all {len(beats)} rank(s) are in {behind[0]['phase']} after step {behind[0]['step']}"
    return f"all wait for {_format_ranks(behind)}"


def _format_ranks(beats: list[Heartbeat]) -> str:
    more = f" and {len(beats) - 4} more" if len(beats) > 4 else ""
    return ", ".join(f"rank {b['rank']} on {b['host']} ({b['phase']} after step {b['step']})" for b in beats[:4]) + more
