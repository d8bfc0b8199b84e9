"""Tell a batch script what it cannot know: how the nodes reach this one, and the run folder of a configuration.

    python -m tinytrain_dist.launch.slurm_job [--peer HOST] [--sweep FILE --task N] [CONFIG.toml [SETTINGS]]

Prints HOST:PORT of the rendezvous, then the run folder if a configuration is given, then the settings of task N of a
sweep, each on a line. Must not import torch, because a batch script waits for it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.errors import TinytrainError
from tinytrain_dist.launch.start import head_endpoint
from tinytrain_dist.launch.sweep import line_of_task, task_settings


def main(args: list[str]) -> int:
    """Print what a batch script asks for; return 2 for a mistake of the user.

    --peer: a node that this node must be able to reach. Without it, Slurm is asked; a container may have no Slurm.
    """
    options = {}
    while args[:1] and args[0] in ("--peer", "--sweep", "--task"):
        options[args[0]], args = args[1], args[2:]
    try:
        more = []
        if "--sweep" in options:
            task = int(options["--task"])
            more = task_settings(args, line_of_task(Path(options["--sweep"]), task), task)
        print(head_endpoint(options.get("--peer") or None))
        if args:
            print("\n".join([parse_command_line([*args, *more]).target_dir, *more]))
    except TinytrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
