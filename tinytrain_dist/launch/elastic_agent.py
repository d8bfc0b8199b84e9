"""A torchrun wrapper that survives stop signals and ends by printing the first failing rank's error.

    python -m tinytrain_dist.agent --standalone --nproc_per_node 2 launch/train.py configs/quickstart.toml

torchrun itself has five habits that cost work or time:

- SIGUSR1 kills it
- it turns SIGTERM and Ctrl-C into a traceback and exit code 1, although every rank has saved
- it handles SIGHUP although nohup has made it ignored, and so dies with its terminal
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
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tinytrain_dist.config.run_folder import ERROR_FILE
from tinytrain_dist.metrics.phase_timer import START_PHASES
from tinytrain_dist.reliability import error_report
from tinytrain_dist.reliability.heartbeats import Heartbeat, read_heartbeats
from tinytrain_dist.reliability.stop_requests import STOP_SIGNALS, handle_unless_ignored
from tinytrain_dist.reliability.watchdog import TICK_SECONDS
from tinytrain_dist.utils.atomic_files import read_json_object

HANDLED_SIGNALS = (*STOP_SIGNALS, signal.SIGQUIT)  # SIGQUIT (Ctrl-\) ends at once, the others are forwarded
TORCHRUN_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")  # it handles these even if they were to be ignored
UNUSED_SIGNAL = "SIGURG"  # torchrun must be given one to handle; this is sent only to programs that ask for it
TASKS = Path("/proc/self/task")
SECOND_INTERRUPT_SECONDS = 1.0  # a terminal may deliver one Ctrl-C twice; a later one is a wish to end at once
HANDLERS_SECONDS = 10.0  # for a rank's Python to start and to install its signal handlers
CLOSING_SECONDS = 5  # for the other ranks to end by themselves after one has died


@dataclass(frozen=True)
class RankDeath:
    """How the first rank of a start died: a sentence for the user, and its exit code (negative: the signal)."""

    text: str
    exit_code: int


@dataclass
class AgentState:
    """What the signal handler and the report of a dead rank tell each other. There is one agent in a process."""

    first_interrupt: float | None = None  # time.monotonic() of the first Ctrl-C
    killed_by: str = ""  # what has ended the ranks without saving: a second Ctrl-C, or SIGQUIT
    scratch: str = ""  # folder of this agent
    first_death: RankDeath | None = None  # of the present start; a restart clears it


_state = AgentState()


# ---------------------------------------------------------------- signals


def rank_pids() -> Iterator[int]:
    """Yield the process ids of the ranks: our children that lead a session."""
    for task in TASKS.iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == pid:
                    yield pid


def forward_signal(number: int, _: FrameType | None) -> None:
    """Forward a signal to the ranks; a second Ctrl-C, at least a second later, ends all without saving."""
    pids = list(rank_pids())
    # Ranks that start later find it there and stop in order: a restart in place must not go on training.
    os.environ["TINYTRAIN_STOP"] = signal.Signals(number).name
    if not pids and number != signal.SIGUSR1:
        _exit_now(0)  # no rank runs yet, so there is nothing to save
    if number == signal.SIGINT:
        number = _count_interrupt()
    elif number == signal.SIGQUIT:
        number = _kill_at_once("SIGQUIT")
    for pid in pids:
        _wait_for_handler(pid, number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _exit_now(code: int) -> NoReturn:
    """End this process wherever it is, and leave no folder behind."""
    if _state.scratch:
        shutil.rmtree(_state.scratch, ignore_errors=True)
    os._exit(code)


def _count_interrupt() -> int:
    """Tell the user what this Ctrl-C does; return the signal that the ranks get."""
    now = time.monotonic()
    if _state.first_interrupt is not None and now - _state.first_interrupt > SECOND_INTERRUPT_SECONDS:
        return _kill_at_once("a second Ctrl-C")
    if _state.first_interrupt is None:
        _state.first_interrupt = now
    _say("\nsaving and stopping; Ctrl-C again ends at once, without saving")
    return signal.SIGINT


def _kill_at_once(cause: str) -> int:
    """Note what ends the ranks without saving; return the signal that they get."""
    _state.killed_by = cause
    _say("\nending at once")
    return signal.SIGKILL


def _say(text: str) -> None:
    """Print a line. The terminal may be gone: then a signal handler, or the report of an error, must still work."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _wait_for_handler(pid: int, number: int) -> None:
    """Wait until a rank has installed its signal handlers: before that, the signal would kill it."""
    if number == signal.SIGKILL:
        return
    end = time.monotonic() + HANDLERS_SECONDS
    while time.monotonic() < end:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        caught = re.search(r"SigCgt:\s*(\w+)", status)  # a bit mask in hexadecimal; bit 0 is signal 1
        if caught is None or int(caught[1], 16) >> (number - 1) & 1:
            return
        time.sleep(0.02)


# ---------------------------------------------------------------- the program


def main(args: list[str]) -> int:
    """Run torchrun's command line; return its exit code, or that of the first failing rank."""
    if TASKS.is_dir():  # Linux
        handle_unless_ignored(HANDLED_SIGNALS, forward_signal)  # before torch is imported, which takes seconds
        of_torchrun = []
    else:  # on other systems torchrun handles the signals as it always does
        of_torchrun = [name for name in TORCHRUN_SIGNALS if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN]
    args = [f"--signals-to-handle={','.join(of_torchrun or [UNUSED_SIGNAL])}", *args]
    # torch 2.13 keeps one store over restarts, and ranks would then read the addresses of dead ranks
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in ("api", "errors.error_handler"):  # their messages repeat ours, less clearly
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="tinytrain-") as scratch:
        _state.scratch = scratch
        tempfile.tempdir = scratch  # torchrun leaves folders behind; ranks do not look for their caches there
        # A rank that finds this variable leaves the printing of its error to this process. It writes the path of the
        # run folder into the file.
        note = Path(scratch) / "run"
        os.environ["TINYTRAIN_AGENT"] = str(note)
        kills_before = _out_of_memory_kills()
        _call_before_close(lambda context: _attend_deaths(context, note, kills_before))
        try:
            torchrun(args)
        except ChildFailedError as failed:
            death = _state.first_death or _reported_failure(list(failed.failures.values()))
            _say(f"error: {_first_cause(note) or death.text}")
            return death.exit_code if death.exit_code > 0 else 128 - death.exit_code
    return 0


def _call_before_close(attend: Callable[[Any], bool]) -> None:
    """Let torchrun call `attend` when it is about to end the ranks, also because one of them died.

    `attend` gets the context of the ranks and returns whether a rank died. Then the others are ended by SIGKILL: they
    would take a SIGTERM for a request to stop, and a failed start must not look like a preemption.

    torchrun has no hook between finding a dead rank and ending the others. This replaces the private method
    `SubprocessContext._close(death_sig, timeout)`, which torch 2.11 to 2.13 call in that place, and reads its public
    attributes `subprocess_handlers` and `error_files`.
    """
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    close = SubprocessContext._close

    def attend_and_close(context: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        attended = hasattr(context, "attended")
        context.attended = True  # torchrun closes twice; ranks that the first time killed did not die by themselves
        died = False if attended else attend(context)
        close(context, signal.SIGKILL if died else death_sig, timeout)

    SubprocessContext._close = attend_and_close  # type: ignore[assignment, method-assign]


# ---------------------------------------------------------------- ranks that died


def _attend_deaths(context: Any, note: Path, kills_before: int) -> bool:
    """Report the first rank that died without an error message; return whether any rank died."""
    _state.first_death = None  # forget the ranks before this restart
    exit_codes = {local: handler.proc.poll() for local, handler in context.subprocess_handlers.items()}
    dead = [local for local, exit_code in exit_codes.items() if exit_code]
    for local in dead:
        error_file = Path(context.error_files[local])
        if not (error_file.is_file() and error_file.stat().st_size):
            pid = context.subprocess_handlers[local].proc.pid
            _report_death(note, local, pid, exit_codes[local], kills_before)
            break
    if dead:
        _wait_for_end(context, CLOSING_SECONDS)
    return bool(dead)


def _wait_for_end(context: Any, seconds: float) -> None:
    """Let the other ranks end by themselves: they were told to abort, or wait in a collective that is broken."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if all(handler.proc.poll() is not None for handler in context.subprocess_handlers.values()):
            return
        time.sleep(0.05)


def _report_death(note: Path, local: int, pid: int, exit_code: int, kills_before: int) -> None:
    """Report a rank that can no longer do it: in error.json, to all ranks, and as the last line of this agent."""
    now = time.time()
    host = socket.gethostname()
    folder = Path(note.read_text()) if note.is_file() else None
    heartbeats: list[Heartbeat] = []
    if folder is not None:
        time.sleep(TICK_SECONDS / 2)  # the other ranks notice soon, and each writes a last heartbeat
        heartbeats = read_heartbeats(folder)
    own = next((beat for beat in heartbeats if (beat["pid"], beat["host"]) == (pid, host)), None)
    step = max((beat["step"] for beat in heartbeats if beat["phase"] not in START_PHASES), default=None)
    name = f"rank {own['rank']}" if own else f"local rank {local}"
    text = _describe_death(f"{name} on {host} (process {pid})", exit_code, step if own else None, kills_before)
    if _state.killed_by:
        text = f"ended by {_state.killed_by}, without saving, after step {step}"
    _state.first_death = RankDeath(text, exit_code)
    if folder is not None and own:
        cause = {"message": text, "rank": own["rank"], "host": host, "step": step, "traceback": "", "time": now}
        error_report.write_error(folder, {**cause, "secondary": False})
        error_report.request_abort(folder, own["world"], text)


def _describe_death(process: str, exit_code: int, step: int | None, kills_before: int) -> str:
    """Return a sentence on how a process ended, with a remedy if memory may have run out."""
    text = f"{process} {_describe_exit(exit_code)}"
    if exit_code > 0:
        text += ", without an error message"
    if step is not None:
        text += f", after step {step}"
    if exit_code == -signal.SIGKILL:
        text += "; the system does so when memory runs out, and a smaller micro_batch_size needs less"
        kills = _out_of_memory_kills() - kills_before
        if kills > 0:
            text += f" (it has killed {kills} process(es) for lack of memory since this run started)"
    return text


def _describe_exit(exit_code: int) -> str:
    return f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"


def _out_of_memory_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory; 0 where it does not count them."""
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


def _reported_failure(failures: list[Any]) -> RankDeath:
    """Return the first failure that torchrun reports: what the rank left in its error file, or how it ended."""
    ended_by_agent = (-signal.SIGTERM, -signal.SIGKILL)  # because another rank had failed
    first = min(failures, key=lambda failure: (failure.exitcode in ended_by_agent, failure.timestamp))
    content = first.error_file_data
    message = content.get("message", {}) if isinstance(content, dict) else {}
    if isinstance(message, dict) and message.get("message"):
        return RankDeath(str(message["message"]), first.exitcode)
    process = f"local rank {first.local_rank} (process {first.pid})"
    return RankDeath(f"{process} {_describe_exit(first.exitcode)}", first.exitcode)
