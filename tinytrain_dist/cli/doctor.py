"""`tinytrain doctor`: find what would go wrong with a run on this machine, or on all nodes together, before it starts.

Must not know how a run is trained. It checks, measures for a few seconds, and names a remedy for each problem. Read
`main` here, then the checks in the order in which they run: machine, network, cluster, speed in
`doctor_checks/`.
"""

from __future__ import annotations

import dataclasses
import socket
import time

from tinytrain_dist.cli.arguments import UsageError, parse_options
from tinytrain_dist.cli.doctor_checks.cluster import check_ranks, check_run
from tinytrain_dist.cli.doctor_checks.machine import check_machine
from tinytrain_dist.cli.doctor_checks.network import check_network
from tinytrain_dist.cli.doctor_checks.report import Report
from tinytrain_dist.cli.doctor_checks.speed import measure_speed
from tinytrain_dist.cli.rank_program import run_rank
from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import init_distributed, launcher_rank, shutdown
from tinytrain_dist.distributed.rendezvous import Rendezvous, rendezvous, set_launcher_variables
from tinytrain_dist.errors import ConfigError, RendezvousError
from tinytrain_dist.launch.start import DEFAULT_PORT, split_head
from tinytrain_dist.utils.option_types import NodeRank, NumNodes, Text
from tinytrain_dist.utils.text import first_line, format_list


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """Find what would go wrong with a run, before it starts.

    With CONFIG.toml, also check its settings, data and run folder.

    On this machine alone:

    tinytrain doctor [CONFIG.toml] [SETTINGS]

    On all devices of this machine, with one process for each:

    torchrun --standalone --nproc_per_node 8 -m tinytrain_dist.cli.doctor CONFIG.toml

    On all nodes of a Slurm job:

    sbatch --nodes 2 --gpus-per-node 8 --cpus-per-task 64 --time 5 slurm/doctor.sbatch CONFIG.toml

    On several nodes without a launcher, on each node with its own number:

    tinytrain doctor CONFIG.toml --nnodes 2 --node-rank 0 --head HEAD

    On several nodes with torchrun, on each node (the checks begin when all have connected):

    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HEAD:29400 \\
    -m tinytrain_dist.cli.doctor CONFIG.toml

    Exit code: 0 if there is no problem, 1 if there are problems, 2 for a mistake on the command line or in CONFIG.toml.
    The bus bandwidth of an all-reduce over n ranks is 2 (n - 1) / n x bytes / seconds. It does not depend on n.
    """

    timeout: float = 60.0
    """Seconds to wait for the other ranks."""
    nnodes: NumNodes = None
    """Number of nodes (only without a launcher)."""
    node_rank: NodeRank = None
    """0 on the head; 1, 2, ... on the other nodes (only without a launcher)."""
    head: Text = None
    """HOST or HOST:PORT: how the other nodes reach node 0, and a free port there (default: 29400; only without a
    launcher)."""

    def problem(self) -> str:
        """Return what is wrong with the options, as a sentence; "" if nothing is. Errors: StartError for --head."""
        given = [self.nnodes is not None, self.node_rank is not None, self.head is not None]
        if any(given) and not all(given):
            return "--nnodes, --node-rank, --head: only some of them are set; give all three, or none"
        if self.nnodes is not None and self.nnodes < 1:
            return f"--nnodes: {self.nnodes} is not a number of nodes; give at least 1"
        if self.nnodes is not None and self.node_rank is not None and not 0 <= self.node_rank < self.nnodes:
            return f"--node-rank: {self.node_rank} is not the number of a node; give 0 .. {self.nnodes - 1}"
        if self.head is not None:
            split_head(self.head, DEFAULT_PORT)
        if not self.timeout > 0:
            return f"--timeout: {self.timeout:g} is not greater than 0; give the seconds to wait"
        return ""


def main(args: list[str]) -> int:
    """Run `tinytrain doctor`, alone or as one rank of a launcher; return 0 without problems, else 1."""
    options, config = _parse(args)
    report = Report(check_machine(), title=f"tinytrain doctor on {socket.gethostname()}")
    joined: Rendezvous | None = None
    unreachable = False  # whether this rank cannot reach rank 0
    try:
        joined = _find_all_ranks(options, report)
        network_problems: list[str] = []
        if len(joined.hosts) > 1:
            network_problems, ok_text = check_network(joined, options.timeout)
            report.add("network", network_problems, ok_text)
        if not network_problems:  # else the first collective would hang
            _run_collective_checks(report, config, joined, options.timeout)
    except (RuntimeError, ConfigError) as error:  # a collective that failed, or a rank that did not arrive
        rank, world_size, host = launcher_rank()
        report.title = f"tinytrain doctor on rank {rank} of {world_size} ({host})"
        report.add_problems(error.problems if isinstance(error, ConfigError) else [_describe_broken_collective(error)])
        unreachable = joined is None and isinstance(error, RendezvousError)
    if launcher_rank()[0] == 0 or unreachable:  # rank 0 prints for all ranks that can reach it
        report.print()
    return report.exit_code


def _find_all_ranks(options: DoctorOptions, report: Report) -> Rendezvous:
    """Wait for all ranks, and return them. Errors: ConfigError naming the ranks that did not arrive."""
    if options.nnodes is not None and options.node_rank is not None and options.head is not None:
        head, port = split_head(options.head, DEFAULT_PORT)
        set_launcher_variables(options.node_rank, options.nnodes, head, port)
    started = time.perf_counter()
    joined = rendezvous(options.timeout)
    if len(joined.hosts) > 1:
        host_names = list(dict.fromkeys(joined.hosts))
        report.title = f"tinytrain doctor on {len(joined.hosts)} ranks of {format_list(host_names)}"
        report.add("rendezvous", [], f"all ranks arrived within {time.perf_counter() - started:.1f} s")
    return joined


def _run_collective_checks(report: Report, config: TrainingConfig | None, joined: Rendezvous, seconds: float) -> None:
    """Run the checks that need collectives."""
    context = init_distributed(config.device if config else "auto", seconds, joined)
    hosts = check_ranks(report, config, context)
    if config:
        check_run(report, config, context)
    measure_speed(report, hosts, context)
    shutdown()


def _parse(args: list[str]) -> tuple[DoctorOptions, TrainingConfig | None]:
    """Return the options of the doctor and the configuration, if one is given. Errors: ConfigError."""
    options, settings = parse_options(DoctorOptions, "doctor", args)
    if problem := options.problem():
        raise UsageError(problem, "doctor")
    return options, parse_command_line(settings, "tinytrain doctor") if settings else None


def _describe_broken_collective(error: RuntimeError) -> str:
    reason = first_line(error)[:200]
    return (
        f"collective: failed ({reason}); a rank died or lost its connection; look for the first message of the other "
        "ranks"
    )


if __name__ == "__main__":  # torchrun and srun start this module by its name
    run_rank(main)
