"""Owns the way from a command line to an exit code: parse, join the world, train, and report what went wrong.

Must not know how training works. The first failing rank's sentence is the last thing it prints, and error.json has it.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import time
import traceback
from typing import NoReturn

from tinytrain_dist import failure
from tinytrain_dist.commandline import parse_command_line
from tinytrain_dist.errors import DataError, MeetingError, TinytrainError
from tinytrain_dist.stopping import owns
from tinytrain_dist.watchdog import START, TICK_SECONDS, Watchdog

# what the death of another rank looks like
OF_PEERS = re.compile(r"(?i)gloo|nccl|connection|socket|broken pipe|tcpstore")


def main(args: list[str]) -> NoReturn:
    """Run `[CONFIG.toml] --settings` and end: 0 when done or stopped as asked, 2 for a user's mistake, else 1."""
    watchdog: Watchdog | None = None
    try:
        config = parse_command_line(args)
        from tinytrain_dist import distributed  # torch takes seconds; a wrong setting need not wait for it
        from tinytrain_dist.trainer import Trainer

        faulthandler.enable()  # a crash in native code leaves a stack too
        watchdog = Watchdog(config, distributed.who(), _say, distributed.flight_record)
        context = distributed.start(config.device, watchdog.longest_limit + 300.0, traces=watchdog.folder / "logs")
        watchdog.joined(context.world)
        Trainer(config, context, watchdog.pulse).fit()
    except BaseException as error:
        if isinstance(error, SystemExit):  # --help
            raise
        _fail(watchdog, error)
    watchdog.close()
    distributed.close()
    # native threads of stores and groups can outlive the interpreter, whose end then aborts a run that is done (seen:
    # "terminate called", its agent began a new round, and the other node's waited for it)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _say(message: str, aloud: bool = True) -> None:
    """A last sentence: the agent prints it, or else, `aloud`, this rank."""
    if not failure.tell_launcher(message) and aloud:
        print(f"error: {message}", file=sys.stderr, flush=True)


def _fail(watchdog: Watchdog | None, error: BaseException) -> NoReturn:
    """Tell what happened and end at once: leaving the process group in order would wait for ranks that hang."""
    from tinytrain_dist import distributed

    now, trace = time.time(), traceback.format_exc()
    # a token file that goes away while it is read, by one rank alone, is nothing that all have raised together
    alone = isinstance(error, DataError) and watchdog is not None and watchdog.pulse.phase not in START
    expected = isinstance(error, TinytrainError) and not alone  # raised on all ranks, so one of them says it
    of_peers = isinstance(error, RuntimeError) and OF_PEERS.search(str(error)) is not None
    rank, _, host = distributed.who()
    step = watchdog.pulse.step if watchdog and watchdog.pulse.phase not in START else None
    where = f"rank {rank} on {host}" + (f", after step {step}" if step is not None else "")
    message = str(error) if expected else f"{where}: {type(error).__name__}: {error}"
    if watchdog and of_peers:  # whoever has caused it says so in a moment, and then the watchdog ends this rank as well
        watchdog.beat()
        time.sleep(2 * TICK_SECONDS)
    if watchdog and owns(watchdog.folder) and (rank == 0 or not expected):  # never into another process's run
        cause = {"message": message, "rank": rank, "host": host, "step": step, "time": now, "secondary": of_peers}
        failure.report(watchdog.folder, {**cause, "traceback": "" if expected else trace})
    elif watchdog and expected:
        watchdog.close()  # a mistake leaves no new folder behind
    print("" if expected else trace, end="", file=sys.stderr, flush=True)
    _say(message, aloud=rank == 0 or not expected or isinstance(error, MeetingError))
    sys.stdout.flush()
    if watchdog and not expected:
        failure.end_all(watchdog.folder, watchdog.world, message)
    os._exit(2 if expected else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
