"""Run training on one rank, from the command line to the exit code, and report errors.

Must not know how training works. The first failing rank's error is the last line printed, and is in error.json.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import sys
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.config.run_folder import LOGS_FOLDER
from tinytrain_dist.distributed.spares import leave_spares_out
from tinytrain_dist.errors import DataError, DivergenceError, RendezvousError, ReplicaMismatchError, TinytrainError
from tinytrain_dist.launch.spare_rank import wait_as_spare
from tinytrain_dist.metrics.phase_timer import START_PHASES
from tinytrain_dist.reliability import error_report
from tinytrain_dist.reliability.run_state import owns_run
from tinytrain_dist.reliability.watchdog import TICK_SECONDS, Watchdog
from tinytrain_dist.reliability.world import REGROUP_EXIT_CODE, own_world
from tinytrain_dist.utils.processes import raise_open_file_limit

if TYPE_CHECKING:
    from tinytrain_dist.training.trainer import Trainer

# in messages of errors that the death of another rank causes on this rank
PEER_FAILURE = re.compile(r"(?i)gloo|nccl|connection|socket|broken pipe|tcpstore")


@dataclass(frozen=True)
class Failure:
    """The error that ended this rank, and what is known about its cause."""

    message: str  # the final line of the log
    trace: str  # "" for one of our own errors
    rank: int
    host: str
    step: int | None  # completed steps; None during the start
    user_mistake: bool  # raised on all ranks, so rank 0 reports it
    may_retry: bool  # whether a restart in place may help
    caused_by_peer: bool  # probably another rank failed first, and the cause is reported for that rank
    time: float  # seconds since 1970


def main(args: list[str]) -> NoReturn:
    """Train as `[CONFIG.toml] --settings` says, and exit: 0 if done or stopped on request, 2 for a mistake, else 1."""
    watchdog: Watchdog | None = None
    trainer: Trainer | None = None
    raise_open_file_limit()
    try:
        config = parse_command_line(args)
        # torch takes seconds to import, and a wrong setting is reported before
        from tinytrain_dist.distributed.context import flight_record, init_distributed, join_id, launcher_rank, shutdown
        from tinytrain_dist.training.trainer import Trainer

        faulthandler.enable()  # a crash in native code leaves a stack too
        if own_world() is not None and (spare := leave_spares_out(config)):
            wait_as_spare(config, spare)
        watchdog = Watchdog(config, launcher_rank(), _report, flight_record, join_id())
        watchdog.start()
        context = init_distributed(config.device, watchdog.longest_limit + 300.0, traces=watchdog.folder / LOGS_FOLDER)
        watchdog.set_launch_id(context.launch_id)
        trainer = Trainer.build(config, context, watchdog.phase_timer)
        ended = trainer.fit()
    except BaseException as error:
        if isinstance(error, SystemExit):  # --help
            raise
        _end_failed(watchdog, error, trainer)
    watchdog.close()
    shutdown()
    # End without the interpreter's own clean-up: native threads of stores and groups can outlive it, and then abort a
    # finished run. This happened with the message "terminate called". The agent of that node started a new round, for
    # which the agent of the other node waited.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(REGROUP_EXIT_CODE if ended == "regrouped" else 0)


def _report(message: str, may_print: bool = True, may_retry: bool = True, first_hand: bool = False) -> None:
    """Report the final error to the agent, which prints it. Without our agent, print it here if `may_print`."""
    if not error_report.report_to_launcher(message, may_retry, first_hand) and may_print:
        print(f"error: {message}", file=sys.stderr, flush=True)


def _end_failed(watchdog: Watchdog | None, error: BaseException, trainer: Trainer | None) -> NoReturn:
    """Report the error and end immediately: an orderly end of the process group would wait for ranks that hang.

    trainer: the run, if it was built; its trackers get a few seconds, after everything else was reported.
    """
    failure = _describe(watchdog, error)
    if watchdog and failure.caused_by_peer:
        # the cause is reported within moments, and then the watchdog ends this rank as well
        watchdog.heartbeat()
        time.sleep(2 * TICK_SECONDS)
    _record(watchdog, failure)
    is_reporter = failure.rank == 0 or not failure.user_mistake
    print(failure.trace, end="", file=sys.stderr, flush=True)
    may_print = is_reporter or isinstance(error, RendezvousError)
    _report(failure.message, may_print, failure.may_retry, not failure.caused_by_peer)
    sys.stdout.flush()
    if watchdog and not failure.user_mistake:
        error_report.request_abort(watchdog.folder, watchdog.launch_id, failure.message)
    if trainer is not None:
        with contextlib.suppress(Exception):  # the error that was reported counts
            trainer.log.close("failed")
    os._exit(2 if failure.user_mistake else 1)


def _describe(watchdog: Watchdog | None, error: BaseException) -> Failure:
    """Describe the error that is being handled: a user's mistake, or a failure of this rank."""
    from tinytrain_dist.distributed.context import launcher_rank

    now = time.time()
    trace = traceback.format_exc()
    rank, _, host = launcher_rank()
    started = watchdog is not None and watchdog.phase_timer.phase not in START_PHASES
    step = watchdog.phase_timer.step if watchdog is not None and started else None
    # Our own errors are raised on all ranks together, with one exception: if a token file disappears during training,
    # only the ranks that read it fail.
    on_this_rank_only = isinstance(error, DataError) and started
    user_mistake = isinstance(error, TinytrainError) and not on_this_rank_only
    # After a mistake the next start fails in the same way. These two can pass: a node was lost just then, or a device
    # has computed wrong values.
    passing = isinstance(error, (RendezvousError, ReplicaMismatchError))
    # the same steps would diverge again
    lasting = isinstance(error, DivergenceError)
    where = f"rank {rank} on {host}" + (f", after step {step}" if step is not None else "")
    return Failure(
        message=str(error) if user_mistake else f"{where}: {type(error).__name__}: {error}",
        trace="" if isinstance(error, TinytrainError) else trace,  # our messages say all that is needed
        rank=rank,
        host=host,
        step=step,
        user_mistake=user_mistake,
        may_retry=not lasting and (started or passing or not user_mistake),
        caused_by_peer=isinstance(error, RuntimeError) and PEER_FAILURE.search(str(error)) is not None,
        time=now,
    )


def _record(watchdog: Watchdog | None, failure: Failure) -> None:
    """Write error.json, but only if this process owns the run folder."""
    if watchdog is None:
        return
    if owns_run(watchdog.folder) and (failure.rank == 0 or not failure.user_mistake):
        cause = {
            "message": failure.message,
            "rank": failure.rank,
            "host": failure.host,
            "step": failure.step,
            "time": failure.time,
            "secondary": failure.caused_by_peer,
            "traceback": failure.trace,
        }
        error_report.write_error(watchdog.folder, cause)
    elif failure.user_mistake:
        watchdog.close()  # removes the folders that the watchdog made
