"""Train a model: the program that torchrun starts on every rank.

    torchrun --nproc_per_node 2 -m tinytrain_dist.train configs/quickstart.toml --total-steps 100

Exit codes: 0 if the run is complete or was stopped on request, 2 for a mistake of the user, 1 for any other failure.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from tinytrain_dist.reliability.start_marks import begin_start
from tinytrain_dist.reliability.stop_requests import install_signal_handlers
from tinytrain_dist.utils.lost_output import keep_output_from_failing


def main() -> NoReturn:
    """Train with the settings of the command line, and exit."""
    install_signal_handlers()  # before torch is imported: that takes seconds, in which a signal would kill this process
    begin_start()
    keep_output_from_failing()
    from tinytrain_dist.launch.rank_program import main as run_rank

    run_rank(sys.argv[1:])


if __name__ == "__main__":
    main()
