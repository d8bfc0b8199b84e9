"""A torchrun wrapper that survives stop signals and ends by printing the first failing rank's error.

    python -m tinytrain_dist.agent --standalone --nproc_per_node 2 launch/train.py configs/quickstart.toml

torchrun alone loses work or time in four ways:

- SIGUSR1 kills it
- after SIGTERM or Ctrl-C it ends with a traceback and exit code 1, although every rank has saved
- when a rank has died, it waits half a minute for other ranks that hang
- when a run fails, it prints a page about itself

This wrapper forwards the signals to the ranks, which save and exit 0. It also reports ranks
that were killed and cannot report this themselves. When a run fails, it prints one sentence. Must not know what the
ranks do.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tinytrain_dist.config.run_folder import ERROR_FILE
from tinytrain_dist.launch.node_wait import announce_node_waits
from tinytrain_dist.metrics.phase_timer import START_PHASES
from tinytrain_dist.reliability import error_report
from tinytrain_dist.reliability.heartbeats import Heartbeat, read_heartbeats
from tinytrain_dist.reliability.watchdog import TICK_SECONDS
from tinytrain_dist.utils.atomic_files import read_json_object
from tinytrain_dist.utils.leftovers import describe_leftovers, owner, remove_leftovers

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TASKS = Path("/proc/self/task")
SECOND_INTERRUPT_SECONDS = 1.0  # a terminal may deliver one Ctrl-C twice, so only a later one counts as the second
HANDLERS_SECONDS = 10.0  # for a rank's Python to start and to install its signal handlers
CLOSING_SECONDS = 5  # for the other ranks to end by themselves after one rank has died


@dataclass(frozen=True)
class RankDeath:
    """How the first rank died: a sentence for the user, and its exit code (negative: the signal)."""

    text: str
    exit_code: int


@dataclass
class AgentState:
    """State that the signal handler and the report of a dead rank share. A process has only one agent."""

    first_interrupt: float | None = None  # time.monotonic() of the first Ctrl-C
    killed_by_user: bool = False  # whether a second Ctrl-C has ended the ranks without saving
    first_death: RankDeath | None = None  # since the last restart


_state = AgentState()


# ---------------------------------------------------------------- signals


def rank_pids() -> Iterator[int]:
    """Yield the process IDs of the ranks: those children of this process that lead a session."""
    for task in TASKS.iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == pid:
                    yield pid


def forward_signal(number: int, _: FrameType | None) -> None:
    """Forward a signal to the ranks. A second Ctrl-C, at least a second later, ends all without saving."""
    pids = list(rank_pids())
    if number == signal.SIGINT and pids:
        number = _count_interrupt()
    for pid in pids:
        _wait_for_handler(pid, number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if number == signal.SIGUSR1:
        os.environ["TINYTRAIN_STOP"] = "SIGUSR1"  # ranks that start later read it, and stop as if they had received it
    elif not pids:
        os._exit(128 + number)  # no rank runs yet, so there is nothing to save


def _count_interrupt() -> int:
    """Tell the user what this Ctrl-C does, and return the signal to send to the ranks."""
    now = time.monotonic()
    if _state.first_interrupt is not None and now - _state.first_interrupt > SECOND_INTERRUPT_SECONDS:
        _state.killed_by_user = True
        print("\nending immediately, without saving", file=sys.stderr, flush=True)
        return signal.SIGKILL
    if _state.first_interrupt is None:
        _state.first_interrupt = now
    print("\nsaving and stopping; press Ctrl-C again to end immediately, without saving", file=sys.stderr, flush=True)
    return signal.SIGINT


def _wait_for_handler(pid: int, number: int) -> None:
    """Wait until a rank has installed its signal handlers. Before that, the signal would kill it."""
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
    """Run torchrun with its arguments; return 0, or the exit code of the first failing rank."""
    if TASKS.is_dir():  # Linux; on other systems torchrun handles the signals itself
        for number in FORWARDED_SIGNALS:
            signal.signal(number, forward_signal)  # before torch is imported, which takes seconds
        args = ["--signals-to-handle=SIGHUP,SIGQUIT", *args]
    # torch 2.13 keeps one store across restarts, in which ranks would read the addresses of dead ranks
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in ("api", "errors.error_handler"):  # their messages repeat ours, less clearly
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    if removed := remove_leftovers(Path(tempfile.gettempdir())):
        print(describe_leftovers(removed), file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=f"tinytrain-{owner()}-") as scratch:
        tempfile.tempdir = scratch  # torchrun leaves its temporary folders behind; here they are removed
        # If this variable is set, a rank writes the path of the run folder into the file that it names, and lets this
        # process print its error.
        folder_note = Path(scratch) / "run"
        os.environ["TINYTRAIN_AGENT"] = str(folder_note)
        kills_before = _out_of_memory_kills()
        _call_before_close(lambda context: _report_first_death(context, folder_note, kills_before))
        announce_node_waits(args, lambda: any(rank_pids()))
        try:
            torchrun(args)
        except ChildFailedError as failed:
            death = _state.first_death or _reported_failure(list(failed.failures.values()))
            print(f"error: {_first_cause(folder_note) or death.text}", file=sys.stderr)
            return death.exit_code if death.exit_code > 0 else 128 - death.exit_code
    return 0


def _call_before_close(report_death: Callable[[Any], bool]) -> None:
    """Let torchrun call `report_death` before it ends the ranks, for example because one of them died.

    report_death: gets torchrun's context of the ranks, and returns whether a rank died. If so, the others are ended by
    SIGKILL. After SIGTERM they would report a preemption, although the run has failed.

    torchrun has no hook between finding a dead rank and ending the others. This replaces the private method
    `SubprocessContext._close(death_sig, timeout)`, which torch 2.11 to 2.13 call at that point, and reads its public
    attributes `subprocess_handlers` and `error_files`.
    """
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    close = SubprocessContext._close

    def report_and_close(context: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        is_first_call = not hasattr(context, "tinytrain_closed")
        context.tinytrain_closed = True
        # torchrun closes twice; the second time, ranks are dead because the first call killed them
        died = is_first_call and report_death(context)
        close(context, signal.SIGKILL if died else death_sig, timeout)

    SubprocessContext._close = report_and_close  # type: ignore[assignment, method-assign]


# ---------------------------------------------------------------- ranks that died


def _report_first_death(context: Any, folder_note: Path, kills_before: int) -> bool:
    """Report the first rank that died without an error message; return whether any rank died."""
    _state.first_death = None  # forget the ranks before this restart
    exit_codes = {local_rank: handler.proc.poll() for local_rank, handler in context.subprocess_handlers.items()}
    dead = [local_rank for local_rank, exit_code in exit_codes.items() if exit_code]
    for local_rank in dead:
        error_file = Path(context.error_files[local_rank])
        if not (error_file.is_file() and error_file.stat().st_size):
            pid = context.subprocess_handlers[local_rank].proc.pid
            _report_death(folder_note, local_rank, pid, exit_codes[local_rank], kills_before)
            break
    if dead:
        _wait_for_end(context, CLOSING_SECONDS)
    return bool(dead)


def _wait_for_end(context: Any, seconds: float) -> None:
    """Let the other ranks end by themselves: they abort on request, or fail in a broken collective."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if all(handler.proc.poll() is not None for handler in context.subprocess_handlers.values()):
            return
        time.sleep(0.05)


def _report_death(folder_note: Path, local_rank: int, pid: int, exit_code: int, kills_before: int) -> None:
    """Report the death of a rank: in error.json, to all ranks, and as the last line of this agent."""
    now = time.time()
    host = socket.gethostname()
    folder = Path(folder_note.read_text()) if folder_note.is_file() else None
    heartbeats: list[Heartbeat] = []
    if folder is not None:
        time.sleep(TICK_SECONDS / 2)  # by then the other ranks have written a last heartbeat
        heartbeats = read_heartbeats(folder)
    own = next((beat for beat in heartbeats if beat["pid"] == pid and beat["host"] == host), None)
    steps = [beat["step"] for beat in heartbeats if beat["phase"] not in START_PHASES]
    step = max(steps, default=None)
    name = f"rank {own['rank']}" if own else f"local rank {local_rank}"
    text = _describe_death(f"{name} on {host} (process {pid})", exit_code, step if own else None, kills_before)
    if _state.killed_by_user:
        text = f"ended by a second Ctrl-C, without saving, after step {step}"
    _state.first_death = RankDeath(text, exit_code)
    if folder is not None and own:
        cause = {"message": text, "rank": own["rank"], "host": host, "step": step, "traceback": "", "time": now}
        error_report.write_error(folder, {**cause, "secondary": False})
        error_report.request_abort(folder, str(own.get("world", "")), text)


def _describe_death(process: str, exit_code: int, step: int | None, kills_before: int) -> str:
    """Return a sentence about how a process ended, with a remedy if memory may have run out."""
    text = f"{process} {_describe_exit(exit_code)}"
    if exit_code > 0:
        text += ", without an error message"
    if step is not None:
        text += f", after step {step}"
    if exit_code == -signal.SIGKILL:
        text += "; the kernel does this when memory runs out; a smaller micro_batch_size needs less memory"
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


def _first_cause(folder_note: Path) -> str:
    """Wait for the first cause in error.json, which another node may still write; "" if there is none."""
    end = time.monotonic() + CLOSING_SECONDS
    while folder_note.is_file() and time.monotonic() < end:
        cause = read_json_object(Path(folder_note.read_text()) / ERROR_FILE)
        if cause and not cause.get("secondary"):
            return str(cause.get("message", ""))
        time.sleep(0.1)
    return ""


def _reported_failure(failures: list[Any]) -> RankDeath:
    """Return the first failure that torchrun reports: the message in the rank's error file, or how it ended."""
    ended_by_agent = (-signal.SIGTERM, -signal.SIGKILL)  # because another rank had failed
    first = min(failures, key=lambda failure: (failure.exitcode in ended_by_agent, failure.timestamp))
    content = first.error_file_data
    message = content.get("message", {}) if isinstance(content, dict) else {}
    if isinstance(message, dict) and message.get("message"):
        return RankDeath(str(message["message"]), first.exitcode)
    process = f"local rank {first.local_rank} (process {first.pid})"
    return RankDeath(f"{process} {_describe_exit(first.exitcode)}", first.exitcode)
