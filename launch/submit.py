#!/usr/bin/env python3
"""Submit a run to Slurm from a checkout: the same as `tinytrain submit`.

launch/submit.py configs/llama_1b_hsdp.toml --nodes 2 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = ROOT / ".venv" / "bin" / "python"

if __name__ == "__main__":
    if importlib.util.find_spec("tyro") is None and VENV_PYTHON.exists():
        os.execv(VENV_PYTHON, [str(VENV_PYTHON), *sys.argv])  # started by the system's own Python
    sys.path.insert(0, str(ROOT))
    from tinytrain_dist.__main__ import main

    sys.exit(main(["submit", *sys.argv[1:]]))
