"""`tinytrain train`: start all ranks on this machine, or the ranks of one of several nodes.

Must not know how a run is trained: launch/start.py finds the command, and this process becomes it.
"""

from __future__ import annotations

import dataclasses

from tinytrain_dist.cli.arguments import SETTINGS_HELP, parse_options
from tinytrain_dist.launch.start import NodeOptions, local_command, node_command
from tinytrain_dist.utils.option_types import ConfigFile, Number, Text


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """See `TrainOptions.__doc__`, which is set below, because it contains SETTINGS_HELP."""

    config: ConfigFile
    """Configuration of the run."""
    nproc: Number = None
    """Number of processes on each node. Default: one for each GPU. Without GPUs: on one machine the largest power of
    two that is at most 8 and at most the number of cores, on several nodes 1."""
    nnodes: Text = None
    """Number of nodes, or MIN:MAX: the run continues while at least MIN nodes are left."""
    node_rank: Number = None
    """0 on the head; 1, 2, ... on the other nodes."""
    head: Text = None
    """HOST or HOST:PORT: how the other nodes reach node 0, and a free port there (default: 29400)."""
    store: Text = None
    """HOST:PORT of `tinytrain store`, in place of --node-rank and --head: any node may then be lost, come back or be
    added. --nnodes MIN:MAX says how many are needed."""
    address: Text = None
    """With --store: the address of this node, as the others reach it (default: the one towards the store)."""
    leave_on_sigterm: bool = False
    """With --store: SIGTERM takes this node out of the run, after all have saved; the others train on. Without this
    option, only SIGUSR2 does, and SIGTERM stops the run on all nodes."""
    rdzv_id: Text = None
    """A name for this run, so that nodes of another run cannot join it by mistake."""
    max_restarts: Number = None
    """How often the processes are started again after one has died (default: 3; on one machine 0)."""
    slurm: bool = False
    """Take the options that are not given from Slurm's variables. For a command that srun starts on each node."""
    direct: bool = False
    """Without torchrun: this process is one rank, and srun has started all of them."""
    dry_run: bool = False
    """Print the command and its variables, and start nothing."""


TrainOptions.__doc__ = f"""Train on this machine, or as one of several nodes that run the same command.

The run saves and stops after Ctrl-C or SIGTERM. The same command resumes it. {SETTINGS_HELP}
"""


def main(args: list[str]) -> int:
    """Run `tinytrain train`. Does not return, except after --dry-run."""
    options, settings = parse_options(TrainOptions, "train", args)
    node = NodeOptions(
        options.nnodes,
        options.node_rank,
        options.head,
        options.nproc,
        options.rdzv_id,
        options.max_restarts,
        options.store,
        options.address,
        options.leave_on_sigterm,
        options.direct,
        options.slurm,
    )
    on_one_machine = dataclasses.replace(node, nproc=None, max_restarts=None) == NodeOptions()
    if on_one_machine:
        command = local_command(options.config, settings, options.nproc, options.max_restarts)
    else:
        command = node_command(options.config, settings, node)
    if options.dry_run:
        print(command.describe())
        return 0
    command.run()
