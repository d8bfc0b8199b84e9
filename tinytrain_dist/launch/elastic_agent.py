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
import importlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.spares import fewest_nodes_problems
from tinytrain_dist.errors import TinytrainError
from tinytrain_dist.launch.agent_signals import forward_signal, stop_waiting_for_nodes
from tinytrain_dist.launch.agent_state import MISTAKE, TASKS, RankDeath, RunOverError, agent, rank_pids, say
from tinytrain_dist.launch.blocked_signals import call_if_not_handled
from tinytrain_dist.launch.death_texts import out_of_memory_kills
from tinytrain_dist.launch.elastic_nodes import ElasticNodes
from tinytrain_dist.launch.hanging_starts import begin_to_stop_hanging_starts
from tinytrain_dist.launch.leaving_nodes import handle_leave_signals
from tinytrain_dist.launch.node_wait import announce_node_waits
from tinytrain_dist.launch.rank_deaths import first_cause, report_first_death, reported_failure
from tinytrain_dist.launch.settings_check import runs_verb, training_config
from tinytrain_dist.launch.snapshot_folder import snapshot_folder
from tinytrain_dist.launch.standby_pool import StandbyPool
from tinytrain_dist.launch.torchrun_options import address_arguments, node_range, parse_torchrun_options
from tinytrain_dist.reliability.stop_requests import STOP_SIGNALS, handle_unless_ignored, unblock_stop_signals
from tinytrain_dist.utils.current_folder import current_folder_problem
from tinytrain_dist.utils.processes import raise_open_file_limit
from tinytrain_dist.utils.stale_files import describe_leftovers, owner, remove_leftovers

HANDLED_SIGNALS = (*STOP_SIGNALS, signal.SIGQUIT)  # SIGQUIT (Ctrl-\) ends at once, the others are forwarded
# torchrun handles these even if this process was started with them ignored
TORCHRUN_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
UNUSED_SIGNAL = "SIGURG"  # torchrun must be given one to handle; this is sent only to programs that ask for it


def main(args: list[str]) -> int:
    """Run torchrun with its arguments; return 0, the exit code of the first failing rank, or 2 for a wrong setting."""
    raise_open_file_limit()
    environment = dict(os.environ)
    if TASKS.is_dir():  # Linux
        handle_unless_ignored(HANDLED_SIGNALS, forward_signal)  # before torch is imported, which takes seconds
        if "TINYTRAIN_ELASTIC" in os.environ:
            handle_leave_signals()
        call_if_not_handled(STOP_SIGNALS, lambda: "TINYTRAIN_STOP" in os.environ, stop_waiting_for_nodes)
        of_torchrun = []
    else:  # on other systems torchrun handles the signals itself
        unblock_stop_signals()
        of_torchrun = [name for name in TORCHRUN_SIGNALS if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN]
    agent.runs_verb = runs_verb(args)
    args = [f"--signals-to-handle={','.join(of_torchrun or [UNUSED_SIGNAL])}", *args]
    try:
        if problem := current_folder_problem():
            raise TinytrainError(problem)
        config = training_config(args)
    except TinytrainError as mistake:
        say(f"error: {mistake}")
        return MISTAKE
    with contextlib.ExitStack() as stack:
        standbys = None
        if config is not None and "TINYTRAIN_ELASTIC" in os.environ:
            standbys = stack.enter_context(contextlib.closing(StandbyPool(config)))
            standbys.fill(1)  # every node has a rank at least; it imports torch while this process does
            _import_torch_quietly()
        death = _supervise(args, config, standbys)
    if agent.joins_again:  # torchrun's connections to the store are broken, so this process starts from the beginning
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    return death.exit_code if death.exit_code >= 0 else 128 - death.exit_code


def _supervise(args: list[str], config: TrainingConfig | None, standbys: StandbyPool | None) -> RankDeath:
    """Run torchrun with its arguments, say what ended the run if it failed, and return how it ended.

    config: of the run; None if the ranks run another program. standbys: of an elastic run.
    """
    from tinytrain_dist.distributed.torchrun_internals import serve_rendezvous, wrap_rank_start

    options = parse_torchrun_options(args)
    ranks_per_node = int(options.nproc_per_node) if standbys is not None else 0
    if config is not None and standbys is not None:
        problems = fewest_nodes_problems(config, node_range(options)[0], ranks_per_node, "--nnodes")
        if problems:
            say(f"error: {problems[0]}")
            return RankDeath("", MISTAKE)
        standbys.fill(ranks_per_node)
    agent.rendezvous_store = serve_rendezvous(options.rdzv_endpoint)
    args = [*address_arguments(options), *args]
    for name in ("api", "errors.error_handler"):  # their messages repeat ours, less clearly
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    if removed := remove_leftovers(Path(tempfile.gettempdir())):
        print(describe_leftovers(removed), file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=f"tinytrain-{owner()}-") as scratch, snapshot_folder(config, options):
        agent.scratch = scratch
        tempfile.tempdir = scratch  # torchrun leaves its temporary folders behind; here they are removed
        folder_note = Path(scratch) / "run"
        agent.folder_note = folder_note
        agent.run_folder = Path(config.target_dir) if config else None
        if "TINYTRAIN_STOP" in os.environ:  # SIGUSR1 came before
            begin_to_stop_hanging_starts()
        # a rank that finds this variable writes its run folder into the file, and lets the agent print its error
        os.environ["TINYTRAIN_AGENT"] = str(folder_note)
        nodes = None
        if config is not None and standbys is not None:
            nodes = ElasticNodes(config, ranks_per_node, folder_note, options.rdzv_endpoint, standbys)
            wrap_rank_start(standbys.take)
        death = _run_torchrun(args, options, nodes, folder_note)
        if death.exit_code and death.text:
            say(f"error: {first_cause(folder_note) or death.text}")
    return death


def _run_torchrun(
    args: list[str], options: argparse.Namespace, nodes: ElasticNodes | None, folder_note: Path
) -> RankDeath:
    """Run torchrun until the run ends on this node; return how it ended, with exit code 0 if it ended well."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    from tinytrain_dist.distributed.torchrun_internals import hook_into_rendezvous

    hook_into_rendezvous(nodes)
    kills_before = out_of_memory_kills()
    _call_before_close(lambda context: report_first_death(context, folder_note, kills_before), nodes)
    announce_node_waits(options, lambda: any(rank_pids()))
    fewest, most = node_range(options)
    agent.ends_rendezvous = 1 < fewest == most
    try:
        torchrun(args)
        return RankDeath("", 0)
    except RunOverError as over:
        return over.death
    except ChildFailedError as failed:
        return agent.first_death or reported_failure(list(failed.failures.values()))
    except RendezvousError as failed:
        return RankDeath(_describe_missing_nodes(options, failed), 1)


def _import_torch_quietly() -> None:
    """Import torch so that it prints no native stacks and tracebacks when a store is lost: that is a sentence of ours.

    torch's native code reads the variable when it is loaded. The ranks must not inherit it.
    """
    chosen = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    importlib.import_module("tinytrain_dist.distributed.torchrun_internals")
    if chosen is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    for name in ("agent.server.api", "rendezvous.dynamic_rendezvous"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)


def _describe_missing_nodes(options: argparse.Namespace, error: Exception) -> str:
    """Describe why the nodes did not come together: torch's exception says only that it took too long or was closed."""
    where = f" at {options.rdzv_endpoint}" if options.rdzv_endpoint else ""
    if "TINYTRAIN_ELASTIC" in os.environ and "Connection" in type(error).__name__:
        return (
            f"--store: there is no store{where}; start it with `tinytrain store` on a machine that outlives the nodes"
        )
    if "Timeout" not in type(error).__name__:
        return f"another node has ended the rendezvous{where}, or cannot be reached any more; its own log says why"
    return (
        f"only some of the {options.nnodes} nodes joined{where} in time; start the others, or see in their logs what "
        "keeps them, and check the address with `tinytrain doctor`"
    )


def _call_before_close(report_death: Callable[[Any], bool], nodes: ElasticNodes | None) -> None:
    """Let torchrun call `report_death` before it ends the ranks, for example because one of them died.

    report_death: gets torchrun's context of the ranks, and returns whether a rank died. If so, the others are ended by
    SIGKILL. After SIGTERM they would report a preemption, although the run has failed. Where a restart in place makes
    no sense (`AgentState.over`), RunOverError is raised through torchrun. nodes: of an elastic run; it lets the ranks
    save before another world begins.

    torchrun has no hook between finding a dead rank and ending the others.
    """
    from tinytrain_dist.distributed.torchrun_internals import wrap_worker_close

    def make_close(close: Callable[..., None]) -> Callable[..., None]:
        def report_and_close(context: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
            is_first_call = not hasattr(context, "tinytrain_closed")
            context.tinytrain_closed = True
            # torchrun closes twice; the second time, ranks are dead because the first call killed them
            died = is_first_call and report_death(context)
            if nodes is not None and died and agent.over is not None and nodes.forgives_mistake():
                agent.over = None
            if nodes is not None and is_first_call and nodes.changes_world(died):
                processes = [handler.proc for handler in context.subprocess_handlers.values()]
                if not died:
                    pids = [process.pid for process in processes if process.poll() is None]
                    nodes.end_ranks(pids, lambda: any(process.poll() is None for process in processes))
                death_sig = signal.SIGKILL
            close(context, signal.SIGKILL if died else death_sig, timeout)
            if died and agent.over is not None:
                raise RunOverError(agent.over)

        return report_and_close

    wrap_worker_close(make_close)
