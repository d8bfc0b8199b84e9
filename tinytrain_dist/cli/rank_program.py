"""Run a verb as a rank of a launcher: of several ranks, only one prints a mistake of the user."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from tinytrain_dist.distributed.context import launcher_rank
from tinytrain_dist.errors import TinytrainError
from tinytrain_dist.reliability import error_report


def run_rank(main: Callable[[list[str]], int]) -> NoReturn:
    """Call the main function of a verb with the arguments of this process, and exit with its code."""
    try:
        sys.exit(main(sys.argv[1:]))
    except TinytrainError as mistake:
        if not error_report.report_to_launcher(str(mistake), may_retry=False) and launcher_rank()[0] == 0:
            print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
