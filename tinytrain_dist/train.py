"""The program that torchrun starts on every rank: a configuration and overrides become a run.

    torchrun --nproc_per_node 2 -m tinytrain_dist.train configs/quickstart.toml --total-steps 100

The exit code tells how the run ended: 0 when done or stopped as asked, 2 for a user's mistake, otherwise 1.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from tinytrain_dist.reliability.start_marks import begin_start
from tinytrain_dist.reliability.stop_requests import install_signal_handlers
from tinytrain_dist.utils.output import keep_output_from_failing


def main() -> NoReturn:
    """Train as the command line says, and exit."""
    install_signal_handlers()  # first: importing torch takes seconds, in which a signal would kill this process
    begin_start()
    keep_output_from_failing()
    from tinytrain_dist.launch.worker import main as run_worker

    run_worker(sys.argv[1:])


if __name__ == "__main__":
    main()
