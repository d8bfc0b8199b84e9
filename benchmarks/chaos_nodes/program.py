"""Run the nodes, let events happen, and compare the result with that of an undisturbed process."""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from chaos_nodes import report
from chaos_nodes.events import FAULTS, RETURN, Chaos, Outcome, names
from chaos_nodes.network import Network, why_no_networks
from chaos_nodes.node import ChaosError, Setup, Store
from chaos_nodes.run_history import gap_in_steps, train_steps
from tests.helpers.training import Run

SNAPSHOT_EVERY = 10
CKPT_EVERY = 50
SETTINGS: dict[str, Any] = {
    "reproducible": True, "snapshot_every": SNAPSHOT_EVERY, "ckpt_every": CKPT_EVERY, "keep_last": 2, "log_every": 1,
    "eval_every": 1_000_000, "total_steps": 1_000_000, "compile": False,
}  # fmt: skip


def run_chaos(options: argparse.Namespace) -> int:
    """Run `chaos.py --nodes`; return 0 if the result is right and no event has lost more steps than it may, else 1."""
    if problem := why_no_networks():
        print(problem)
        return 1
    if not 2 <= options.nodes <= 5:
        print(f"--nodes: {options.nodes} is not from 2 to 5")
        return 1
    try:
        plan = names(options.plan) if options.plan else []
        faults = names(options.faults)
    except ValueError as error:
        print(f"--plan, --faults: {error}")
        return 1
    started, outcomes = time.monotonic(), []
    with _folders() as (folder, shared), ExitStack() as stack:
        setup = Setup.make(folder, max(1, options.nodes - 2), options.nodes, parallel=options.parallel, **SETTINGS)
        chaos = _start(setup, shared, options, stack)
        try:
            for outcome in _events(
                chaos, plan, {kind: FAULTS[kind] for kind in faults if kind != RETURN}, options.events
            ):
                outcomes.append(outcome)
                print(report.describe(len(outcomes), outcome), flush=True)
            step = chaos.stop()
            problems = [*report.broken_rules(outcomes), *_problems_of_the_end(chaos, step)]
        except ChaosError as error:
            problems = [str(error)]
    print(report.table(outcomes))
    for warning in report.warnings(outcomes):
        print(f"slow: {warning}")
    for problem in problems:
        print(f"WRONG: {problem}")
    print(
        f"{len(outcomes)} events on {options.nodes} nodes ({options.parallel}, seed {options.seed}), "
        f"{time.monotonic() - started:.0f} s; {'WRONG' if problems else 'digests equal'}"
    )
    return int(bool(problems))


def _start(setup: Setup, shared: Path, options: argparse.Namespace, stack: ExitStack) -> Chaos:
    network = Network()
    stack.callback(network.close)
    store = Store(setup, network)
    stack.callback(store.close)
    store.wait(120)
    replicated, rng = options.parallel == "ddp", random.Random(options.seed)
    chaos = Chaos(setup, network, shared, rng, SNAPSHOT_EVERY, replicated, CKPT_EVERY)
    stack.callback(chaos.close)
    chaos.start(options.nodes)
    return chaos


def _events(chaos: Chaos, plan: Sequence[str], faults: dict[str, int], number: int) -> Iterator[Outcome]:
    for kind in plan:
        yield from chaos.planned_event(kind)
    happened = 0
    while not plan and happened < number:
        for outcome in chaos.random_event(faults):
            happened += 1
            yield outcome


def _problems_of_the_end(chaos: Chaos, step: int) -> list[str]:
    """Return what is wrong with the files of the run, as sentences."""
    problems = []
    if gap := gap_in_steps(train_steps(chaos.setup.run)):
        problems.append(gap)
    left = [path for node in chaos.alive.values() for path in node.shared_memory()]
    if left:
        problems.append(f"{left[0]} was left in shared memory, and {len(left) - 1} more")
    alone = chaos.setup.train_alone("undisturbed", step)
    run, expected = Run(chaos.setup.run), Run(alone)
    print(f"step {step}: {run.checkpoint.name}, undisturbed {expected.checkpoint.name}")
    if run.digests() != expected.digests() or run.checkpoint.name != expected.checkpoint.name:
        problems.append("the digests differ from those of one undisturbed process")
    return problems


@contextmanager
def _folders() -> Iterator[tuple[Path, Path]]:
    """Make a folder for the run and one for the memory that the nodes of a machine share; remove both."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        shared = Path(tempfile.mkdtemp(prefix="chaos-", dir="/dev/shm"))
        try:
            yield Path(name), shared
        finally:
            shutil.rmtree(shared, ignore_errors=True)
