"""The program torchrun starts: a configuration and overrides become a run, and its outcome the exit code.

    torchrun --standalone --nproc_per_node 2 launch/train.py configs/quickstart.toml --total-steps 100

It installs the stop signals before anything else and must not hold any other logic.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinytrain_dist import stopping

stopping.install_handlers()  # before torch is imported, which takes seconds in which a signal would kill us

from tinytrain_dist.run import main  # noqa: E402

if __name__ == "__main__":
    main(sys.argv[1:])
