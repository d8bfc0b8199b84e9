"""A torchrun wrapper that survives stop signals and ends by printing the first failing rank's error.

    python -m tinytrain_dist.agent --standalone --nproc_per_node 2 launch/train.py configs/quickstart.toml

torchrun itself has four habits that cost work or time:

- SIGUSR1 kills it
- it turns SIGTERM and Ctrl-C into a traceback and exit code 1, although every rank has saved
- it waits half a minute for ranks that hang after one of them died
- it ends a failed run with a page about itself

This wrapper forwards the signals to the ranks, which save and exit 0. It reports how a rank ended that could not report
it, and prints one sentence. Must not know what the ranks do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tinytrain_dist.config.run_folder import ERROR_FILE
from tinytrain_dist.reliability import error_report
from tinytrain_dist.reliability.watchdog import START_PHASES, TICK_SECONDS, read_heartbeats
from tinytrain_dist.utils.atomic_files import read_json_object

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TASKS = Path("/proc/self/task")
SECOND_THOUGHT_SECONDS = 1.0
HANDLERS_SECONDS = 10.0  # for a rank's Python to start and to take over the signals
CLOSING_SECONDS = 5  # for the other ranks to end by themselves after one has died
_first_interrupt = [0.0]
_died: list[tuple[str, int]] = []  # what is said of the rank that died first, and its exit code
_given_up: list[bool] = []


def rank_pids() -> Iterator[int]:
    """Process ids of the ranks: our children that lead a session."""
    for task in TASKS.iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == pid:
                    yield pid


def forward_signal(number: int, _: FrameType | None) -> None:
    """Pass a signal on; a second Ctrl-C, a second thought later, ends everything without saving."""
    pids = list(rank_pids())
    now = time.monotonic()
    if number == signal.SIGINT and pids:
        impatient = _first_interrupt[0] and now - _first_interrupt[0] > SECOND_THOUGHT_SECONDS
        _first_interrupt[0] = _first_interrupt[0] or now
        if impatient:
            _given_up.append(True)
            number = signal.SIGKILL
        text = "ending at once" if impatient else "saving and stopping; Ctrl-C again ends at once, without saving"
        print(f"\n{text}", file=sys.stderr, flush=True)
    for pid in pids:
        _wait_for_handler(pid, number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if number == signal.SIGUSR1:
        os.environ["TINYTRAIN_STOP"] = "SIGUSR1"  # ranks that start later find it there, and end well
    elif not pids:
        os._exit(128 + number)  # nothing runs yet, so nothing is to be saved


def _wait_for_handler(pid: int, number: int) -> None:
    """Wait until the rank has installed its signal handlers: before that, a signal would kill it."""
    end = time.monotonic() + HANDLERS_SECONDS
    while number != signal.SIGKILL and time.monotonic() < end:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        caught = re.search(r"SigCgt:\s*(\w+)", status)
        if caught is None or int(caught[1], 16) >> (number - 1) & 1:
            return
        time.sleep(0.02)


def main(args: list[str]) -> int:
    """Run torchrun's command line; its exit code, or the first failing rank's."""
    if TASKS.is_dir():  # Linux; elsewhere torchrun's own ways with signals must do
        for number in FORWARDED_SIGNALS:
            signal.signal(number, forward_signal)  # before torch is imported, which takes seconds
        args = ["--signals-to-handle=SIGHUP,SIGQUIT", *args]
    # torch 2.13 keeps one store over restarts and ranks then read the addresses of dead ones
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in ("api", "errors.error_handler"):  # they say what we say, less clearly
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="tinytrain-") as scratch:
        tempfile.tempdir = scratch  # torchrun leaves folders behind; ranks do not look for their caches there
        # a rank's sentence is printed here, once; and here a rank leaves the run folder
        note = Path(scratch) / "run"
        os.environ["TINYTRAIN_AGENT"] = str(note)
        _report_deaths_before_closing(SubprocessContext, note, _memory_kills())
        try:
            torchrun(args)
        except ChildFailedError as failed:
            failures = list(failed.failures.values())
            # some were ended because another one had failed
            first = min(failures, key=lambda one: (one.exitcode in (-signal.SIGTERM, -signal.SIGKILL), one.timestamp))
            text, code = _died[-1] if _died else (_reason(first), first.exitcode)
            print(f"error: {_first_cause(note) or text}", file=sys.stderr)
            return code if code > 0 else 128 - code
    return 0


def _report_deaths_before_closing(context: Any, note: Path, kills_before: int) -> None:
    """Report a dead rank when torchrun has found it, before it ends the others."""
    close = context._close

    def attend_and_close(self: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        codes = {local: handler.proc.poll() for local, handler in self.subprocess_handlers.items()}
        dead = [] if hasattr(self, "attended") else [local for local, code in codes.items() if code]
        if not hasattr(self, "attended"):
            _died.clear()  # of the ranks before this restart
        self.attended = True  # torchrun closes twice, and what was killed by the first time did not die by itself
        for local in dead:
            error_file = Path(self.error_files[local])
            if not (error_file.is_file() and error_file.stat().st_size):  # it left no word
                _report_death(note, local, self.subprocess_handlers[local].proc.pid, codes[local], kills_before)
                break
        if dead:  # a SIGTERM would be taken for a wish to stop, and a start that fails is no preemption
            _wait_for_end(self, CLOSING_SECONDS)
            death_sig = signal.SIGKILL
        close(self, death_sig, timeout)

    context._close = attend_and_close


def _wait_for_end(context: Any, seconds: float) -> None:
    """Let the other ranks end by themselves: they have been told, or wait in a collective that is broken."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(h.proc.poll() is None for h in context.subprocess_handlers.values()):
        time.sleep(0.05)


def _report_death(note: Path, local: int, pid: int, code: int, kills_before: int) -> None:
    """Say what the dead rank cannot say any more, in error.json and to all ranks."""
    now, host = time.time(), socket.gethostname()
    how = (
        f"was killed by {signal.Signals(-code).name}"
        if code < 0
        else f"ended with exit code {code}, without an error message"
    )
    folder = Path(note.read_text()) if note.is_file() else None
    if folder is not None:
        time.sleep(TICK_SECONDS / 2)  # its peers notice soon, and each writes a last heartbeat
    beats = read_heartbeats(folder) if folder is not None else []
    mine = next((beat for beat in beats if (beat["pid"], beat["host"]) == (pid, host)), None)
    step = max((beat["step"] for beat in beats if beat["phase"] not in START_PHASES), default=None)
    name = f"rank {mine['rank']}" if mine else f"local rank {local}"
    text = f"{name} on {host} (process {pid}) {how}" + (f", after step {step}" if mine and step is not None else "")
    if _given_up:
        text = f"ended by a second Ctrl-C, without saving, after step {step}"
    elif code == -signal.SIGKILL:
        text += "; the system does so when memory runs out, and a smaller micro_batch_size needs less"
        if (count := _memory_kills() - kills_before) > 0:
            text += f" (it killed {count} process(es) for lack of memory meanwhile)"
    _died.append((text, code))
    if folder is not None and mine:
        cause = {"message": text, "rank": mine["rank"], "host": host, "step": step, "traceback": "", "time": now}
        error_report.write_error(folder, {**cause, "secondary": False})
        error_report.request_abort(folder, mine["world"], text)


def _memory_kills() -> int:
    """How many processes the kernel has ended for lack of memory; 0 where it does not say."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/vmstat").read_text().split("oom_kill ")[1].split()[0])
    return 0


def _first_cause(note: Path) -> str:
    """Wait for the first cause in error.json, which the agent of another node may have to write; "" if none."""
    end = time.monotonic() + CLOSING_SECONDS
    while note.is_file() and time.monotonic() < end:
        cause = read_json_object(Path(note.read_text()) / ERROR_FILE)
        if cause and not cause.get("secondary"):
            return str(cause["message"])
        time.sleep(0.1)
    return ""


def _reason(failure: Any) -> str:
    """Return what the rank left in its error file, or how its process ended."""
    told = failure.error_file_data.get("message", {}) if isinstance(failure.error_file_data, dict) else {}
    if isinstance(told, dict) and told.get("message"):
        return str(told["message"])
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"local rank {failure.local_rank} (process {failure.pid}) {how}"
