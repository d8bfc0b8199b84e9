"""Count what this machine offers to a run: usable cores and visible GPUs.

Must not know torch: importing it takes seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from pathlib import Path

CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of a container: "QUOTA PERIOD" in microseconds, or "max PERIOD"


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and the limit of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no limit
        quota, period = map(int, CPU_LIMIT.read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


def visible_gpus() -> int:
    """Return the number of NVIDIA GPUs that a process here sees; CUDA_VISIBLE_DEVICES can hide some."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    installed = sum(line.startswith("GPU ") for line in listed.splitlines())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return installed
    # as CUDA reads it: the list ends before the first entry that is no device
    names = (name.strip() for name in chosen.split(","))
    return len(list(itertools.takewhile(lambda name: _is_device(name, installed), names)))


def _is_device(name: str, installed: int) -> bool:
    return int(name) < installed if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
