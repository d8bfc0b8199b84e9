"""A torchrun wrapper that survives stop signals and ends by printing the first failing rank's error.

    python -m tinytrain_dist.agent --standalone --nproc_per_node 2 launch/train.py configs/quickstart.toml

torchrun alone loses work or time in six ways:

- SIGUSR1 kills it
- after SIGTERM or Ctrl-C it ends with a traceback and exit code 1, although every rank has saved
- it handles SIGHUP even under nohup, and so ends with its terminal
- when a rank has died, it waits half a minute for other ranks that hang
- after a user's mistake it starts the ranks again, and they fail again
- when a run fails, it prints a page about itself

This wrapper forwards the signals to the ranks, which save and exit 0. It also reports ranks
that were killed and cannot report this themselves. When a run fails, it prints one sentence. Must not know what the
ranks do. Two exceptions: it checks the settings of our training program before it starts ranks, and after a request to
stop it ends ranks of it that hang in their start.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tinytrain_dist.config.run_folder import ERROR_FILE, STATE_FILE
from tinytrain_dist.errors import TinytrainError
from tinytrain_dist.launch.blocked_signals import call_if_not_handled
from tinytrain_dist.launch.death_texts import describe_death, describe_exit, out_of_memory_kills
from tinytrain_dist.launch.node_wait import announce_node_waits
from tinytrain_dist.launch.settings_check import runs_verb, training_config
from tinytrain_dist.launch.snapshot_folder import remove_snapshot_folder, snapshot_folder
from tinytrain_dist.launch.torchrun_options import address_arguments, node_range, parse_torchrun_options
from tinytrain_dist.metrics.phase_timer import START_PHASES
from tinytrain_dist.reliability import error_report
from tinytrain_dist.reliability.heartbeats import Heartbeat, read_heartbeats
from tinytrain_dist.reliability.run_state import ended_within, write_state
from tinytrain_dist.reliability.start_marks import claim
from tinytrain_dist.reliability.stop_requests import STOP_SIGNALS, handle_unless_ignored, unblock_stop_signals
from tinytrain_dist.reliability.watchdog import TICK_SECONDS
from tinytrain_dist.utils.atomic_files import read_json_object
from tinytrain_dist.utils.current_folder import current_folder_problem
from tinytrain_dist.utils.interrupts import MESSAGE
from tinytrain_dist.utils.processes import process_age, raise_open_file_limit
from tinytrain_dist.utils.stale_files import describe_leftovers, owner, remove_leftovers

HANDLED_SIGNALS = (*STOP_SIGNALS, signal.SIGQUIT)  # SIGQUIT (Ctrl-\) ends at once, the others are forwarded
# torchrun handles these even if this process was started with them ignored
TORCHRUN_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
UNUSED_SIGNAL = "SIGURG"  # torchrun must be given one to handle; this is sent only to programs that ask for it
TASKS = Path("/proc/self/task")
SECOND_INTERRUPT_SECONDS = 1.0  # a terminal may deliver one Ctrl-C twice, so only a later one counts as the second
HANDLERS_SECONDS = 10.0  # for a rank's Python to start and to install its signal handlers
CLOSING_SECONDS = 5  # for the other ranks to end by themselves after one rank has died
STOP_IN_START_SECONDS = 5.0  # for a rank in its start to end by itself after a request to stop
WRITING_SECONDS = 5.0  # for the storage of the run folder to take the state
KILLED_SECONDS = 10.0  # for killed ranks to end; the kernel keeps those that wait for a device or for storage
MISTAKE = 2  # exit code of a program that was started in a wrong way, as usual for command lines


@dataclass(frozen=True)
class RankDeath:
    """How the first rank died: a sentence for the user, and its exit code (negative: the signal)."""

    text: str
    exit_code: int


class RunOverError(Exception):
    """The run ends here: torchrun must not start its ranks again."""

    def __init__(self, death: RankDeath) -> None:
        """death: what ends it; its exit code is 0 for a run that was asked to stop."""
        super().__init__(death.text)
        self.death = death


@dataclass
class AgentState:
    """State that the signal handler and the report of a dead rank share. A process has only one agent."""

    run_folder: Path | None = None  # of our training program; None: the ranks run another program
    runs_verb: bool = False  # the ranks run a verb, which has nothing to save and no signal handlers
    folder_note: Path | None = None  # TINYTRAIN_AGENT
    stopper: threading.Thread | None = None  # ends ranks that hang in their start
    stopped_in_start: bool = False  # it has ended some

    first_interrupt: float | None = None  # time.monotonic() of the first Ctrl-C
    killed_by: str = ""  # what has ended the ranks without saving: a second Ctrl-C, or SIGQUIT
    scratch: str = ""  # folder of this agent
    rendezvous_store: Any = None  # kept, because torchrun uses its server
    first_death: RankDeath | None = None  # since the last restart
    ends_rendezvous: bool = False  # torchrun runs, and a run of this number of nodes cannot begin without this one
    over: RankDeath | None = None  # a death after which there is no restart


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
    is_first = "TINYTRAIN_STOP" not in os.environ
    # Ranks that start later find it there and stop in order: a restart in place must not continue training.
    os.environ["TINYTRAIN_STOP"] = signal.Signals(number).name
    if not pids and number != signal.SIGUSR1:
        interrupted = is_first and number == signal.SIGINT and not _has_begun()
        _end_without_ranks(128 + number if _state.runs_verb or interrupted else 0, interrupted)
    _begin_to_stop_hanging_starts()
    if _state.runs_verb:
        number = signal.SIGTERM
    elif number == signal.SIGINT:
        number = _count_interrupt()
    elif number == signal.SIGQUIT:
        number = _kill_at_once("SIGQUIT")
    end = time.monotonic() + HANDLERS_SECONDS
    for pid in pids:
        _wait_for_handler(pid, number, end)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _has_begun() -> bool:
    """Return whether a rank of this node has begun; it may have ended since."""
    return _state.folder_note is not None and _state.folder_note.is_file()


def _end_without_ranks(code: int, interrupted: bool) -> None:
    """End this agent, which has no ranks, so there is nothing to save."""
    if interrupted:
        _say(MESSAGE)
    if not _state.ends_rendezvous:
        _exit_now(code)
    _state.ends_rendezvous = False  # a second signal must not wait for the store of the head
    raise RunOverError(RankDeath("", code))  # torchrun then closes the rendezvous, so that no other node waits for this


def _stop_waiting_for_nodes() -> None:
    """End the agent if it has no ranks yet; a stop signal has come, and torch waits for another node in native code."""
    if not any(rank_pids()):
        _exit_now(0)


def _exit_now(code: int) -> NoReturn:
    """End this process wherever it is, and leave no folder behind."""
    if _state.scratch:
        shutil.rmtree(_state.scratch, ignore_errors=True)
    remove_snapshot_folder()
    os._exit(code)


def _count_interrupt() -> int:
    """Tell the user what this Ctrl-C does, and return the signal to send to the ranks."""
    now = time.monotonic()
    if _state.first_interrupt is not None and now - _state.first_interrupt > SECOND_INTERRUPT_SECONDS:
        since, _state.first_interrupt = now - _state.first_interrupt, now
        if _state.run_folder is not None and ended_within(_state.run_folder, since):
            _say("\nending; everything is saved")
            return signal.SIGINT  # the ranks only wait for copies
        return _kill_at_once("a second Ctrl-C")
    if _state.first_interrupt is None:
        _state.first_interrupt = now
    _say("\nsaving and stopping; press Ctrl-C again to end immediately, without saving")
    return signal.SIGINT


def _kill_at_once(cause: str) -> int:
    """Note what ends the ranks without saving; return the signal that they get."""
    _state.killed_by = cause
    _say("\nending immediately, without saving")
    return signal.SIGKILL


def _say(text: str) -> None:
    """Print a line. The terminal may be gone: then a signal handler, or the report of an error, must still work."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: from a handler, within a print
        print(text, file=sys.stderr, flush=True)


def _wait_for_handler(pid: int, number: int, end: float) -> None:
    """Wait until a rank has installed its signal handlers. Before that, the signal would kill it.

    end: when to stop waiting, by time.monotonic(). A program that is not ours may have no handlers, so it is not waited
    for if it has run for some seconds.
    """
    if number == signal.SIGKILL or _state.runs_verb:
        return
    if _state.run_folder is None:
        end = min(end, time.monotonic() + HANDLERS_SECONDS - process_age(pid))
    while not _handles(pid, number) and time.monotonic() < end:
        time.sleep(0.02)


def _handles(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal; True for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = re.search(r"SigCgt:\s*(\w+)", status)  # a bit mask in hexadecimal; bit 0 is signal 1
    ended = re.search(r"State:\s*Z", status)
    return caught is None or ended is not None or bool(int(caught[1], 16) >> (number - 1) & 1)


# ---------------------------------------------------------------- ranks that hang in their start


def _begin_to_stop_hanging_starts() -> None:
    """Start the thread for that, once, if the ranks run our training program."""
    if _state.stopper is None and _state.run_folder is not None:
        _state.stopper = threading.Thread(target=_stop_hanging_starts, daemon=True)
        _state.stopper.start()


def _stop_hanging_starts() -> None:
    """After a request to stop, end each rank that is in its start and does not end by itself; the body of a thread.

    A rank may be blocked in a system call, and then none of its threads runs. It has nothing to save yet.
    """
    assert _state.folder_note is not None
    first_seen: dict[int, float] = {}
    hanging: list[int] = []
    while not hanging:
        time.sleep(0.5)
        pids = list(rank_pids())
        now = time.monotonic()
        for pid in pids:
            is_late = now - first_seen.setdefault(pid, now) > STOP_IN_START_SECONDS
            # a rank without a handler for our own signal has not come as far as its mark
            if is_late and (claim(_state.folder_note, pid) or not _handles(pid, signal.SIGUSR1)):
                hanging.append(pid)
    _state.stopped_in_start = True
    _say("stopped during the start, before the first step, so nothing was saved")
    writer = threading.Thread(target=_write_preempted, args=(pids, hanging), daemon=True)
    writer.start()
    writer.join(WRITING_SECONDS)  # it may be this storage that hangs
    for pid in hanging:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(KILLED_SECONDS)
    _exit_now(0)


def _write_preempted(pids: list[int], hanging: list[int]) -> None:
    """Write what ranks that hang in their start cannot: state.json, and the request to the ranks of other nodes.

    pids: the ranks of this node. The state is written as the watchdog of rank 0 would.
    """
    assert _state.run_folder is not None
    assert _state.folder_note is not None
    folder = _state.run_folder
    host = socket.gethostname()
    launch_ids = [beat["world"] for beat in read_heartbeats(folder) if beat["host"] == host and beat["pid"] in hanging]
    for launch_id in filter(None, launch_ids):
        error_report.request_abort(folder, launch_id, "stopped during the start", state="preempted")
    if any(_has_rank_0(pid) for pid in pids) and (_state.folder_note.is_file() or "TINYTRAIN_ATTEMPT" in os.environ):
        folder.mkdir(parents=True, exist_ok=True)
        write_state(folder, "preempted", read_json_object(folder / STATE_FILE).get("step"))


def _has_rank_0(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"RANK=0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


# ---------------------------------------------------------------- the program


def main(args: list[str]) -> int:
    """Run torchrun with its arguments; return 0, the exit code of the first failing rank, or 2 for a wrong setting."""
    raise_open_file_limit()
    if TASKS.is_dir():  # Linux
        handle_unless_ignored(HANDLED_SIGNALS, forward_signal)  # before torch is imported, which takes seconds
        call_if_not_handled(STOP_SIGNALS, lambda: "TINYTRAIN_STOP" in os.environ, _stop_waiting_for_nodes)
        of_torchrun = []
    else:  # on other systems torchrun handles the signals itself
        unblock_stop_signals()
        of_torchrun = [name for name in TORCHRUN_SIGNALS if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN]
    _state.runs_verb = runs_verb(args)
    args = [f"--signals-to-handle={','.join(of_torchrun or [UNUSED_SIGNAL])}", *args]
    try:
        if problem := current_folder_problem():
            raise TinytrainError(problem)
        config = training_config(args)
    except TinytrainError as mistake:
        _say(f"error: {mistake}")
        return MISTAKE
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    from tinytrain_dist.distributed.torch_internals import serve_new_store_to_each_round, serve_rendezvous

    serve_new_store_to_each_round()
    options = parse_torchrun_options(args)
    _state.rendezvous_store = serve_rendezvous(options.rdzv_endpoint)
    args = [*address_arguments(options), *args]
    for name in ("api", "errors.error_handler"):  # their messages repeat ours, less clearly
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    if removed := remove_leftovers(Path(tempfile.gettempdir())):
        print(describe_leftovers(removed), file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=f"tinytrain-{owner()}-") as scratch, snapshot_folder(config, options):
        _state.scratch = scratch
        tempfile.tempdir = scratch  # torchrun leaves its temporary folders behind; here they are removed
        folder_note = Path(scratch) / "run"
        _state.folder_note = folder_note
        _state.run_folder = Path(config.target_dir) if config else None
        if "TINYTRAIN_STOP" in os.environ:  # SIGUSR1 came before
            _begin_to_stop_hanging_starts()
        # a rank that finds this variable writes its run folder into the file, and lets the agent print its error
        os.environ["TINYTRAIN_AGENT"] = str(folder_note)
        kills_before = out_of_memory_kills()
        _call_before_close(lambda context: _report_first_death(context, folder_note, kills_before))
        announce_node_waits(options, lambda: any(rank_pids()))
        fewest, most = node_range(options)
        _state.ends_rendezvous = 1 < fewest == most
        try:
            torchrun(args)
            return 0
        except RunOverError as over:
            death = over.death
        except ChildFailedError as failed:
            death = _state.first_death or _reported_failure(list(failed.failures.values()))
        except RendezvousError as failed:
            death = RankDeath(_describe_missing_nodes(options, failed), 1)
        if death.exit_code and death.text:
            _say(f"error: {_first_cause(folder_note) or death.text}")
        return death.exit_code if death.exit_code >= 0 else 128 - death.exit_code


def _describe_missing_nodes(options: argparse.Namespace, error: Exception) -> str:
    """Describe why the nodes did not come together: torch's exception says only that it took too long or was closed."""
    where = f" at {options.rdzv_endpoint}" if options.rdzv_endpoint else ""
    if "Timeout" not in type(error).__name__:
        return f"another node has ended the rendezvous{where}, or cannot be reached any more; its own log says why"
    return (
        f"only some of the {options.nnodes} nodes joined{where} in time; start the others, or see in their logs what "
        "keeps them, and check the address with `tinytrain doctor`"
    )


def _call_before_close(report_death: Callable[[Any], bool]) -> None:
    """Let torchrun call `report_death` before it ends the ranks, for example because one of them died.

    report_death: gets torchrun's context of the ranks, and returns whether a rank died. If so, the others are ended by
    SIGKILL. After SIGTERM they would report a preemption, although the run has failed. Where a restart in place makes
    no sense (`AgentState.over`), RunOverError is raised through torchrun.

    torchrun has no hook between finding a dead rank and ending the others.
    """
    from tinytrain_dist.distributed.torch_internals import wrap_worker_close

    def make_close(close: Callable[..., None]) -> Callable[..., None]:
        def report_and_close(context: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
            is_first_call = not hasattr(context, "tinytrain_closed")
            context.tinytrain_closed = True
            # torchrun closes twice; the second time, ranks are dead because the first call killed them
            died = is_first_call and report_death(context)
            close(context, signal.SIGKILL if died else death_sig, timeout)
            if died and _state.over is not None:
                raise RunOverError(_state.over)

        return report_and_close

    wrap_worker_close(make_close)


# ---------------------------------------------------------------- ranks that died


def _report_first_death(context: Any, folder_note: Path, kills_before: int) -> bool:
    """Report the first rank that died without an error message; return whether any rank died."""
    _state.first_death = None  # forget the ranks before this restart
    exit_codes = {local_rank: handler.proc.poll() for local_rank, handler in context.subprocess_handlers.items()}
    dead = [local_rank for local_rank, exit_code in exit_codes.items() if exit_code]
    if dead and _state.stopped_in_start:
        _state.over = RankDeath("", 0)
        return True
    for local_rank in dead:
        if not _read_report(context.error_files[local_rank]):
            pid = context.subprocess_handlers[local_rank].proc.pid
            _report_death(folder_note, local_rank, pid, exit_codes[local_rank], kills_before)
            break
    _state.over = _death_without_restart(dead, exit_codes, context.error_files)
    if dead:
        _wait_for_end(context, CLOSING_SECONDS)
    return bool(dead)


def _read_report(error_file: str) -> dict[str, Any]:
    """Return the message of a rank and what belongs to it, from the file that torchrun gave it; {} if it wrote none."""
    report = read_json_object(Path(error_file)).get("message", {})
    return report if isinstance(report, dict) else {"message": report}


def _death_without_restart(
    dead: list[int], exit_codes: dict[int, int], error_files: dict[int, str]
) -> RankDeath | None:
    """Return the death after which a restart in place makes no sense: of a user's mistake, or by a user's wish."""
    if dead and _state.killed_by:
        return _state.first_death
    # A program without handlers has ended as it was asked to. Our training program, if it was started again, would stop
    # in order.
    stopped_by = os.environ.get("TINYTRAIN_STOP") if _state.run_folder is None else None
    for local_rank in dead:
        if stopped_by and -exit_codes[local_rank] in (signal.SIGTERM, _number(stopped_by)):
            return RankDeath(f"stopped by {stopped_by}", -_number(stopped_by))
        report = _read_report(error_files[local_rank])
        if report.get("extraInfo", {}).get(error_report.MAY_RETRY) is False:
            return RankDeath(str(report["message"]), exit_codes[local_rank])
        if not report and exit_codes[local_rank] == MISTAKE:
            return _state.first_death  # of another program, or of Python itself: a wrong argument, no such file
    return None


def _number(name: str) -> int:
    return int(signal.Signals[name])


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
    text = describe_death(f"{name} on {host} (process {pid})", exit_code, step if own else None, kills_before)
    if _state.killed_by:
        text = f"ended by {_state.killed_by}, without saving, after step {step}"
    _state.first_death = RankDeath(text, exit_code)
    if folder is not None and own:
        cause = {"message": text, "rank": own["rank"], "host": host, "step": step, "traceback": "", "time": now}
        error_report.write_error(folder, {**cause, "secondary": False})
        error_report.request_abort(folder, str(own.get("world", "")), text)


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
    return RankDeath(f"{process} {describe_exit(first.exitcode)}", first.exitcode)
