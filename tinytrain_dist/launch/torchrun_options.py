"""Read torchrun's command line, to know what it will do. Importing torchrun takes seconds, so it is imported late."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parse_torchrun_options(args: Sequence[str]) -> argparse.Namespace:
    """Return torchrun's options by name. A wrong command line ends the process with torchrun's message."""
    from torch.distributed.run import get_args_parser

    return get_args_parser().parse_args(args)


def node_range(options: argparse.Namespace) -> tuple[int, int]:
    """Return the smallest and the largest number of nodes that --nnodes allows."""
    fewest, _, most = str(options.nnodes).partition(":")
    return int(fewest), int(most or fewest)


def is_single_node(options: argparse.Namespace) -> bool:
    """Return whether all ranks run on this machine."""
    return bool(options.standalone) or node_range(options)[1] == 1


def address_arguments(options: argparse.Namespace) -> list[str]:
    """Return the argument that makes the loopback address this machine's own, if there is no other node.

    Without it torchrun announces the machine's own name, which nobody knows in many containers.
    """
    needs_no_name = is_single_node(options) and not options.local_addr
    return ["--local-addr=127.0.0.1"] if needs_no_name else []
