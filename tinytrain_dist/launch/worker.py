"""Run training in one rank: from a command line to an exit code, with a report of what went wrong.

Must not know how training works. The first failing rank's error is the last line printed, and error.json has it.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import time
import traceback
from typing import NoReturn

from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.config.run_folder import LOGS_FOLDER
from tinytrain_dist.errors import DataError, RendezvousError, TinytrainError
from tinytrain_dist.reliability import error_report
from tinytrain_dist.reliability.run_state import owns_run
from tinytrain_dist.reliability.watchdog import START_PHASES, TICK_SECONDS, Watchdog

# what the death of another rank looks like
PEER_FAILURE = re.compile(r"(?i)gloo|nccl|connection|socket|broken pipe|tcpstore")


def main(args: list[str]) -> NoReturn:
    """Run `[CONFIG.toml] --settings` and end: 0 when done or stopped as asked, 2 for a user's mistake, else 1."""
    watchdog: Watchdog | None = None
    try:
        config = parse_command_line(args)
        # torch takes seconds; a wrong setting need not wait for it
        from tinytrain_dist.distributed.context import flight_record, init_distributed, launcher_rank, shutdown
        from tinytrain_dist.training.trainer import Trainer

        faulthandler.enable()  # a crash in native code leaves a stack too
        watchdog = Watchdog(config, launcher_rank(), _say, flight_record)
        context = init_distributed(config.device, watchdog.longest_limit + 300.0, traces=watchdog.folder / LOGS_FOLDER)
        watchdog.joined(context.launch_id)
        Trainer.build(config, context, watchdog.phase_timer).fit()
    except BaseException as error:
        if isinstance(error, SystemExit):  # --help
            raise
        _fail(watchdog, error)
    watchdog.close()
    shutdown()
    # native threads of stores and groups can outlive the interpreter, whose end then aborts a run that is done (seen:
    # "terminate called", its agent began a new round, and the other node's waited for it)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _say(message: str, aloud: bool = True) -> None:
    """Report the final error: the agent prints it, or else, with `aloud`, this rank."""
    if not error_report.report_to_launcher(message) and aloud:
        print(f"error: {message}", file=sys.stderr, flush=True)


def _fail(watchdog: Watchdog | None, error: BaseException) -> NoReturn:
    """Tell what happened and end at once: leaving the process group in order would wait for ranks that hang."""
    from tinytrain_dist.distributed.context import launcher_rank

    now, trace = time.time(), traceback.format_exc()
    # a token file that goes away while it is read, by one rank alone, is nothing that all have raised together
    alone = isinstance(error, DataError) and watchdog is not None and watchdog.phase_timer.phase not in START_PHASES
    expected = isinstance(error, TinytrainError) and not alone  # raised on all ranks, so one of them says it
    of_peers = isinstance(error, RuntimeError) and PEER_FAILURE.search(str(error)) is not None
    rank, _, host = launcher_rank()
    step = watchdog.phase_timer.step if watchdog and watchdog.phase_timer.phase not in START_PHASES else None
    where = f"rank {rank} on {host}" + (f", after step {step}" if step is not None else "")
    message = str(error) if expected else f"{where}: {type(error).__name__}: {error}"
    if (
        watchdog and of_peers
    ):  # the rank that caused it reports it in a moment, and then the watchdog ends this rank as well
        watchdog.beat()
        time.sleep(2 * TICK_SECONDS)
    if watchdog and owns_run(watchdog.folder) and (rank == 0 or not expected):  # never into another process's run
        cause = {"message": message, "rank": rank, "host": host, "step": step, "time": now, "secondary": of_peers}
        error_report.write_error(watchdog.folder, {**cause, "traceback": "" if expected else trace})
    elif watchdog and expected:
        watchdog.close()  # a mistake leaves no new folder behind
    print("" if expected else trace, end="", file=sys.stderr, flush=True)
    _say(message, aloud=rank == 0 or not expected or isinstance(error, RendezvousError))
    sys.stdout.flush()
    if watchdog and not expected:
        error_report.request_abort(watchdog.folder, watchdog.world, message)
    os._exit(2 if expected else 1)
