"""Memory and peak speed of the device that this process uses."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path

import torch


def free_memory_bytes(device: torch.device, local_world_size: int) -> float:
    """Bytes that a process may still take: what is free on its GPU, or its share of the host's; infinite if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
        return 1024 * float(meminfo.split("MemAvailable:")[1].split()[0]) / local_world_size
    except (OSError, ValueError, IndexError):
        return math.inf


# Dense bf16 peak in FLOP/s by device name; data sheets, without sparsity. No entry, no MFU.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device, None where it is not known: then there is no MFU.

    MFU = tokens per second x flops per token (TransformerLM.flops_per_token) / (peak x ranks), in seconds of steps:
    without evaluation and saving. Work that is done twice (activation checkpointing) does not count.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
