"""Measure matrix products and collectives for `tinytrain doctor`, and report ranks slower than the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tinytrain_dist.cli.doctor_checks.cluster import rank_placement_problems
from tinytrain_dist.cli.doctor_checks.report import Report, Table
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import REPLICATE, SHARD, DistributedContext
from tinytrain_dist.distributed.parallel_dims import ParallelDims

SLOW_SHARE = 0.8  # of the median: equal devices differ by a few percent, defective ones by more
MIB = 2**20
SWAP_MIB = 16  # size of the tensor that two neighbouring nodes exchange
SCOPES = {"inside a node": SHARD, "across nodes": REPLICATE}  # of an all-reduce, by mesh axis
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def measure_speed(report: Report, hosts: list[str], context: DistributedContext) -> None:
    """Measure matrix products and all-reduces on every rank, and report ranks that are slower than the others."""
    teraflops = {name: _measure_matmul(report, name, hosts, context) for name in DTYPES}
    if context.world_size > 1 and not rank_placement_problems(hosts, context):
        local_world_size = context.local_world_size
        num_nodes = context.world_size // local_world_size
        context = context.with_mesh(ParallelDims("doctor", num_nodes, local_world_size, ""))
        report.tables.append(_measure_all_reduce(report, hosts, context))
        if num_nodes > 1:
            _measure_neighbours(report, hosts, context)
    report.tables.append(_matmul_table(teraflops, hosts))


def _measure_matmul(report: Report, name: str, hosts: list[str], context: DistributedContext) -> list[float]:
    """Return the TFLOP/s of each rank for a type of DTYPES."""
    context.barrier()  # all ranks measure at once, as in training: the devices of a node share power and memory
    teraflops: list[float] = context.all_gather_object(matmul_rate(context.device, DTYPES[name]) / 1e12)
    by_rank = {f"rank {rank} ({host})": teraflops[rank] for rank, host in enumerate(hosts)}
    slow = outliers(f"matmul {name}", "TFLOP/s", by_rank, "look for other processes, heat and power limits")
    report.add(f"matmul {name}", slow, f"{statistics.median(teraflops):.3g} TFLOP/s per device")
    return teraflops


def _matmul_table(teraflops: dict[str, list[float]], hosts: list[str]) -> Table:
    """Return a row for each host, with its slowest rank."""
    table = [["host", "ranks", *(f"{name} TFLOP/s" for name in teraflops)]]
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, rank_host in enumerate(hosts) if rank_host == host]
        rank_range = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        slowest = [f"{min(rates[rank] for rank in ranks):.3g}" for rates in teraflops.values()]
        table.append([host, rank_range, *slowest])
    return table


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the FLOP/s of square matrix products, the best of those that fit into `seconds`."""
    size = 8192 if device.type == "cuda" else 512
    matrix = torch.rand(size, size, device=device).to(dtype)  # random, as equal values would need less power
    return 2 * size**3 / best_seconds(lambda: matrix @ matrix, device, seconds)


def best_seconds(action: Callable[[], Any], device: torch.device, seconds: float = 0.0, times: int = 3) -> float:
    """Return the shortest time of an action that is repeated for `seconds`, and at least `times` times."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    best = float("inf")
    end = time.perf_counter() + seconds
    while times > 0 or time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        action()
        wait()
        best = min(best, time.perf_counter() - start)
        times -= 1
    return best


def outliers(what: str, unit: str, values: dict[str, float], remedy: str) -> list[str]:
    """Return a sentence for each value that is lower than SLOW_SHARE times the median."""
    median = statistics.median(values.values())
    return [
        f"{what}: {name} has {value:.3g} {unit}, the median of {len(values)} is {median:.3g}; {remedy}"
        for name, value in values.items()
        if value < SLOW_SHARE * median
    ]


def _measure_all_reduce(report: Report, hosts: list[str], context: DistributedContext) -> Table:
    """Measure all-reduces inside nodes and across nodes, and report ranks that are slow inside their node."""
    sizes_mib = [1, 16, 256 if context.device.type == "cuda" else 64]
    table = [["all-reduce, bus GB/s (median)", *(f"{size} MiB" for size in sizes_mib)]]
    for scope, axis in SCOPES.items():
        group_size = collectives.group_size(context.group(axis))
        if group_size == 1:
            continue
        rates_by_size = [_all_reduce_rates(size, axis, group_size, context) for size in sizes_mib]
        medians = [statistics.median(rates) for rates in rates_by_size]
        if axis == SHARD:
            rate_of_host = dict(zip(hosts, rates_by_size[-1], strict=True))
            remedy = "check NVLink, PCIe and shared memory there"
            slow = outliers("all-reduce inside a node", "GB/s", rate_of_host, remedy)
            report.add("all-reduce inside a node", slow, f"{medians[-1]:.3g} GB/s")
        table.append([f"{scope} ({group_size} ranks)", *(f"{rate:.3g}" for rate in medians)])
    return table


def _all_reduce_rates(size_mib: int, axis: str, group_size: int, context: DistributedContext) -> list[float]:
    """Return the bus bandwidth of each rank in GB/s: 2 (n - 1) / n x bytes / seconds for n ranks."""
    tensor = torch.zeros(size_mib * MIB // 4, device=context.device)
    context.barrier()
    seconds = best_seconds(partial(context.all_reduce_sum, tensor, axis), context.device)
    bus_bytes = 2 * (group_size - 1) / group_size * size_mib * MIB
    rates: list[float] = context.all_gather_object(bus_bytes / seconds / 1e9)
    return rates


def _measure_neighbours(report: Report, hosts: list[str], context: DistributedContext) -> None:
    """Measure the bandwidth between neighbouring nodes, and report nodes that are slow with both neighbours."""
    rates = _exchange_rates(hosts, context, torch.zeros(SWAP_MIB * MIB // 4, device=context.device))
    remedy = "check its cable, its switch port and the interface in use"
    slow = outliers("between nodes", "GB/s", rates, remedy)
    report.add("between nodes", slow, f"{statistics.median(rates.values()):.3g} GB/s each way with a neighbour")


def ring_rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Return the pairs of neighbours in a ring of nodes, in rounds of disjoint pairs."""
    pairs = [(node, (node + 1) % nodes) for node in range(nodes if nodes > 2 else nodes - 1)]
    last_round = [pairs.pop()] if nodes > 2 and nodes % 2 else []  # an odd ring needs a third round
    return [pairs_of_round for pairs_of_round in (pairs[::2], pairs[1::2], last_round) if pairs_of_round]


def _exchange_rates(hosts: list[str], context: DistributedContext, tensor: torch.Tensor) -> dict[str, float]:
    """Return for each host the GB/s that its devices together exchange with the faster of its two neighbours."""
    local_world_size = context.local_world_size
    node = context.rank // local_world_size
    rates_of_rank = []  # one for each round
    for pairs in ring_rounds(context.world_size // local_world_size):
        peer_of = dict(pairs) | {second: first for first, second in pairs}
        context.barrier()
        rate = 0.0
        if node in peer_of:
            peer_rank = peer_of[node] * local_world_size + context.rank % local_world_size
            seconds = best_seconds(partial(context.exchange, tensor, peer_rank), context.device)
            rate = tensor.nbytes / seconds / 1e9
        rates_of_rank.append(rate)
    rates_of_ranks: list[list[float]] = context.all_gather_object(rates_of_rank)
    best_of_host = {}
    for first_rank in range(0, len(hosts), local_world_size):
        ranks_of_node = rates_of_ranks[first_rank : first_rank + local_world_size]
        rates_of_node = [sum(rates) for rates in zip(*ranks_of_node, strict=True)]
        best_of_host[hosts[first_rank]] = max(rates_of_node)
    return best_of_host
