"""Return the memory and the peak speed of the device that this process uses."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path

import torch

from tinytrain_dist.metrics.device_specs import ProductType, spec_of_gpu


def free_memory_bytes(device: torch.device, local_world_size: int) -> float:
    """Return how many bytes this process can still allocate on its GPU, or its share of the host's free memory.

    Returns infinity if the system does not report the host's free memory.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
        return 1024 * float(meminfo.split("MemAvailable:")[1].split()[0]) / local_world_size
    except (OSError, ValueError, IndexError):
        return math.inf


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes, Linux KiB


def peak_flops(device: torch.device, product_type: ProductType = "bf16") -> float | None:
    """Return the dense peak of the device in FLOP/s for products of one type; None for a CPU and for an unknown GPU.

    Without a peak, no MFU is recorded.
    MFU = tokens per second x FLOP per token (TransformerLM.flops_per_token) / (peak x ranks). The time is that of
    training steps, without evaluations and saves. Recomputation (activation checkpointing) does not count as work.
    """
    if device.type != "cuda":
        return None
    spec = spec_of_gpu(torch.cuda.get_device_name(device))
    return None if spec is None else spec.peak_flops(product_type)


def unknown_peak_warnings(device: torch.device) -> list[str]:
    """Return a sentence if the device is a GPU whose peak is unknown, so that the run records no MFU."""
    if device.type != "cuda" or peak_flops(device) is not None:
        return []
    name = torch.cuda.get_device_name(device)
    return [f"mfu: not recorded, because metrics/device_specs.py does not have the peak of this GPU ({name})"]
