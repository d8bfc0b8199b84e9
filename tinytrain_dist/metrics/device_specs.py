"""Peak numbers of devices and links, each with its source.

Must not know models or runs. Memory is what the driver shows. Peaks are dense (without sparsity) with sums in float32.
Links are one direction of one device inside a node, and of a whole node outside.

Sources: NVIDIA's data sheets of H100 SXM, H200 SXM, A100 SXM, L40S, L4, and its Ada and Ampere GPU architecture papers
(RTX 4090, RTX 3090). Networks are those of DGX H100 and DGX A100 (eight ports of 400 and 200 Gbit/s). For the others
100 Gbit/s are assumed: set `--network` if you know better.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from dataclasses import dataclass

from tinytrain_dist.errors import ConfigError

GIB = 2**30
REACHABLE_SHARE = 0.5  # of the peak, by well-tuned trainers of large models (PaLM: 46 %, Llama 3: 38 to 43 %)
REACHABLE_SHARE_ON_CPU = 0.6  # of matrix products measured on this machine
REACHABLE_SHARE_OF_LINKS = 0.8  # of the data sheet, by large collectives
CONTEXT_BYTES = 1.2 * GIB  # CUDA context, NCCL's buffers and libraries' work space of one process


@dataclass(frozen=True)
class DeviceSpec:
    """Peak numbers of one device, in bytes, FLOP/s and bytes/s."""

    name: str  # as the user gives it to `--device`
    memory: float  # bytes
    bf16_flops: float  # FLOP/s
    fp32_flops: float
    neighbours: float  # bytes/s from one device to the others of its node
    network: float  # bytes/s from a whole node to the other nodes
    context: float = CONTEXT_BYTES  # bytes that a process needs beside its tensors
    reached: float = REACHABLE_SHARE  # of the peak, by a well-tuned trainer


DEVICE_SPECS = {
    device.name: device
    for device in (
        DeviceSpec("h100", 79.6 * GIB, 989e12, 67e12, 450e9, 400e9),
        DeviceSpec("h200", 140.4 * GIB, 989e12, 67e12, 450e9, 400e9),
        DeviceSpec("a100", 79.3 * GIB, 312e12, 19.5e12, 300e9, 200e9),
        DeviceSpec("a100-40gb", 39.4 * GIB, 312e12, 19.5e12, 300e9, 200e9),
        DeviceSpec("l40s", 45.0 * GIB, 362e12, 91.6e12, 32e9, 12.5e9),
        DeviceSpec("l4", 22.5 * GIB, 121e12, 30.3e12, 32e9, 12.5e9),
        DeviceSpec("rtx4090", 23.6 * GIB, 165e12, 82.6e12, 32e9, 12.5e9),
        DeviceSpec("rtx3090", 23.6 * GIB, 71e12, 35.6e12, 32e9, 12.5e9),
    )
}


def spec_of_gpu(marketing_name: str) -> DeviceSpec | None:
    """Return the device that the driver calls `marketing_name`, such as "NVIDIA H100 80GB HBM3"; None if unknown.

    Devices that differ in memory only share a name, and the first of them is returned: their peaks are equal. A GH200
    counts as its H200.
    """
    normalized_name = marketing_name.lower().replace("rtx ", "rtx")
    for name, spec in DEVICE_SPECS.items():
        # not the L4 of an L40, nor the RTX 3090 of an RTX 3090 Ti, which is faster
        if re.search(rf"{name}(?!\d| ti\b)", normalized_name):
            return spec
    return None


def find_device_spec(name: str, per_node: int, precision: str) -> DeviceSpec:
    """Return the device with this short name; `cpu` is this machine, shared by `per_node` processes.

    The numbers of a CPU are its memory and the speed of matrix products in `precision`, measured now.
    Errors: ConfigError with the nearest names.
    """
    key = name.lower().replace("_", "-")
    if key in DEVICE_SPECS:
        return DEVICE_SPECS[key]
    if key == "cpu":
        return _this_cpu(per_node, precision)
    close = difflib.get_close_matches(key, [*DEVICE_SPECS, "cpu"], n=3, cutoff=0.4) or [*DEVICE_SPECS, "cpu"]
    raise ConfigError(f"device: {name!r} is not in the table; nearest: {', '.join(close)}", "the settings of plan")


def _this_cpu(per_node: int, precision: str) -> DeviceSpec:
    import torch

    size = 512
    matrix = torch.ones(size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best_seconds = 1e9
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        best_seconds = min(best_seconds, time.perf_counter() - start)
    cores_per_thread = min(1.0, (os.cpu_count() or 1) / (per_node * torch.get_num_threads()))
    flops = 2 * size**3 / best_seconds * cores_per_thread
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / per_node
    # importing torch takes about 0.4 GiB; neighbours talk through memory, other hosts over 1 Gbit/s
    return DeviceSpec("cpu", memory, flops, flops, 5e9, 0.125e9, context=0.4 * GIB, reached=REACHABLE_SHARE_ON_CPU)
