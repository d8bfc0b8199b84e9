"""List memory size, peak speed and link bandwidth of devices, with sources.

Must not know models or runs. What the numbers mean:

- memory: as the driver reports it
- peak FLOP/s: dense (without sparsity), accumulated in float32
- bandwidth within a node: of one device, in one direction
- bandwidth of the network: of a whole node, in one direction

Sources: NVIDIA's data sheets for H100 SXM, H200 SXM, A100 SXM, L40S and L4, and its Ada and Ampere GPU architecture
papers (RTX 4090, RTX 3090). The network of H100 and H200 is that of DGX H100 (eight ports of 400 Gbit/s), the network
of A100 is that of DGX A100 (eight ports of 200 Gbit/s). The network of all other devices is assumed to have
100 Gbit/s. `tinytrain plan --network` overrides these values.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from dataclasses import dataclass

from tinytrain_dist.errors import ConfigError

GIB = 2**30
REACHABLE_SHARE = 0.5  # of the peak: what well-tuned trainers of large models reach (PaLM 46 %, Llama 3 38 to 43 %)
REACHABLE_SHARE_ON_CPU = 0.6  # of the speed of matrix products measured on this machine
REACHABLE_SHARE_OF_LINKS = 0.8  # of the bandwidth in the data sheet: what large collectives reach
CONTEXT_BYTES = 1.2 * GIB  # of each process: CUDA context, NCCL's buffers, workspaces of libraries


@dataclass(frozen=True)
class DeviceSpec:
    """Peak numbers of one device, in bytes, FLOP/s and bytes/s."""

    name: str  # the value of `--device`
    memory: float  # bytes
    bf16_flops: float  # FLOP/s
    fp32_flops: float
    neighbours: float  # bytes/s from one device to the other devices of its node
    network: float  # bytes/s from a whole node to the other nodes
    context: float = CONTEXT_BYTES  # bytes that a process needs in addition to its tensors
    reached: float = REACHABLE_SHARE  # share of the peak that a well-tuned trainer reaches


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
    """Return the spec of the GPU that the driver calls `marketing_name`; None if it is unknown.

    Such a name is "NVIDIA H100 80GB HBM3". Devices that differ only in memory match the same name. The first of them is
    returned, because their peaks are equal. A GH200 counts as an H200.
    """
    normalized_name = marketing_name.lower().replace("rtx ", "rtx")
    for name, spec in DEVICE_SPECS.items():
        # "l4" must not match an L40, and "rtx3090" must not match an RTX 3090 Ti, which is faster
        if re.search(rf"{name}(?!\d| ti\b)", normalized_name):
            return spec
    return None


def find_device_spec(name: str, per_node: int, precision: str) -> DeviceSpec:
    """Return the spec with this short name; `cpu` is this machine, shared by `per_node` processes.

    For `cpu`, the speed of matrix products in `precision` is measured now. Errors: ConfigError with the nearest names.
    """
    key = name.lower().replace("_", "-")
    if key in DEVICE_SPECS:
        return DEVICE_SPECS[key]
    if key == "cpu":
        return _this_cpu(per_node, precision)
    close = difflib.get_close_matches(key, [*DEVICE_SPECS, "cpu"], n=3, cutoff=0.4) or [*DEVICE_SPECS, "cpu"]
    raise ConfigError(f"device: {name!r} is unknown; the nearest names are {', '.join(close)}", "the settings of plan")


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
    # importing torch takes about 0.4 GiB; assumed: 5 GB/s between processes of a host, 1 Gbit/s between hosts
    return DeviceSpec("cpu", memory, flops, flops, 5e9, 0.125e9, context=0.4 * GIB, reached=REACHABLE_SHARE_ON_CPU)
