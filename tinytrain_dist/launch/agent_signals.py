"""Forward stop signals from an agent to its ranks, and end the agent where there are none.

Must not know what the ranks do, with one exception: a rank of our training program that hangs in its start is ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType

from tinytrain_dist.launch.agent_state import RankDeath, RunOverError, agent, exit_now, handles, rank_pids, say
from tinytrain_dist.launch.hanging_starts import begin_to_stop_hanging_starts
from tinytrain_dist.reliability.run_state import ended_within
from tinytrain_dist.utils.interrupts import MESSAGE
from tinytrain_dist.utils.processes import process_age

SECOND_INTERRUPT_SECONDS = 1.0  # a terminal may deliver one Ctrl-C twice, so only a later one counts as the second
HANDLERS_SECONDS = 10.0  # for a rank's Python to start and to install its signal handlers


def forward_signal(number: int, _: FrameType | None) -> None:
    """Forward a signal to the ranks. A second Ctrl-C, at least a second later, ends all without saving."""
    pids = list(rank_pids())
    is_first = "TINYTRAIN_STOP" not in os.environ
    # Ranks that start later find it there and stop in order: a restart in place must not continue training.
    os.environ["TINYTRAIN_STOP"] = signal.Signals(number).name
    if not pids and number != signal.SIGUSR1:
        interrupted = is_first and number == signal.SIGINT and not _has_begun()
        _end_without_ranks(128 + number if agent.runs_verb or interrupted else 0, interrupted)
    begin_to_stop_hanging_starts()
    if agent.runs_verb:
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
    return agent.folder_note is not None and agent.folder_note.is_file()


def _end_without_ranks(code: int, interrupted: bool) -> None:
    """End this agent, which has no ranks, so there is nothing to save."""
    if interrupted:
        say(MESSAGE)
    if not agent.ends_rendezvous:
        exit_now(code)
    agent.ends_rendezvous = False  # a second signal must not wait for the store of the head
    raise RunOverError(RankDeath("", code))  # torchrun then closes the rendezvous, so that no other node waits for this


def stop_waiting_for_nodes() -> None:
    """End the agent if it has no ranks yet; a stop signal has come, and torch waits for another node in native code."""
    if not any(rank_pids()):
        exit_now(0)


def _count_interrupt() -> int:
    """Tell the user what this Ctrl-C does, and return the signal to send to the ranks."""
    now = time.monotonic()
    if agent.first_interrupt is not None and now - agent.first_interrupt > SECOND_INTERRUPT_SECONDS:
        since, agent.first_interrupt = now - agent.first_interrupt, now
        if agent.run_folder is not None and ended_within(agent.run_folder, since):
            say("\nending; everything is saved")
            return signal.SIGINT  # the ranks only wait for copies
        return _kill_at_once("a second Ctrl-C")
    if agent.first_interrupt is None:
        agent.first_interrupt = now
    say("\nsaving and stopping; press Ctrl-C again to end immediately, without saving")
    return signal.SIGINT


def _kill_at_once(cause: str) -> int:
    """Note what ends the ranks without saving; return the signal that they get."""
    agent.killed_by = cause
    say("\nending immediately, without saving")
    return signal.SIGKILL


def _wait_for_handler(pid: int, number: int, end: float) -> None:
    """Wait until a rank has installed its signal handlers. Before that, the signal would kill it.

    end: when to stop waiting, by time.monotonic(). A program that is not ours may have no handlers, so it is not waited
    for if it has run for some seconds.
    """
    if number == signal.SIGKILL or agent.runs_verb:
        return
    if agent.run_folder is None:
        end = min(end, time.monotonic() + HANDLERS_SECONDS - process_age(pid))
    while not handles(pid, number) and time.monotonic() < end:
        time.sleep(0.02)
