"""Measure matrix products and collectives for `tinytrain doctor`, and report ranks slower than the others."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tinytrain_dist.cli.machine_checks import OK, PROBLEM, Finding
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import REPLICATE, SHARD, DistributedContext
from tinytrain_dist.distributed.parallel_dims import ParallelDims

SLOW_SHARE = 0.8  # of the median: devices of one kind differ by some percent, broken ones by more
MIB = 2**20


@dataclass
class Report:
    """What was found so far, and the tables under it."""

    machine: list[Finding]
    findings: list[Finding] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)

    def add(self, topic: str, problems: list[str], fine: str) -> None:
        """Add each problem, or one line that says what is fine."""
        self.findings += [(PROBLEM, text) for text in problems] or [(OK, f"{topic}: {fine}")]

    def show(self, title: str) -> int:
        """Print everything; the exit code."""
        print(title)
        everything = dict.fromkeys(self.machine + self.findings)
        for level, text in everything:
            print(f"  {level:<8} {text}")
        for table in self.tables:
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            print()
            for row in table:
                cells = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
                print("  " + "  ".join([f"{row[0]:<{widths[0]}}", *cells]))
        count = sum(level == PROBLEM for level, _ in everything)
        print(f"\n{count or 'no'} problem{'s' if count != 1 else ''} found", flush=True)
        return 1 if count else 0


def rank_placement_problems(hosts: list[str], context: DistributedContext) -> list[str]:
    """Return what is wrong with how ranks lie on hosts; if nothing is, ranks of a node are neighbours."""
    counts = {host: hosts.count(host) for host in hosts}
    if any(count % context.local_world_size for count in counts.values()):
        listing = ", ".join(f"{count} on {host}" for host, count in counts.items())
        return [f"world: nodes have different numbers of processes ({listing}); start the same number on each"]
    blocks = 1 + sum(a != b for a, b in itertools.pairwise(hosts))
    if blocks > len(counts):
        return ["world: ranks of one node are not neighbours; use srun --distribution=block"]
    return []


def measure_speed(report: Report, hosts: list[str], context: DistributedContext) -> None:
    """Measure matmuls and all-reduces on every rank, and report ranks that are slower than the others."""
    ranks = [f"rank {rank} ({host})" for rank, host in enumerate(hosts)]
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        context.barrier()  # all at once, as in training: devices of a node share power and memory
        mine = context.all_gather_object(matmul_rate(context.device, dtype) / 1e12)
        rates[dtype] = mine
        name = f"matmul {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
        slow = outliers(name, "TFLOP/s", dict(zip(ranks, mine, strict=True)), "look for other processes, heat, power")
        report.add(name, slow, f"{statistics.median(mine):.3g} TFLOP/s a device")
    table = [["host", "ranks", "bf16 TFLOP/s", "fp32 TFLOP/s"]]
    for host in dict.fromkeys(hosts):
        there = [rank for rank, where in enumerate(hosts) if where == host]
        slowest = [f"{min(rates[dtype][rank] for rank in there):.3g}" for dtype in rates]
        table.append([host, f"{there[0]}-{there[-1]}" if len(there) > 1 else str(there[0]), *slowest])
    even = not rank_placement_problems(hosts, context)
    if context.world_size > 1 and even:
        local = context.local_world_size
        context = context.with_mesh(ParallelDims("doctor", context.world_size // local, local, ""))
        report.tables.append(_bandwidths(report, hosts, context))
    report.tables.append(table)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of square matrix products, the best of those that fit into `seconds`."""
    size = 8192 if device.type == "cuda" else 512
    matrix = torch.rand(size, size, device=device).to(dtype)  # a constant one would need less power, and lie
    return 2 * size**3 / best_seconds(lambda: matrix @ matrix, device, seconds)


def best_seconds(action: Callable[[], Any], device: torch.device, seconds: float = 0.0, times: int = 3) -> float:
    """Return the shortest time of an action, repeated for `seconds` and at least `times`; the first may warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    best, end = float("inf"), time.perf_counter() + seconds
    while times > 0 or time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        action()
        wait()
        best, times = min(best, time.perf_counter() - start), times - 1
    return best


def outliers(what: str, unit: str, values: dict[str, float], remedy: str) -> list[str]:
    """Return a sentence for each value that is lower than SLOW_SHARE times the median."""
    median = statistics.median(values.values())
    return [
        f"{what}: {name} has {value:.3g} {unit}, the median of {len(values)} is {median:.3g}; {remedy}"
        for name, value in values.items()
        if value < SLOW_SHARE * median
    ]


def _bandwidths(report: Report, hosts: list[str], context: DistributedContext) -> list[list[str]]:
    """All-reduce inside a node, across nodes and over all; who is slow inside by itself, across by its neighbours."""
    sizes = [1, 16, 256 if context.device.type == "cuda" else 64]
    scopes = {"inside a node": SHARD, "across nodes": REPLICATE}
    groups = {what: context.group(axis) for what, axis in scopes.items()}
    groups = {what: group for what, group in groups.items() if collectives.group_size(group) > 1}
    table = [["all-reduce, bus GB/s (median)", *(f"{size} MiB" for size in sizes)]]
    for what, group in groups.items():
        count, medians = collectives.group_size(group), []
        for size in sizes:
            tensor = torch.zeros(size * MIB // 4, device=context.device)
            context.barrier()
            seconds = best_seconds(partial(context.all_reduce_sum, tensor, scopes[what]), context.device)
            everyone = context.all_gather_object(2 * (count - 1) / count * size * MIB / seconds / 1e9)
            medians.append(statistics.median(everyone))
        if what == "inside a node":
            per_host = dict(zip(hosts, everyone, strict=True))
            slow = outliers(
                "all-reduce inside a node", "GB/s", per_host, "look at NVLink, PCIe and shared memory there"
            )
            report.add("all-reduce inside a node", slow, f"{medians[-1]:.3g} GB/s")
        table.append([f"{what} ({count} ranks)", *(f"{rate:.3g}" for rate in medians)])
    if "across nodes" in groups:
        rates = _swap_rates(hosts, context, torch.zeros(16 * MIB // 4, device=context.device))
        slow = outliers("between nodes", "GB/s", rates, "look at its cable, its switch port and the interface in use")
        report.add("between nodes", slow, f"{statistics.median(rates.values()):.3g} GB/s each way with a neighbour")
    return table


def ring_rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Return the neighbours of a ring in rounds of disjoint pairs; each node has two, so a slow one is slow twice."""
    pairs = [(node, (node + 1) % nodes) for node in range(nodes if nodes > 2 else nodes - 1)]
    last = [pairs.pop()] if nodes > 2 and nodes % 2 else []
    return [found for found in (pairs[::2], pairs[1::2], last) if found]


def _swap_rates(hosts: list[str], context: DistributedContext, tensor: torch.Tensor) -> dict[str, float]:
    """GB/s that all devices of a node together swap with a neighbouring node: the better of both neighbours."""
    local, node, mine = context.local_world_size, context.rank // context.local_world_size, []
    for pairs in ring_rounds(context.world_size // local):
        peer = {**dict(pairs), **{b: a for a, b in pairs}}.get(node)
        context.barrier()
        rate = 0.0
        if peer is not None:
            partner = peer * local + context.rank % local
            rate = tensor.nbytes / best_seconds(partial(context.exchange, tensor, partner), context.device) / 1e9
        mine.append(rate)
    everyone = context.all_gather_object(mine)
    nodes = [list(map(sum, zip(*everyone[at : at + local], strict=True))) for at in range(0, len(hosts), local)]
    return {hosts[at * local]: max(rates) for at, rates in enumerate(nodes)}
