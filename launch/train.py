#!/usr/bin/env python3
"""Train as one rank; torchrun starts this program from a checkout. The same as `python -m tinytrain_dist.train`.

torchrun --standalone --nproc_per_node 2 launch/train.py configs/quickstart.toml --total-steps 100
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = ROOT / ".venv" / "bin" / "python"

if __name__ == "__main__":
    if importlib.util.find_spec("tyro") is None and VENV_PYTHON.exists():
        os.execv(VENV_PYTHON, [str(VENV_PYTHON), *sys.argv])  # started by the system's own Python, such as for --help
    sys.path.insert(0, str(ROOT))
    from tinytrain_dist.train import main

    main()
