"""Find our training program on a command line of torchrun, and check its settings before any process is started.

Must not know torch: an agent reports a wrong setting before it imports torch, and once, where every rank would.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.config.schema import TrainingConfig

MODULE = "tinytrain_dist.train"
VERBS = "tinytrain_dist.cli."  # modules that begin with this save nothing when they are stopped
SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "train.py"  # of a checkout


def training_arguments(args: Sequence[str]) -> list[str] | None:
    """Return what torchrun passes on to our training program; None if it starts another program."""
    for position, arg in enumerate(args):
        is_module = arg == MODULE and args[position - 1 : position] in (["-m"], ["--module"])
        if is_module or (not arg.startswith("-") and Path(arg).resolve() == SCRIPT):
            return list(args[position + 1 :])
    return None


def runs_verb(args: Sequence[str]) -> bool:
    """Return whether torchrun's arguments start a verb of ours, such as `-m tinytrain_dist.cli.doctor`."""
    pairs = itertools.pairwise(args)
    return any(flag in ("-m", "--module") and module.startswith(VERBS) for flag, module in pairs)


def training_config(args: Sequence[str]) -> TrainingConfig | None:
    """Return the configuration of the run that torchrun's arguments start; None if they start another program.

    Errors: ConfigError with everything that is wrong with the settings. --help ends the process.
    """
    settings = training_arguments(args)
    return None if settings is None else parse_command_line(settings)
