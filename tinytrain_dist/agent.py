"""torchrun that outlives the signals that ask for a stop, and whose last words are the first failing rank's.

    python -m tinytrain_dist.agent --standalone --nproc_per_node 2 launch/train.py configs/quickstart.toml

torchrun itself dies of SIGUSR1, turns SIGTERM and Ctrl-C into a traceback and exit code 1 although every rank has
saved, and ends a failed run with a page about itself. This passes the signals on to the ranks, which save and exit 0,
and prints one sentence. Owns the ranks' lives; must not know what they do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TASKS = Path("/proc/self/task")
SECOND_THOUGHT_SECONDS = 1.0
_first_interrupt = [0.0]


def ranks() -> Iterator[int]:
    """Process ids of the ranks: our children that lead a session."""
    for task in TASKS.iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == pid:
                    yield pid


def forward(number: int, _: FrameType | None) -> None:
    """Pass a signal on; a second Ctrl-C, a second thought later, ends everything without saving."""
    pids = list(ranks())
    now = time.monotonic()
    if number == signal.SIGINT and pids:
        impatient = _first_interrupt[0] and now - _first_interrupt[0] > SECOND_THOUGHT_SECONDS
        _first_interrupt[0] = _first_interrupt[0] or now
        number = signal.SIGKILL if impatient else signal.SIGINT
        text = "ending at once" if impatient else "saving and stopping; Ctrl-C again ends at once, without saving"
        print(f"\n{text}", file=sys.stderr, flush=True)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if not pids and number != signal.SIGUSR1:
        os._exit(128 + number)  # nothing runs yet, so nothing is to be saved


def main(args: list[str]) -> int:
    """Run torchrun's command line; its exit code, or the first failing rank's."""
    if TASKS.is_dir():  # Linux; elsewhere torchrun's own ways with signals must do
        for number in FORWARDED:
            signal.signal(number, forward)  # before torch is imported, which takes seconds
        args = ["--signals-to-handle=SIGHUP,SIGQUIT", *args]
    # torch 2.13 keeps one store over restarts and ranks then read the addresses of dead ones
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ["TINYTRAIN_AGENT"] = "1"  # a rank's sentence is printed here, once
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in ("api", "errors.error_handler"):  # they say what we say, less clearly
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    try:
        torchrun(args)
    except ChildFailedError as failed:
        failures = list(failed.failures.values())
        # a rank that was killed left no note, and what its peers report is of its death
        killed = [one for one in failures if one.exitcode < 0 and -one.exitcode != signal.SIGTERM]
        failure = min(killed or failures, key=lambda one: one.timestamp)
        print(f"error: {_reason(failure)}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _reason(failure: Any) -> str:
    """What the rank left in its error file, or how its process ended."""
    told = failure.error_file_data.get("message", {}) if isinstance(failure.error_file_data, dict) else {}
    if isinstance(told, dict) and told.get("message"):
        return str(told["message"])
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"local rank {failure.local_rank} (process {failure.pid}) {how}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
