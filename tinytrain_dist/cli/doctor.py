"""`tinytrain doctor`: find what would go wrong with a run on this machine, or on all nodes together, before it starts.

Must not know how a run is trained. It checks, measures for a few seconds, and names a remedy for each problem. Read
`main` here, then the checks in the order in which they run: machine, network, cluster, speed in
`doctor_checks/`.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from typing import NoReturn

from tinytrain_dist.cli.doctor_checks.cluster import check_ranks, check_run
from tinytrain_dist.cli.doctor_checks.machine import check_machine
from tinytrain_dist.cli.doctor_checks.network import check_network
from tinytrain_dist.cli.doctor_checks.report import Report
from tinytrain_dist.cli.doctor_checks.speed import measure_speed
from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import init_distributed, launcher_rank, shutdown
from tinytrain_dist.distributed.rendezvous import Rendezvous, rendezvous, set_launcher_variables
from tinytrain_dist.errors import ConfigError, RendezvousError, TinytrainError
from tinytrain_dist.reliability import error_report
from tinytrain_dist.utils.text import format_list

HELP = """Find what would go wrong with a run, before it starts.
With CONFIG.toml, also check its settings, data and run folder.

On this machine alone:
  tinytrain doctor [CONFIG.toml] [SETTINGS]
On all devices of this machine, with one process for each:
  python -m tinytrain_dist.agent --standalone --nproc_per_node 8 -m tinytrain_dist.cli.doctor CONFIG.toml
On all nodes of a Slurm job (slurm/doctor.sbatch does this):
  export MASTER_ADDR=$(scontrol show hostnames | head -n1) MASTER_PORT=29400
  srun --ntasks-per-node=8 --cpus-per-task=8 python -m tinytrain_dist.cli.doctor CONFIG.toml
On several nodes without a launcher: start this on each node, with --node 0 on HEAD and --node 1 on the next node:
  tinytrain doctor CONFIG.toml --nodes 2 --node 0 --head HEAD:29400
On several nodes with torchrun: start this on each node (checks begin when all torchrun processes have connected):
  torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HEAD:29400 \\
    -m tinytrain_dist.cli.doctor CONFIG.toml

Exit code: 0 if there is no problem, 1 if there are problems, 2 for a mistake on the command line or in CONFIG.toml.
The bus bandwidth of an all-reduce over n ranks is 2 (n - 1) / n x bytes / seconds. It does not depend on n."""


def main(args: list[str]) -> int:
    """Run `tinytrain doctor`, alone or as one rank of a launcher; return 0 without problems, else 1."""
    options, config = _parse(args)
    report = Report(check_machine(), title=f"tinytrain doctor on {socket.gethostname()}")
    meeting: Rendezvous | None = None
    unreachable = False  # whether this rank cannot reach rank 0
    try:
        meeting = _find_all_ranks(options, report)
        network_problems: list[str] = []
        if len(meeting.hosts) > 1:
            network_problems, ok_text = check_network(meeting, options.timeout)
            report.add("network", network_problems, ok_text)
        if not network_problems:  # else the first collective would hang
            _run_collective_checks(report, config, meeting, options.timeout)
    except (RuntimeError, ConfigError) as error:  # a collective that failed, or a rank that did not arrive
        rank, world_size, host = launcher_rank()
        report.title = f"tinytrain doctor on rank {rank} of {world_size} ({host})"
        report.add_problems(error.problems if isinstance(error, ConfigError) else [_describe_broken_collective(error)])
        unreachable = meeting is None and isinstance(error, RendezvousError)
    if launcher_rank()[0] == 0 or unreachable:  # rank 0 prints for all ranks that can reach it
        report.print()
    return report.exit_code


def _find_all_ranks(options: argparse.Namespace, report: Report) -> Rendezvous:
    """Wait for all ranks, and return them. Errors: ConfigError naming the ranks that did not arrive."""
    if options.nodes:
        head, _, port = options.head.rpartition(":")
        set_launcher_variables(options.node, options.nodes, head, int(port))
    started = time.perf_counter()
    meeting = rendezvous(options.timeout)
    if len(meeting.hosts) > 1:
        host_names = list(dict.fromkeys(meeting.hosts))
        report.title = f"tinytrain doctor on {len(meeting.hosts)} ranks of {format_list(host_names)}"
        report.add("rendezvous", [], f"all ranks arrived within {time.perf_counter() - started:.1f} s")
    return meeting


def _run_collective_checks(report: Report, config: TrainingConfig | None, meeting: Rendezvous, seconds: float) -> None:
    """Run the checks that need collectives."""
    context = init_distributed(config.device if config else "auto", seconds, meeting)
    hosts = check_ranks(report, config, context)
    if config:
        check_run(report, config, context)
    measure_speed(report, hosts, context)
    shutdown()


class _Parser(argparse.ArgumentParser):
    """Reports a mistake like every other one, so that of several ranks only one prints it."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message}; --help explains the arguments", "the command line")


def _parse(args: list[str]) -> tuple[argparse.Namespace, TrainingConfig | None]:
    """Split the arguments into options of the doctor and the configuration, if one is given."""
    parser = _Parser(
        prog="tinytrain doctor [CONFIG.toml] [SETTINGS]",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the other ranks (default: 60)")
    parser.add_argument("--nodes", type=int, default=0, help="number of nodes (only without a launcher)")
    parser.add_argument("--node", type=int, help="number of this node, from 0 (only without a launcher)")
    parser.add_argument("--head", help="HOST:PORT at which all nodes reach node 0 (only without a launcher)")
    options, settings = parser.parse_known_args(args)
    given = (options.nodes > 0, options.node is not None, options.head is not None)
    if any(given) and not all(given):
        parser.error("--nodes, --node and --head must be given together")
    if options.nodes and not 0 <= options.node < options.nodes:
        parser.error(f"--node {options.node} must be in 0 .. {options.nodes - 1}")
    if options.head and not options.head.rpartition(":")[2].isdecimal():
        parser.error(f"--head {options.head} has no port; give HOST:PORT, such as {options.head}:29400")
    if not options.timeout > 0:
        parser.error(f"--timeout {options.timeout:g} must be greater than 0 seconds")
    return options, parse_command_line(settings, "tinytrain doctor") if settings else None


def _describe_broken_collective(error: RuntimeError) -> str:
    first_line = str(error).splitlines()[0][:200]
    return (
        f"collective: failed ({first_line}); a rank died or lost its connection; look for the first message of the "
        "other ranks"
    )


if __name__ == "__main__":  # torchrun and srun start this module by its name
    try:
        sys.exit(main(sys.argv[1:]))
    except TinytrainError as mistake:
        if not error_report.report_to_launcher(str(mistake), may_retry=False) and launcher_rank()[0] == 0:
            print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
