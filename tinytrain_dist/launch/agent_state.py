"""What the parts of an agent share: how its ranks ended, what it was asked, and how it finds, tells and ends.

Must not know torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tinytrain_dist.launch.snapshot_folder import remove_snapshot_folder

TASKS = Path("/proc/self/task")
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
    leaves: bool = False  # this node was asked to leave an elastic run, whose other nodes train on
    own_failure: str = ""  # how a rank of this node failed first, and not because of another node
    over: RankDeath | None = None  # a death after which there is no restart
    standbys: set[int] = field(default_factory=set)  # process IDs of those that wait to become ranks
    called_up: dict[int, list[str]] = field(default_factory=dict)  # NAME=VALUE that former standbys were given, by ID
    joins_again: bool = False  # this node was cut off and has ended its ranks; its agent is to start from the beginning


agent = AgentState()


def rank_pids() -> Iterator[int]:
    """Yield the process IDs of the ranks: those children of this process that lead a session.

    Standbys lead one as well, but wait to become ranks.
    """
    for task in TASKS.iterdir():
        children = ""
        with contextlib.suppress(OSError):  # this thread has just ended
            children = (task / "children").read_text()
        for pid in map(int, children.split()):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == pid and pid not in agent.standbys:
                    yield pid


def handles(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal; True for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = re.search(r"SigCgt:\s*(\w+)", status)  # a bit mask in hexadecimal; bit 0 is signal 1
    ended = re.search(r"State:\s*Z", status)
    return caught is None or ended is not None or bool(int(caught[1], 16) >> (number - 1) & 1)


def say(text: str) -> None:
    """Print a line. The terminal may be gone: then a signal handler, or the report of an error, must still work."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: from a handler, within a print
        print(text, file=sys.stderr, flush=True)


def exit_now(code: int) -> NoReturn:
    """End this process wherever it is, and leave no folder behind."""
    if agent.scratch:
        shutil.rmtree(agent.scratch, ignore_errors=True)
    remove_snapshot_folder()
    for pid in agent.standbys:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(code)
