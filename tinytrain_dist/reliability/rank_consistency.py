"""Check before step 1 that all ranks agree on code, versions, settings, number of processes, clocks and threads.

Must not know what is trained. Each rank contributes its facts once; a message names the deviating rank and host with
both values.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.environment import library_versions
from tinytrain_dist.model.matmul import widens_bf16

MAX_CLOCK_SKEW_SECONDS = (
    2.0  # what is decided by a clock is decided by one rank; more than this confuses people who read logs
)
SETTING_PREFIX = "setting "
RankFacts = dict[str, Any]


def code_digest() -> str:
    """Of every source file of this package, by name."""
    total, home = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for path in sorted(home.rglob("*.py")):
        total.update(str(path.relative_to(home)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def rank_facts(config: TrainingConfig | None, context: DistributedContext) -> RankFacts:
    """Return what must be the same on all ranks: a flat dictionary of plain values."""
    settings = config.resolved() if config else {}
    return {
        "processes per node": context.local_world_size,
        "code": code_digest(),
        **library_versions(),
        **{SETTING_PREFIX + name: value for name, value in settings.items()},
    }


def find_differences(everyone: list[RankFacts], hosts: list[str]) -> list[str]:
    """Return a sentence for each fact on which ranks differ, naming the minority with both values."""
    found = []
    for name in dict.fromkeys(key for one in everyone for key in one):
        values = [repr(one.get(name)) for one in everyone]
        counts = Counter(values)
        if len(counts) == 1:
            continue
        usual = max(values, key=lambda value: counts[value])  # rank 0's, where as many say one as the other
        remedy = "use one environment on all nodes"
        if name == "code":
            remedy = "start every node from the same checkout"
        elif name == "processes per node":
            remedy = "start the same number of processes on each"
        elif name.startswith(SETTING_PREFIX):
            remedy = "give every node the same file and the same settings"
        for value in (value for value in counts if value != usual):
            ranks = [rank for rank, one in enumerate(values) if one == value]
            found.append(
                f"{name.removeprefix(SETTING_PREFIX)}: {value} on {format_ranks(ranks, hosts)}, but {usual} on "
                f"{format_ranks([rank for rank, one in enumerate(values) if one == usual], hosts)}; {remedy}"
            )
    return found


def format_ranks(ranks: list[int], hosts: list[str]) -> str:
    """Ranks with their hosts, the first few of many."""
    shown = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks[:3])
    return shown + (f" and {len(ranks) - 3} more" if len(ranks) > 3 else "")


def usable_cores() -> set[int]:
    """Return the cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def oversubscribed_hosts(threads: list[int], cores: list[set[int]], hosts: list[str]) -> list[str]:
    """Return a sentence for each host whose ranks run more threads than they have cores."""
    found = []
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, where in enumerate(hosts) if where == host]
        have, want = len(set().union(*(cores[rank] for rank in ranks))), sum(threads[rank] for rank in ranks)
        if want > have:
            each = have // len(ranks)
            cure = f"set OMP_NUM_THREADS={each}" if each else "start fewer processes"
            found.append(
                f"threads: {len(ranks)} process(es) on {host} run {want} threads on {have} core(s) and slow each other "
                f"down; {cure}, or give the job more cores (--cpus-per-task)"
            )
    return found


def clock_offsets(context: DistributedContext, clock: Callable[[], float] = time.time) -> list[tuple[float, float]]:
    """By how many seconds each rank's clock is ahead of this one's, and by how many that can be wrong. A collective.

    Every rank reads its clock after all have entered a barrier and before any has received all readings: by this clock
    that is between `before` and `after`, whatever the network does.
    """
    context.barrier()
    before = clock()
    context.barrier()
    readings = context.all_gather_object(clock())
    after = clock()
    return [(reading - (before + after) / 2, (after - before) / 2) for reading in readings]


def skewed_clocks(offsets: list[tuple[float, float]], hosts: list[str]) -> list[str]:
    """Return a sentence for each host whose clock is certainly wrong compared with rank 0's."""
    worst: dict[str, float] = {}
    for host, (offset, bound) in zip(hosts, offsets, strict=True):
        if abs(offset) - bound > max(MAX_CLOCK_SKEW_SECONDS, abs(worst.get(host, 0.0))):
            worst[host] = offset
    return [
        f"clock: {host} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} {hosts[0]}; set it (chrony)"
        for host, offset in worst.items()
    ]


def check_rank_consistency(config: TrainingConfig, context: DistributedContext) -> list[str]:
    """Hold all ranks against each other; returns what only slows or confuses. A collective of some milliseconds.

    Errors: ConfigError with everything on which ranks differ, and which ranks deviate.
    """
    threads = config.cpu_threads or (1 if config.reproducible else torch.get_num_threads())
    people = context.all_gather_object((context.host, rank_facts(config, context), threads, usable_cores()))
    hosts = [host for host, *_ in people]
    if odd := find_differences([one for _, one, *_ in people], hosts):
        raise ConfigError(odd, f"the world of {context.world_size} ranks")
    hints = oversubscribed_hosts([one for *_, one, _ in people], [one for *_, one in people], hosts)
    if widens_bf16(config.precision, context.device):
        hints.append("precision: this CPU has no bf16 instructions, so products are in float32; fp32 is about as fast")
    late: list[str] = context.broadcast_object(skewed_clocks(clock_offsets(context), hosts))
    return hints + late
