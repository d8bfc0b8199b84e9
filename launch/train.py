"""Train as one rank; torchrun starts this program from a checkout. The same as `python -m tinytrain_dist.train`.

torchrun --standalone --nproc_per_node 2 launch/train.py configs/quickstart.toml --total-steps 100
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinytrain_dist.train import main

if __name__ == "__main__":
    main()
