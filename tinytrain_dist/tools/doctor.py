"""Owns `tinytrain doctor`: what would go wrong with a run on this machine, or on all nodes together, before it starts.

Must not know how a run is trained. It looks, measures for some seconds, and says a remedy for each problem it names.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import socket
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tinytrain_dist import census, distributed, failure
from tinytrain_dist.commandline import parse_command_line, resolve_vocab_size
from tinytrain_dist.config import TrainingConfig, listed
from tinytrain_dist.distributed import REPLICATE, SHARD, DistributedContext
from tinytrain_dist.environment import parameter_count
from tinytrain_dist.errors import ConfigError, MeetingError, TinytrainError
from tinytrain_dist.layout import Layout
from tinytrain_dist.meeting import Meeting, announce, meet
from tinytrain_dist.network import is_loopback, resolve, why_unreachable
from tinytrain_dist.preflight import check_space, prove_shared
from tinytrain_dist.tools.inspect import Run
from tinytrain_dist.tools.machine import OK, PROBLEM, Finding, interfaces, machine

SLOW = 0.8  # of the median: devices of one kind differ by some percent, broken ones by more
ALL_PAIRS, NEIGHBOURS = 16, 8  # so many nodes try each other node; more of them, the next so many
CONNECT_SECONDS = 3.0
CHECKPOINT_BYTES = 12  # of a weight: itself and two moments, in float32
MIB = 2**20
HELP = """Finds what would go wrong with a run, before the run. With CONFIG.toml also its settings, data and run folder.

On this machine alone:
  tinytrain doctor [CONFIG.toml] [SETTINGS]
All devices of this machine, one process for each:
  python -m tinytrain_dist.agent --standalone --nproc_per_node 8 -m tinytrain_dist.tools.doctor CONFIG.toml
All nodes of a Slurm job (slurm/doctor.sbatch does this):
  export MASTER_ADDR=$(scontrol show hostnames | head -n1) MASTER_PORT=29400
  srun --ntasks-per-node=8 --cpus-per-task=8 python -m tinytrain_dist.tools.doctor CONFIG.toml
Several nodes without a launcher; on each of them, with --node 0 on HEAD, 1 on the next:
  tinytrain doctor CONFIG.toml --nodes 2 --node 0 --head HEAD:29400
Several nodes, torchrun on each of them (which must find each other before the doctor can look):
  torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HEAD:29400 \\
    -m tinytrain_dist.tools.doctor CONFIG.toml

Exit code: 0 nothing found, 1 problems found, 2 a mistake on the command line or in the configuration.
Bus bandwidth of an all-reduce over n ranks: 2 (n - 1) / n x bytes / seconds, which does not depend on n."""


@dataclass
class Report:
    """What was found so far, and the tables under it."""

    machine: list[Finding]
    findings: list[Finding] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)

    def add(self, topic: str, problems: list[str], fine: str) -> None:
        """A problem for each sentence, or one line that says what is fine."""
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


def main(args: list[str]) -> int:
    """`tinytrain doctor`, and what a launcher starts on every rank."""
    options, config = _parse(args)
    report, meeting = Report(machine()), None
    try:
        if options.nodes:
            head, _, port = options.head.rpartition(":")
            announce(options.node, options.nodes, head, int(port))
        started = time.perf_counter()
        meeting = meet(options.timeout)
        title = f"tinytrain doctor on {socket.gethostname()}"
        if len(meeting.hosts) > 1:
            names = list(dict.fromkeys(meeting.hosts))
            title = f"tinytrain doctor on {len(meeting.hosts)} ranks of {listed(names)}"
            report.add("meeting", [], f"all came within {time.perf_counter() - started:.1f} s")
            report.add("network", *_check_network(meeting, options.timeout))
        if all(level != PROBLEM for level, _ in report.findings):  # else the first collective would hang
            device = config.device if config else "auto"
            context = distributed.start(device, options.timeout, meeting)
            _check_together(report, config, context)
            distributed.close()
    except (RuntimeError, ConfigError) as error:  # a collective that did not end, or a rank that did not come
        problems = error.problems if isinstance(error, ConfigError) else [_broken(error)]
        report.findings += [(PROBLEM, problem) for problem in problems]
        title = "tinytrain doctor on rank {} ({})".format(*distributed.who())
        if distributed.who()[0] and not isinstance(error, MeetingError):
            return 1  # rank 0 says it for all
    if distributed.who()[0] and meeting is not None:
        return 1 if any(level == PROBLEM for level, _ in report.machine + report.findings) else 0
    return report.show(title)


def _parse(args: list[str]) -> tuple[argparse.Namespace, TrainingConfig | None]:
    parser = argparse.ArgumentParser(
        prog="tinytrain doctor [CONFIG.toml] [SETTINGS]",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the others (default: 60)")
    parser.add_argument("--nodes", type=int, default=0, help="number of nodes, where no launcher says it")
    parser.add_argument("--node", type=int, help="which of them this one is, from 0")
    parser.add_argument("--head", help="HOST:PORT of node 0, reachable from all")
    options, rest = parser.parse_known_args(args)
    given = (options.nodes > 0, options.node is not None, options.head is not None)
    if any(given) and not all(given):
        parser.error("--nodes, --node and --head go together")
    if options.nodes and not 0 <= options.node < options.nodes:
        parser.error(f"--node {options.node} is not among 0 .. {options.nodes - 1}")
    if options.head and not options.head.rpartition(":")[2].isdecimal():
        parser.error(f"--head {options.head} has no port; give HOST:PORT, such as {options.head}:29400")
    if not options.timeout > 0:
        parser.error(f"--timeout {options.timeout:g} is no time to wait; give seconds")
    return options, parse_command_line(rest, "tinytrain doctor") if rest else None


def _broken(error: RuntimeError) -> str:
    return (
        f"collective: it did not end ({str(error).splitlines()[0][:200]}); a rank died or its network is cut: look "
        "for the first message of the others"
    )


# ---------------------------------------------------------------- the network, before there are collectives


def _check_network(meeting: Meeting, seconds: float) -> tuple[list[str], str]:
    """Let one rank of each node connect to each other node; the same sentences on every rank."""
    host = socket.gethostname()
    with socket.create_server(("", 0), backlog=1024) as server:  # the kernel answers, nobody need accept
        cards = meeting.exchange("cards", [host, server.getsockname()[1], interfaces()], seconds)
        nodes = {name: (port, where) for name, port, where in reversed([card for card in cards if card])}
        names = sorted(nodes)
        after = names[names.index(host) + 1 :] + names[: names.index(host)]
        peers = after if len(names) <= ALL_PAIRS else after[:NEIGHBOURS]
        problems = (
            _try_peers(host, {name: nodes[name] for name in peers}) if meeting.hosts.index(host) == meeting.rank else []
        )
        found = meeting.exchange("reached", problems, seconds + CONNECT_SECONDS * (1 + len(peers)))
    silent = [
        f"network: rank {rank} ({meeting.hosts[rank]}) fell silent" for rank, one in enumerate(found) if one is None
    ]
    problems = silent + [text for one in found if one for text in one]
    return problems, f"{len(names)} node(s), each reaches {'all' if len(peers) == len(after) else len(peers)} others"


def _try_peers(host: str, peers: dict[str, tuple[int, dict[str, str]]]) -> list[str]:
    """What is wrong on the way from here to each peer: its name, its port, the choice of interfaces."""

    def check(name: str) -> list[str]:
        port, where = peers[name]
        known = resolve(name)
        if known and all(map(is_loopback, known)):
            return [f"network: {name} stands for {known[0]} on {host}, which is {host} itself; mend /etc/hosts there"]
        answers = {card: why_unreachable(address, port, CONNECT_SECONDS) for card, address in where.items()}
        good = [card for card, reason in answers.items() if not reason]
        if not good:
            reasons = ", ".join(f"{where[card]} on {card}: {reason}" for card, reason in answers.items())
            return [
                f"network: {host} cannot reach {name} ({reasons or 'no address'}); open all ports between nodes, or "
                "ask for the interface that joins them"
            ]
        return []

    with ThreadPoolExecutor(max(1, len(peers))) as pool:
        return [text for found in pool.map(check, peers) for text in found]


# ---------------------------------------------------------------- all ranks together


def _check_together(report: Report, config: TrainingConfig | None, context: DistributedContext) -> None:
    everyone = context.gather_objects(
        (
            context.host,
            census.facts(config, context),
            (config and config.cpu_threads) or torch.get_num_threads(),
            census.usable_cores(),
            torch.cuda.device_count() if context.device.type == "cuda" else 0,
        )
    )
    here = {host: found for host, found in reversed(context.gather_objects((context.host, report.machine)))}
    report.machine = [one for host in reversed(here) for one in here[host]]
    hosts, facts, threads, cores, gpus = (list(column) for column in zip(*everyone, strict=True))
    report.add("world", _shape(hosts, context), f"{context.world_size} rank(s), {context.local_world_size} a node")
    odd = census.odd_ones(facts, hosts)
    said = ", ".join(f"{name} {facts[0][name]}" for name in ("code", "torch", "python"))
    report.add("same on all ranks", odd, said + (f", {len(config.resolved())} settings" if config else ""))
    report.add(
        "threads", census.crowded(threads, cores, hosts), f"{threads[0]} of {len(cores[0])} core(s) for a process"
    )
    idle = [host for host, there in dict(zip(hosts, gpus, strict=True)).items() if there > context.local_world_size]
    report.add("GPUs", [f"GPUs: more than processes on {host}; start one process for each" for host in idle],
               "one process for each" if gpus[0] else "none used")  # fmt: skip
    if context.world_size > 1:
        offsets = census.clock_offsets(context)
        late = context.broadcast_object(census.late_clocks(offsets, hosts))
        apart = max(abs(offset) + bound for offset, bound in offsets)
        report.add("clock", late, f"no node is more than {1000 * apart:.0f} ms from {hosts[0]}")
    if config:
        _check_run(report, config, context)
    _measure(report, hosts, context)


def _shape(hosts: list[str], context: DistributedContext) -> list[str]:
    """What is wrong with how ranks lie on hosts; where nothing is, ranks of a node are neighbours."""
    counts = {host: hosts.count(host) for host in hosts}
    if any(count % context.local_world_size for count in counts.values()):
        listing = ", ".join(f"{count} on {host}" for host, count in counts.items())
        return [f"world: nodes have different numbers of processes ({listing}); start the same number on each"]
    blocks = 1 + sum(a != b for a, b in itertools.pairwise(hosts))
    if blocks > len(counts):
        return ["world: ranks of one node are not neighbours; use srun --distribution=block"]
    return []


def _check_run(report: Report, config: TrainingConfig, context: DistributedContext) -> None:
    """Data, folder and room of the run that is meant; leaves nothing behind."""
    folder = config.checkpoints_dir
    new = [path for path in (folder, *folder.parents) if not path.exists()]

    def data() -> TrainingConfig:
        found = resolve_vocab_size(config)
        for name, files in (("train_data", found.train_files), ("val_data", found.val_files)):
            if gone := [path for path in files if not Path(path).is_file()]:
                raise ConfigError(f"{name}: there is no {gone[0]} on {context.host}; give a token file")
        return found

    for topic, action, fine in (
        ("train_data", lambda: distributed.together(data), str(config.train_data)),
        ("folder", lambda: prove_shared(folder, context), f"{folder} is written, synced, renamed and seen by all"),
    ):
        try:
            found = action()
            report.add(topic, [], fine)
        except TinytrainError as error:
            report.add(topic, getattr(error, "problems", [str(error)]), "")
            return
        config = found or config
    run = Run.at(Path(config.target_dir)) if context.is_main else None
    size, keep = CHECKPOINT_BYTES * parameter_count(config), config.keep_last + 1
    try:
        check_space(folder, size, keep, len(run.committed()) if run else 0, context)
        report.add("disk", [], f"room for {keep} checkpoints of {size / 1e9:.2f} GB")
    except TinytrainError as error:
        report.add("disk", [str(error)], "")
    if context.is_main:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()


# ---------------------------------------------------------------- speed


def _measure(report: Report, hosts: list[str], context: DistributedContext) -> None:
    ranks = [f"rank {rank} ({host})" for rank, host in enumerate(hosts)]
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        context.barrier()  # all at once, as in training: devices of a node share power and memory
        mine = context.gather_objects(matmul_rate(context.device, dtype) / 1e12)
        rates[dtype] = mine
        name = f"matmul {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
        slow = outliers(name, "TFLOP/s", dict(zip(ranks, mine, strict=True)), "look for other processes, heat, power")
        report.add(name, slow, f"{statistics.median(mine):.3g} TFLOP/s a device")
    table = [["host", "ranks", "bf16 TFLOP/s", "fp32 TFLOP/s"]]
    for host in dict.fromkeys(hosts):
        there = [rank for rank, where in enumerate(hosts) if where == host]
        slowest = [f"{min(rates[dtype][rank] for rank in there):.3g}" for dtype in rates]
        table.append([host, f"{there[0]}-{there[-1]}" if len(there) > 1 else str(there[0]), *slowest])
    even = not _shape(hosts, context)
    if context.world_size > 1 and even:
        local = context.local_world_size
        context = context.with_layout(Layout("doctor", context.world_size // local, local, ""))
        report.tables.append(_bandwidths(report, hosts, context))
    report.tables.append(table)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of square matrix products, the best of those that fit into `seconds`."""
    size = 8192 if device.type == "cuda" else 512
    matrix = torch.rand(size, size, device=device).to(dtype)  # a constant one would need less power, and lie
    return 2 * size**3 / best_seconds(lambda: matrix @ matrix, device, seconds)


def best_seconds(action: Callable[[], Any], device: torch.device, seconds: float = 0.0, times: int = 3) -> float:
    """The shortest time of an action, done for `seconds` and at least `times`; the first may be a warm-up."""

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
    """A sentence for each that is slower than SLOW times the median."""
    median = statistics.median(values.values())
    return [
        f"{what}: {name} has {value:.3g} {unit}, the median of {len(values)} is {median:.3g}; {remedy}"
        for name, value in values.items()
        if value < SLOW * median
    ]


def _bandwidths(report: Report, hosts: list[str], context: DistributedContext) -> list[list[str]]:
    """All-reduce inside a node, across nodes and over all; who is slow inside by itself, across by its neighbours."""
    sizes = [1, 16, 256 if context.device.type == "cuda" else 64]
    scopes = {"inside a node": SHARD, "across nodes": REPLICATE}
    groups = {what: context.group(axis) for what, axis in scopes.items()}
    groups = {what: group for what, group in groups.items() if distributed.group_size(group) > 1}
    table = [["all-reduce, bus GB/s (median)", *(f"{size} MiB" for size in sizes)]]
    for what, group in groups.items():
        count, medians = distributed.group_size(group), []
        for size in sizes:
            tensor = torch.zeros(size * MIB // 4, device=context.device)
            context.barrier()
            seconds = best_seconds(partial(context.all_reduce_sum, tensor, scopes[what]), context.device)
            everyone = context.gather_objects(2 * (count - 1) / count * size * MIB / seconds / 1e9)
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
    """The neighbours of a ring in rounds of disjoint pairs; each node has two, so a slow one is slow with both."""
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
            rate = tensor.nbytes / best_seconds(partial(context.swap, tensor, partner), context.device) / 1e9
        mine.append(rate)
    everyone = context.gather_objects(mine)
    nodes = [list(map(sum, zip(*everyone[at : at + local], strict=True))) for at in range(0, len(hosts), local)]
    return {hosts[at * local]: max(rates) for at, rates in enumerate(nodes)}


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TinytrainError as mistake:
        if not failure.tell_launcher(str(mistake)) and distributed.who()[0] == 0:
            print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
