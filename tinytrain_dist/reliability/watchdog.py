"""Watch one rank from a thread: write its heartbeat, enforce time limits, and end it when the whole run must end.

Must not know torch, or what happens in a phase. The thread reads and writes small files, so it works while the main
thread waits in a collective. RUN/logs/heartbeat has a file per rank. RUN/logs/stacks has the stacks of each rank of a
run that hung.
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

from tinytrain_dist.config.run_folder import (
    ERROR_FILE,
    LOGS_FOLDER,
    STACKS_FOLDER,
    STATE_FILE,
    abort_file,
    heartbeat_file,
    stacks_file,
)
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.metrics.phase_timer import START_PHASES, PhaseTimer
from tinytrain_dist.reliability import error_report, run_state, stop_requests
from tinytrain_dist.reliability.heartbeats import (
    HEARTBEAT_SECONDS,
    describe_waiting,
    read_heartbeats,
    write_heartbeat,
)
from tinytrain_dist.reliability.start_times import earlier_seconds, rank_start
from tinytrain_dist.reliability.world import REGROUP_EXIT_CODE, REGROUP_REASON, regroup_requested
from tinytrain_dist.utils.atomic_files import read_json_object

TICK_SECONDS = 1.0  # between two checks
GRACE_SECONDS = 4.0  # for all ranks to write their stacks and heartbeats after one has noticed a hang
JOIN_REQUEST_SECONDS = 5.0  # by which a request of another rank may be older than this process; clocks differ, too
NO_LIMIT_SECONDS = 30 * 86_400.0


class Watchdog(threading.Thread):
    """Watch one rank, from `start` to `close`."""

    def __init__(
        self,
        config: TrainingConfig,
        identity: tuple[int, int, str],
        report: Callable[[str], None],
        flight_record: Callable[[], bytes],
        join_id: str = "",
    ) -> None:
        """Prepare to watch this process. Call this in the main thread: from here on, signals wake the watchdog.

        identity: rank, number of ranks, host. report: prints the final error. flight_record: returns the last
        collectives as JSON. join_id: what ranks of several nodes share before they have joined; a stop request on one
        of them then reaches the others.
        """
        super().__init__(name="watchdog", daemon=True)
        self.folder = Path(config.target_dir)
        self.phase_timer = PhaseTimer("join", earlier=earlier_seconds())
        self.rank, self.world_size, self.host = identity
        self.launch_id = ""  # known when all ranks have joined
        self._join_id = join_id
        self._rank_start = time.time() - (time.monotonic() - rank_start())
        self._report = report
        self._flight_record = flight_record
        # The name and value of the setting that limits each phase; step_limit is for all other phases. 0: no limit.
        self._limits = dict.fromkeys(START_PHASES, ("start_limit", config.start_limit))
        self._limits["checkpoint"] = ("save_limit", config.save_limit)
        self._default_limit = ("step_limit", config.step_limit)
        self._agent_pid = os.getppid()
        self._next_heartbeat = 0.0  # by time.monotonic()
        self._written_phase = ""  # the phase in the last heartbeat
        self._closed = threading.Event()
        # A signal, or `close`, writes a byte into this pipe, which wakes the thread. This works even while the main
        # thread waits in a collective and Python cannot run a signal handler.
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        self._signal = stop_requests.received_signal()

    @property
    def longest_limit(self) -> float:
        """The longest limit in seconds; 30 days if a limit is off."""
        seconds = [limit for _, limit in (*self._limits.values(), self._default_limit)]
        return max(seconds) if all(seconds) else NO_LIMIT_SECONDS

    def set_launch_id(self, launch_id: str) -> None:
        """Set the launch ID, which all ranks of this launch share. From now on, abort requests reach this rank."""
        self.launch_id = launch_id
        self.heartbeat()

    def close(self) -> None:
        """Stop watching; remove the heartbeat file and any folder left empty."""
        self._closed.set()
        signal.set_wakeup_fd(-1)
        os.write(self._wake_writer, b"\0")
        self.join()
        path = heartbeat_file(self.folder, self.rank)
        with contextlib.suppress(OSError):
            path.unlink()
            for folder in (path.parent, self.folder / LOGS_FOLDER, self.folder):
                folder.rmdir()  # fails at the first folder that is not empty

    def heartbeat(self, seconds_in_phase: float = 0.0) -> None:
        """Write what this rank is doing, and for how many seconds it has made no progress."""
        self._next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
        self._written_phase = self.phase_timer.phase
        write_heartbeat(
            self.folder,
            {
                "rank": self.rank,
                "world_size": self.world_size,
                "host": self.host,
                "pid": os.getpid(),
                "step": self.phase_timer.step,
                "phase": self.phase_timer.phase,
                "seconds": round(seconds_in_phase, 1),
                "time": time.time(),
                "world": self.launch_id or self._join_id,
                "attempt": os.environ.get("TINYTRAIN_ATTEMPT", ""),
            },
        )

    def run(self) -> None:
        """Check once a second, and immediately after a signal. This is the body of the thread."""
        phase_start: float | None = None
        seconds_in_phase = 0.0
        last_check = time.monotonic()
        while not self._closed.is_set():
            if select.select([self._wake_reader], [], [], TICK_SECONDS)[0]:
                self._note_signals(os.read(self._wake_reader, 64))
            now = time.monotonic()
            since = self.phase_timer.since
            if since == phase_start:
                # do not count time in which this thread did not run, as in a stopped process or a sleeping laptop
                seconds_in_phase += min(now - last_check, 2 * TICK_SECONDS)
            else:
                seconds_in_phase = 0.0
            phase_start = since
            last_check = now
            self._check(seconds_in_phase)

    def _note_signals(self, numbers: bytes) -> None:
        """Keep the first stop signal. numbers: one byte for each signal received."""
        stop_signals = [number for number in set(numbers) if number in stop_requests.STOP_SIGNALS]
        if stop_signals and not self._signal:
            self._signal = signal.Signals(stop_signals[0]).name

    def _check(self, seconds_in_phase: float) -> None:
        """End this process if it must end, or else write the heartbeat when it is due."""
        phase = self.phase_timer.phase
        setting, limit = self._limits.get(phase, self._default_limit)
        if "TINYTRAIN_AGENT" in os.environ and os.getppid() != self._agent_pid:
            os._exit(1)  # the agent has ended, and nothing else would end this rank together with the others
        if request := self._read_request(phase):
            self._end(request)
        elif self._signal and phase in START_PHASES:
            regroups = regroup_requested()
            state = "regrouped" if regroups else "preempted"
            self._end_all(f"{REGROUP_REASON if regroups else self._signal} during the start", state=state)
        elif limit and seconds_in_phase > limit:
            message = f"rank {self.rank} on {self.host} made no progress in {phase} for {limit:g} s ({setting})"
            self._end_all(message, hang=True)
        elif time.monotonic() > self._next_heartbeat or self._left_start_phase(phase):
            self.heartbeat(seconds_in_phase)

    def _read_request(self, phase: str) -> error_report.AbortRequest:
        """Return the request that this rank must end; {} if there is none."""
        request = error_report.read_abort_request(self.folder, self.launch_id)
        if not request and self._join_id and phase in START_PHASES:
            request = error_report.read_abort_request(self.folder, self._join_id)
            with contextlib.suppress(OSError):
                # an earlier start may have had the same ID
                if abort_file(self.folder).stat().st_mtime < self._rank_start - JOIN_REQUEST_SECONDS:
                    return {}
        return request

    def _left_start_phase(self, phase: str) -> bool:
        """Return whether the last heartbeat shows an earlier phase of the start. Such a change is written at once."""
        return self._written_phase in START_PHASES and phase != self._written_phase

    def _end_all(self, message: str, hang: bool = False, state: str = "failed") -> None:
        """Ask all ranks to end, and end this process."""
        # After a failure the ranks may be started again, and on a fixed port they would have the same join ID.
        if address := self.launch_id or (self._join_id if state == "preempted" else ""):
            error_report.request_abort(self.folder, address, message, hang, state)
        self._end({"message": message, "hang": hang, "state": state}, noticed_here=True)

    def _end(self, request: error_report.AbortRequest, noticed_here: bool = False) -> None:
        """Carry out an abort request, and end the process even if the main thread hangs."""
        message = str(request["message"])
        regrouped = request["state"] == "regrouped"
        preempted = request["state"] == "preempted"
        self.heartbeat()
        try:
            if request["hang"]:
                with contextlib.suppress(OSError, ValueError):  # a full disk must not keep the error from being printed
                    self._write_stacks()
                    message = self._describe_hang(message) if noticed_here else self._wait_for_cause(message)
            if not (preempted or regrouped):
                self._report(message)
            elif preempted and self._may_write_state():
                step = read_json_object(self.folder / STATE_FILE).get("step")  # this start has completed no step
                run_state.write_state(self.folder, "preempted", step)
        finally:  # also if the disk is full
            os._exit(REGROUP_EXIT_CODE if regrouped else 0 if preempted else 1)

    def _may_write_state(self) -> bool:
        return self.rank == 0 and (run_state.owns_run(self.folder) or "TINYTRAIN_ATTEMPT" in os.environ)

    def _write_stacks(self) -> None:
        """Write the stacks of all threads, and the last collectives."""
        path = stacks_file(self.folder, self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            phase = self.phase_timer.phase
            print(f"rank {self.rank}, process {os.getpid()} on {self.host}, {phase}", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        collectives_file = path.with_suffix(".collectives.json")
        # in a thread, because native code may not return
        threading.Thread(target=lambda: collectives_file.write_bytes(self._flight_record()), daemon=True).start()

    def _describe_hang(self, message: str) -> str:
        """Find the ranks that the others wait for, and write them to error.json as part of the cause.

        Only the rank that noticed the hang calls this. It first waits until all ranks have reacted. Returns `message`
        with these ranks added.
        """
        noticed_at = time.time()
        time.sleep(GRACE_SECONDS)
        heartbeats = read_heartbeats(self.folder)
        if self.launch_id:
            # a rank that still reacts has written a heartbeat after the request
            since = abort_file(self.folder).stat().st_mtime
        else:  # there is no request before all ranks have joined
            since = max(heartbeat["seen"] for heartbeat in heartbeats) - 3 * HEARTBEAT_SECONDS
        message += f"; {describe_waiting(heartbeats, self.world_size, since)}"
        message += f"; stacks are in {self.folder / LOGS_FOLDER / STACKS_FOLDER}"
        if run_state.owns_run(self.folder):
            cause = {
                "message": message,
                "rank": self.rank,
                "host": self.host,
                "step": self.phase_timer.step,
                "traceback": "",
                "time": noticed_at,
                "secondary": False,
            }
            error_report.write_error(self.folder, cause)
        return message

    def _wait_for_cause(self, message: str) -> str:
        """Wait for the cause from the rank that noticed the hang, and return it; `message` if none arrives."""
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.1)
            if cause := read_json_object(self.folder / ERROR_FILE).get("message"):
                return str(cause)
        return message
