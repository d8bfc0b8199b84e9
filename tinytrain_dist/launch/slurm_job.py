"""Tell a batch script what it cannot know: how the nodes reach this one, and the run folder of a configuration.

    python -m tinytrain_dist.launch.slurm_job [--peer HOST] [CONFIG.toml [SETTINGS]]

Prints HOST:PORT of the rendezvous, then the run folder if a configuration is given. Must not import torch, because a
batch script waits for it.
"""

from __future__ import annotations

import sys

from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.errors import TinytrainError
from tinytrain_dist.launch.start import head_endpoint


def main(args: list[str]) -> int:
    """Print what a batch script asks for; return 2 for a mistake of the user.

    --peer: a node that this node must be able to reach. Without it, Slurm is asked; a container may have no Slurm.
    """
    peer = None
    if args[:1] == ["--peer"]:
        peer, args = args[1], args[2:]
    try:
        print(head_endpoint(peer or None))
        if args:
            print(parse_command_line(args).target_dir)
    except TinytrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
