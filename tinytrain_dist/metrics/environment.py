"""Record the environment of a run: versions, git commit, hosts and some environment variables.

Must not know what ranks do. It examines only this process; the caller passes in what the other ranks report.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinytrain_dist import __version__
from tinytrain_dist.utils.git import git_output
from tinytrain_dist.utils.package_files import PACKAGE


def library_versions() -> dict[str, Any]:
    """Return the versions that affect results, and so must be equal on all ranks.

    The versions of CUDA, NCCL and the driver are included only on a machine with a GPU.
    """
    versions: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if not torch.cuda.is_available():
        return versions
    driver_file = Path("/proc/driver/nvidia/version")  # nvidia-smi would take a second
    driver = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", driver_file.read_text()) if driver_file.exists() else None
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {**versions, "CUDA": torch.version.cuda, "NCCL": nccl, "driver": driver[1] if driver else None}


def environment_record(ranks: list[Any]) -> dict[str, Any]:
    """Return the content of environment.json. ranks: (host, device, process ID) of each rank.

    Environment variables are recorded only if they are on an allow-list, because others may hold passwords and keys.
    """
    commit = (git_output("rev-parse", "HEAD") or "").strip()
    submitted = PACKAGE.parent / "COMMIT"  # `tinytrain submit` writes it into its copy of the code
    allowed = ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_JOB_NODELIST"]
    allowed += ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "THP_MEM_ALLOC_ENABLE"]
    allowed += ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"]
    return {
        "tinytrain_dist": __version__,
        **library_versions(),
        "platform": platform.platform(),
        "git_commit": submitted.read_text().strip() if submitted.exists() else commit or None,
        "threads": torch.get_num_threads(),
        "ranks": [{"host": host, "device": device, "pid": pid} for host, device, pid in ranks],
        "variables": {name: os.environ[name] for name in allowed if name in os.environ},
    }
