"""Report ranks that died: those that were killed cannot report it themselves. Decide whether a restart makes sense."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from tinytrain_dist.config.run_folder import ERROR_FILE
from tinytrain_dist.launch.agent_state import MISTAKE, RankDeath, agent
from tinytrain_dist.launch.death_texts import describe_death, describe_exit
from tinytrain_dist.metrics.phase_timer import START_PHASES
from tinytrain_dist.reliability import error_report
from tinytrain_dist.reliability.heartbeats import Heartbeat, read_heartbeats
from tinytrain_dist.reliability.watchdog import TICK_SECONDS
from tinytrain_dist.reliability.world import REGROUP_EXIT_CODE
from tinytrain_dist.utils.atomic_files import read_json_object

CLOSING_SECONDS = 5  # for the other ranks to end by themselves after one rank has died


def report_first_death(context: Any, folder_note: Path, kills_before: int) -> bool:
    """Report the first rank that died without an error message; return whether any rank died."""
    agent.first_death = None  # forget the ranks before this restart
    exit_codes = {local_rank: handler.proc.poll() for local_rank, handler in context.subprocess_handlers.items()}
    dead = [local_rank for local_rank, code in exit_codes.items() if code not in (None, 0, REGROUP_EXIT_CODE)]
    if dead and agent.stopped_in_start:
        agent.over = RankDeath("", 0)
        return True
    for local_rank in dead:
        if not _read_report(context.error_files[local_rank]):
            pid = context.subprocess_handlers[local_rank].proc.pid
            _report_death(folder_note, local_rank, pid, exit_codes[local_rank], kills_before)
            break
    agent.own_failure = _own_failure(dead, context.error_files)
    agent.over = _death_without_restart(dead, exit_codes, context.error_files)
    if dead:
        _wait_for_end(context, CLOSING_SECONDS)
    return bool(dead)


def _read_report(error_file: str) -> dict[str, Any]:
    """Return the message of a rank and what belongs to it, from the file that torchrun gave it; {} if it wrote none."""
    report = read_json_object(Path(error_file)).get("message", {})
    return report if isinstance(report, dict) else {"message": report}


def _own_failure(dead: list[int], error_files: dict[int, str]) -> str:
    """Return how a rank of this node failed first; "" if all have failed because of a rank of another node."""
    for local_rank in dead:
        report = _read_report(error_files[local_rank])
        if not report and agent.first_death is not None:
            return agent.first_death.text
        if report.get("extraInfo", {}).get(error_report.FIRST_HAND) is True:
            return str(report.get("message", ""))
    return ""


def _death_without_restart(
    dead: list[int], exit_codes: dict[int, int], error_files: dict[int, str]
) -> RankDeath | None:
    """Return the death after which a restart in place makes no sense: of a user's mistake, or by a user's wish."""
    if dead and agent.killed_by:
        return agent.first_death
    # A program without handlers has ended as it was asked to. Our training program, if it was started again, would stop
    # in order.
    stopped_by = os.environ.get("TINYTRAIN_STOP") if agent.run_folder is None else None
    for local_rank in dead:
        if stopped_by and -exit_codes[local_rank] in (signal.SIGTERM, _number(stopped_by)):
            return RankDeath(f"stopped by {stopped_by}", -_number(stopped_by))
        report = _read_report(error_files[local_rank])
        if report.get("extraInfo", {}).get(error_report.MAY_RETRY) is False:
            return RankDeath(str(report["message"]), exit_codes[local_rank])
        if not report and exit_codes[local_rank] == MISTAKE:
            return agent.first_death  # of another program, or of Python itself: a wrong argument, no such file
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
    if agent.killed_by:
        text = f"ended by {agent.killed_by}, without saving, after step {step}"
    agent.first_death = RankDeath(text, exit_code)
    if folder is not None and own:
        cause = {"message": text, "rank": own["rank"], "host": host, "step": step, "traceback": "", "time": now}
        error_report.write_error(folder, {**cause, "secondary": False})
        error_report.request_abort(folder, str(own.get("world", "")), text)


def first_cause(folder_note: Path) -> str:
    """Wait for the first cause in error.json, which another node may still write; "" if there is none."""
    end = time.monotonic() + CLOSING_SECONDS
    while folder_note.is_file() and time.monotonic() < end:
        cause = read_json_object(Path(folder_note.read_text()) / ERROR_FILE)
        if cause and not cause.get("secondary"):
            return str(cause.get("message", ""))
        time.sleep(0.1)
    return ""


def reported_failure(failures: list[Any]) -> RankDeath:
    """Return the first failure that torchrun reports: the message in the rank's error file, or how it ended."""
    ended_by_agent = (-signal.SIGTERM, -signal.SIGKILL)  # because another rank had failed
    first = min(failures, key=lambda failure: (failure.exitcode in ended_by_agent, failure.timestamp))
    content = first.error_file_data
    message = content.get("message", {}) if isinstance(content, dict) else {}
    if isinstance(message, dict) and message.get("message"):
        return RankDeath(str(message["message"]), first.exitcode)
    process = f"local rank {first.local_rank} (process {first.pid})"
    return RankDeath(f"{process} {describe_exit(first.exitcode)}", first.exitcode)
