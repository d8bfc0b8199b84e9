"""`tinytrain doctor`: find what would go wrong with a run on this machine, or on all nodes together, before it starts.

Must not know how a run is trained. It looks, measures for some seconds, and gives a remedy for each problem.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tinytrain_dist.cli.machine_checks import PROBLEM, interfaces, machine
from tinytrain_dist.cli.speed_checks import Report, measure_speed, rank_placement_problems
from tinytrain_dist.config.loading import parse_command_line, resolve_vocab_size
from tinytrain_dist.config.run_folder import RunFolder
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import DistributedContext, init_distributed, launcher_rank, shutdown
from tinytrain_dist.distributed.network import is_loopback, resolve, why_unreachable
from tinytrain_dist.distributed.rendezvous import Rendezvous, rendezvous, set_launcher_variables
from tinytrain_dist.errors import ConfigError, RendezvousError, TinytrainError
from tinytrain_dist.reliability import error_report, rank_consistency
from tinytrain_dist.reliability.storage_checks import check_disk_space, check_shared_storage
from tinytrain_dist.utils.text import format_list

ALL_PAIRS, NEIGHBOURS = 16, 8  # so many nodes try each other node; more of them, the next so many
CONNECT_SECONDS = 3.0
CHECKPOINT_BYTES = 12  # of a weight: itself and two moments, in float32
HELP = """Finds what would go wrong with a run, before the run. With CONFIG.toml also its settings, data and run folder.

On this machine alone:
  tinytrain doctor [CONFIG.toml] [SETTINGS]
All devices of this machine, one process for each:
  python -m tinytrain_dist.agent --standalone --nproc_per_node 8 -m tinytrain_dist.cli.doctor CONFIG.toml
All nodes of a Slurm job (slurm/doctor.sbatch does this):
  export MASTER_ADDR=$(scontrol show hostnames | head -n1) MASTER_PORT=29400
  srun --ntasks-per-node=8 --cpus-per-task=8 python -m tinytrain_dist.cli.doctor CONFIG.toml
Several nodes without a launcher; on each of them, with --node 0 on HEAD, 1 on the next:
  tinytrain doctor CONFIG.toml --nodes 2 --node 0 --head HEAD:29400
Several nodes, torchrun on each of them (which must find each other before the doctor can look):
  torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HEAD:29400 \\
    -m tinytrain_dist.cli.doctor CONFIG.toml

Exit code: 0 nothing found, 1 problems found, 2 a mistake on the command line or in the configuration.
Bus bandwidth of an all-reduce over n ranks: 2 (n - 1) / n x bytes / seconds, which does not depend on n."""


def main(args: list[str]) -> int:
    """`tinytrain doctor`, and what a launcher starts on every rank."""
    options, config = _parse(args)
    report, meeting = Report(machine()), None
    try:
        if options.nodes:
            head, _, port = options.head.rpartition(":")
            set_launcher_variables(options.node, options.nodes, head, int(port))
        started = time.perf_counter()
        meeting = rendezvous(options.timeout)
        title = f"tinytrain doctor on {socket.gethostname()}"
        if len(meeting.hosts) > 1:
            names = list(dict.fromkeys(meeting.hosts))
            title = f"tinytrain doctor on {len(meeting.hosts)} ranks of {format_list(names)}"
            report.add("meeting", [], f"all came within {time.perf_counter() - started:.1f} s")
            report.add("network", *_check_network(meeting, options.timeout))
        if all(level != PROBLEM for level, _ in report.findings):  # else the first collective would hang
            device = config.device if config else "auto"
            context = init_distributed(device, options.timeout, meeting)
            _check_together(report, config, context)
            shutdown()
    except (RuntimeError, ConfigError) as error:  # a collective that did not end, or a rank that did not come
        problems = error.problems if isinstance(error, ConfigError) else [_broken(error)]
        report.findings += [(PROBLEM, problem) for problem in problems]
        title = "tinytrain doctor on rank {} ({})".format(*launcher_rank())
        if launcher_rank()[0] and not isinstance(error, RendezvousError):
            return 1  # rank 0 says it for all
    if launcher_rank()[0] and meeting is not None:
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


def _check_network(meeting: Rendezvous, seconds: float) -> tuple[list[str], str]:
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
        f"network: rank {rank} ({meeting.hosts[rank]}) stopped responding"
        for rank, one in enumerate(found)
        if one is None
    ]
    problems = silent + [text for one in found if one for text in one]
    return problems, f"{len(names)} node(s), each reaches {'all' if len(peers) == len(after) else len(peers)} others"


def _try_peers(host: str, peers: dict[str, tuple[int, dict[str, str]]]) -> list[str]:
    """Return what is wrong on the way from here to each peer: its name, its port, the choice of interfaces."""

    def check(name: str) -> list[str]:
        port, where = peers[name]
        known = resolve(name)
        if known and all(map(is_loopback, known)):
            return [f"network: {name} resolves to {known[0]} on {host}, which is {host} itself; fix /etc/hosts there"]
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


def _check_together(report: Report, config: TrainingConfig | None, context: DistributedContext) -> None:
    everyone = context.all_gather_object(
        (
            context.host,
            rank_consistency.rank_facts(config, context),
            (config and config.cpu_threads) or torch.get_num_threads(),
            rank_consistency.usable_cores(),
            torch.cuda.device_count() if context.device.type == "cuda" else 0,
        )
    )
    here = {host: found for host, found in reversed(context.all_gather_object((context.host, report.machine)))}
    report.machine = [one for host in reversed(here) for one in here[host]]
    hosts, facts, threads, cores, gpus = (list(column) for column in zip(*everyone, strict=True))
    report.add(
        "world",
        rank_placement_problems(hosts, context),
        f"{context.world_size} rank(s), {context.local_world_size} a node",
    )
    odd = rank_consistency.find_differences(facts, hosts)
    said = ", ".join(f"{name} {facts[0][name]}" for name in ("code", "torch", "python"))
    report.add("same on all ranks", odd, said + (f", {len(config.resolved())} settings" if config else ""))
    report.add(
        "threads",
        rank_consistency.oversubscribed_hosts(threads, cores, hosts),
        f"{threads[0]} of {len(cores[0])} core(s) for a process",
    )
    idle = [host for host, there in dict(zip(hosts, gpus, strict=True)).items() if there > context.local_world_size]
    report.add("GPUs", [f"GPUs: more than processes on {host}; start one process for each" for host in idle],
               "one process for each" if gpus[0] else "none used")  # fmt: skip
    if context.world_size > 1:
        offsets = rank_consistency.clock_offsets(context)
        late = context.broadcast_object(rank_consistency.skewed_clocks(offsets, hosts))
        apart = max(abs(offset) + bound for offset, bound in offsets)
        report.add("clock", late, f"no node is more than {1000 * apart:.0f} ms from {hosts[0]}")
    if config:
        _check_run(report, config, context)
    measure_speed(report, hosts, context)


def _check_run(report: Report, config: TrainingConfig, context: DistributedContext) -> None:
    """Check the data, the folder and the disk space of the given run; leaves nothing behind."""
    folder = config.checkpoints_dir
    new = [path for path in (folder, *folder.parents) if not path.exists()]

    def data() -> TrainingConfig:
        found = resolve_vocab_size(config)
        for name, files in (("train_data", found.train_files), ("val_data", found.val_files)):
            if gone := [path for path in files if not Path(path).is_file()]:
                raise ConfigError(f"{name}: there is no {gone[0]} on {context.host}; give a token file")
        return found

    for topic, action, fine in (
        ("train_data", lambda: collectives.run_on_all_ranks(data), str(config.train_data)),
        (
            "folder",
            lambda: check_shared_storage(folder, context),
            f"{folder} is written, synced, renamed and seen by all",
        ),
    ):
        try:
            found = action()
            report.add(topic, [], fine)
        except TinytrainError as error:
            report.add(topic, getattr(error, "problems", [str(error)]), "")
            return
        config = found or config
    run = RunFolder.at(Path(config.target_dir)) if context.is_main else None
    size, keep = CHECKPOINT_BYTES * config.model.approximate_parameter_count, config.keep_last + 1
    try:
        check_disk_space(folder, size, keep, len(run.committed()) if run else 0, context)
        report.add("disk", [], f"room for {keep} checkpoints of {size / 1e9:.2f} GB")
    except TinytrainError as error:
        report.add("disk", [str(error)], "")
    if context.is_main:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TinytrainError as mistake:
        if not error_report.report_to_launcher(str(mistake)) and launcher_rank()[0] == 0:
            print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
