"""Check before step 1 that all ranks agree on code, versions, settings, number of processes, clocks and threads.

Must not know what is trained. Each rank sends its facts once. A message names the deviating ranks, their hosts and both
values.
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

# Clock skew harms no run, because one rank takes all decisions that depend on a clock. A larger skew than this confuses
# people who compare logs.
MAX_CLOCK_SKEW_SECONDS = 2.0
SETTING_PREFIX = "setting "  # begins the names of facts that are settings
RANKS_NAMED = 3  # in a message; the remaining ranks are only counted
RankFacts = dict[str, Any]


def code_digest() -> str:
    """Return a digest of the names and contents of all source files of this package."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def rank_facts(config: TrainingConfig | None, context: DistributedContext) -> RankFacts:
    """Return what must be the same on all ranks: a flat dictionary of plain values."""
    settings = config.resolved() if config else {}
    return {
        "processes per node": context.local_world_size,
        "code": code_digest(),
        **library_versions(),
        **{SETTING_PREFIX + name: value for name, value in settings.items()},
    }


def find_differences(facts_by_rank: list[RankFacts], hosts: list[str]) -> list[str]:
    """Return a sentence for each fact on which ranks differ, with the deviating ranks and both values.

    If two values are equally frequent, the one on the lower rank counts as the usual one.
    """
    differences = []
    for name in dict.fromkeys(name for facts in facts_by_rank for name in facts):
        values = [repr(facts.get(name)) for facts in facts_by_rank]
        counts = Counter(values)
        if len(counts) == 1:
            continue
        usual_value = max(values, key=lambda value: counts[value])
        usual_ranks = [rank for rank, value in enumerate(values) if value == usual_value]
        for deviating_value in counts:
            if deviating_value == usual_value:
                continue
            ranks = [rank for rank, value in enumerate(values) if value == deviating_value]
            differences.append(
                f"{name.removeprefix(SETTING_PREFIX)}: {deviating_value} on {format_ranks(ranks, hosts)}, "
                f"but {usual_value} on {format_ranks(usual_ranks, hosts)}; {_remedy(name)}"
            )
    return differences


def _remedy(fact: str) -> str:
    """Return what to do about ranks that differ in this fact."""
    if fact == "code":
        return "start every node from the same checkout"
    if fact == "processes per node":
        return "start the same number of processes on each node"
    if fact.startswith(SETTING_PREFIX):
        return "give every node the same file and the same settings"
    return "use the same environment on all nodes"


def format_ranks(ranks: list[int], hosts: list[str]) -> str:
    """Format ranks with their hosts: the first few by name, the remaining ones as a number. hosts: by rank."""
    named = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks[:RANKS_NAMED])
    return named + (f" and {len(ranks) - RANKS_NAMED} more" if len(ranks) > RANKS_NAMED else "")


def usable_cores() -> set[int]:
    """Return the cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def threads_of(config: TrainingConfig | None) -> int:
    """Return how many CPU threads this rank runs; see `configure_determinism`."""
    chosen = config and (config.cpu_threads or (1 if config.reproducible else None))
    return chosen or torch.get_num_threads()


def oversubscribed_hosts(
    threads: list[int], cores: list[set[int]], hosts: list[str], config: TrainingConfig | None = None
) -> list[str]:
    """Return a sentence for each host whose ranks run more threads than they have cores.

    The lists are by rank. config: decides which setting the advice names.
    """
    setting = "cpu_threads = " if config and config.cpu_threads else "OMP_NUM_THREADS="
    warnings = []
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, rank_host in enumerate(hosts) if rank_host == host]
        num_cores = len(set().union(*(cores[rank] for rank in ranks)))
        num_threads = sum(threads[rank] for rank in ranks)
        if num_threads > num_cores:
            cores_per_rank = num_cores // len(ranks)
            remedy = f"set {setting}{cores_per_rank}" if cores_per_rank else "start fewer processes"
            warnings.append(
                f"threads: {len(ranks)} process(es) on {host} run {num_threads} threads on {num_cores} core(s) and "
                f"slow each other down; {remedy}, or give the job more cores (--cpus-per-task)"
            )
    return warnings


def clock_offsets(context: DistributedContext, clock: Callable[[], float] = time.time) -> list[tuple[float, float]]:
    """Return by how many seconds each rank's clock is ahead of this rank's, with an error bound. A collective.

    Every rank reads its clock after all ranks have entered the second barrier, and before any rank has received all
    readings. By this rank's clock that is between `before` and `after`, even if the network is slow.
    """
    context.barrier()
    before = clock()
    context.barrier()
    readings = context.all_gather_object(clock())
    after = clock()
    return [(reading - (before + after) / 2, (after - before) / 2) for reading in readings]


def skewed_clocks(offsets: list[tuple[float, float]], hosts: list[str]) -> list[str]:
    """Return a sentence for each host whose clock certainly differs from rank 0's by more than is acceptable.

    offsets: from `clock_offsets` on rank 0.
    """
    largest_offset: dict[str, float] = {}  # by host
    for host, (offset, error_bound) in zip(hosts, offsets, strict=True):
        if abs(offset) - error_bound > max(MAX_CLOCK_SKEW_SECONDS, abs(largest_offset.get(host, 0.0))):
            largest_offset[host] = offset
    return [
        f"clock: {host} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} {hosts[0]}; synchronize them "
        "(chrony)"
        for host, offset in largest_offset.items()
    ]


def check_rank_consistency(config: TrainingConfig, context: DistributedContext) -> list[str]:
    """Compare all ranks, and return warnings about what slows the run down. A collective of a few milliseconds.

    Errors: ConfigError with every fact on which ranks differ, and the deviating ranks.
    """
    by_rank = context.all_gather_object((context.host, rank_facts(config, context), threads_of(config), usable_cores()))
    hosts, facts, threads, cores = (list(column) for column in zip(*by_rank, strict=True))
    if differences := find_differences(facts, hosts):
        raise ConfigError(differences, f"the comparison of {context.world_size} ranks")
    warnings = oversubscribed_hosts(threads, cores, hosts, config)
    if widens_bf16(config.precision, context.device):
        warnings.append(
            "precision: this CPU has no bf16 instructions, so bf16 computes products in float32; fp32 is about as fast"
        )
    warnings += context.broadcast_object(skewed_clocks(clock_offsets(context), hosts))
    return warnings
