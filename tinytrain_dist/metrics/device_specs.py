"""List memory size, peak speed and link bandwidth of devices.

Must not know models or runs. What the numbers mean:

- memory: as nvidia-smi reports it; torch reports a little less (139.8 GiB on an H200)
- bandwidth of the memory: peak
- peak FLOP/s: dense (without sparsity), accumulated in float32
- bandwidth within a node: of one device, in one direction
- bandwidth of the network: of a whole node, in one direction
- bandwidth to the host: of one device to the memory of its node, in one direction (PCIe or NVLink-C2C)
- memory of the host: of a node, for each of its devices

The numbers are meant to be those of NVIDIA's data sheets and architecture papers, but some rows were written from
memory. Which rows were compared with these documents was not recorded. The rows of B200, B300, GB200, GB300, GH200, H20
and of the NVL and PCIe boards are approximate. Compare a row with the data sheet before you rely on it.

A name without an ending is the SXM board. The network is that of DGX H100 for H100, H20 and H200 (eight ports of 400
Gbit/s), of DGX A100 (eight ports of 200 Gbit/s), DGX B200 (eight of 400), DGX B300 (eight of 800), and of a node with
four GB200 or GB300 (four ports of 400 or 800 Gbit/s). The network of all other devices is assumed to have 100 Gbit/s.
The memory of a host is that of DGX nodes (1 or 2 TB for eight GPUs), and an assumption for other boards.
`tinytrain plan --network` and `--host-memory` override these values.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from dataclasses import dataclass
from typing import Literal

from tinytrain_dist.config.sections import BF16_PRECISIONS
from tinytrain_dist.errors import ConfigError

ProductType = Literal["bf16", "tf32", "fp32"]  # of matrix products

GIB = 2**30
REACHABLE_SHARE = 0.5  # of the peak: what well-tuned trainers of large models reach (PaLM 46 %, Llama 3 38 to 43 %)
REACHABLE_SHARE_ON_CPU = 0.6  # of the speed of matrix products measured on this machine
REACHABLE_SHARE_OF_LINKS = 0.8  # of the bandwidth in the data sheet: what large collectives reach
# words in the driver's name of a device that is faster or slower than the one in the table, or only a part of it
OTHER_DEVICES = {"ti", "d", "super", "laptop", "mobile", "max", "mig"}
PCIE_4, PCIE_5, C2C = 32e9, 64e9, 450e9  # bytes/s in one direction: 16 lanes, and NVLink-C2C
CONTEXT_BYTES = 1.2 * GIB  # of each process: CUDA context, NCCL's buffers, workspaces of libraries


@dataclass(frozen=True)
class DeviceSpec:
    """Peak numbers of one device, in bytes, FLOP/s and bytes/s."""

    name: str  # the value of `--device`
    memory: float  # bytes
    bf16_flops: float  # FLOP/s
    fp32_flops: float
    bandwidth: float  # bytes/s of the memory
    neighbours: float  # bytes/s from one device to the other devices of its node
    network: float  # bytes/s from a whole node to the other nodes
    context: float = CONTEXT_BYTES  # bytes that a process needs in addition to its tensors
    reached: float = REACHABLE_SHARE  # share of the peak that a well-tuned trainer reaches
    host_link: float = PCIE_5  # bytes/s between one device and the memory of its host, in one direction
    host_memory: float = 64e9  # bytes of a node's memory for each device

    @property
    def tf32_flops(self) -> float:
        """Peak of float32 products in TF32: half of the bf16 peak on every GPU of the table. A CPU has no TF32."""
        return max(self.fp32_flops, self.bf16_flops / 2)

    def peak_flops(self, product_type: ProductType) -> float:
        """Return the peak in FLOP/s of matrix products in this type."""
        return {"bf16": self.bf16_flops, "tf32": self.tf32_flops, "fp32": self.fp32_flops}[product_type]


DEVICE_SPECS = {
    device.name: device
    for device in (
        DeviceSpec("gb300", 277.0 * GIB, 2.5e15, 80e12, 8.0e12, 900e9, 400e9, host_link=C2C / 2, host_memory=240e9),
        DeviceSpec("b300", 268.0 * GIB, 2.25e15, 75e12, 8.0e12, 900e9, 800e9, host_memory=256e9),
        DeviceSpec("gb200", 184.0 * GIB, 2.5e15, 80e12, 8.0e12, 900e9, 200e9, host_link=C2C / 2, host_memory=240e9),
        DeviceSpec("b200", 179.0 * GIB, 2.25e15, 75e12, 8.0e12, 900e9, 400e9, host_memory=256e9),
        DeviceSpec("gh200", 95.0 * GIB, 989e12, 67e12, 4.0e12, 450e9, 12.5e9, host_link=C2C, host_memory=480e9),
        DeviceSpec("h200", 140.4 * GIB, 989e12, 67e12, 4.8e12, 450e9, 400e9, host_memory=256e9),
        DeviceSpec("h200-nvl", 140.4 * GIB, 835e12, 60e12, 4.8e12, 64e9, 12.5e9, host_memory=128e9),
        DeviceSpec("h100", 79.6 * GIB, 989e12, 67e12, 3.35e12, 450e9, 400e9, host_memory=256e9),
        DeviceSpec("h100-pcie", 79.6 * GIB, 756e12, 51e12, 2.0e12, 64e9, 12.5e9, host_memory=128e9),
        DeviceSpec("h100-nvl", 93.6 * GIB, 835e12, 60e12, 3.9e12, 64e9, 12.5e9, host_memory=128e9),
        DeviceSpec("h20", 95.6 * GIB, 148e12, 44e12, 4.0e12, 450e9, 400e9, host_memory=256e9),
        DeviceSpec("a100", 79.3 * GIB, 312e12, 19.5e12, 2.0e12, 300e9, 200e9, host_link=PCIE_4, host_memory=128e9),
        DeviceSpec(
            "a100-40gb", 39.4 * GIB, 312e12, 19.5e12, 1.55e12, 300e9, 200e9, host_link=PCIE_4, host_memory=128e9
        ),
        DeviceSpec("l40s", 45.0 * GIB, 362e12, 91.6e12, 0.86e12, 32e9, 12.5e9, host_link=PCIE_4),
        DeviceSpec("l4", 22.5 * GIB, 121e12, 30.3e12, 0.3e12, 32e9, 12.5e9, host_link=PCIE_4),
        DeviceSpec("rtx4090", 23.6 * GIB, 165e12, 82.6e12, 1.0e12, 32e9, 12.5e9, host_link=PCIE_4),
        DeviceSpec("rtx3090", 23.6 * GIB, 71e12, 35.6e12, 0.94e12, 32e9, 12.5e9, host_link=PCIE_4),
    )
}


def product_type(precision: str, reproducible: bool) -> ProductType:
    """Return the type in which a GPU computes the matrix products of a run. A reproducible run does not use TF32."""
    if precision in BF16_PRECISIONS:  # by convention the MFU of float8 is also a share of the bf16 peak
        return "bf16"
    return "fp32" if reproducible else "tf32"


def spec_of_gpu(marketing_name: str) -> DeviceSpec | None:
    """Return the spec of the GPU that the driver calls `marketing_name`; None if it is unknown.

    Such a name is "NVIDIA H100 80GB HBM3" or "NVIDIA A100-PCIE-40GB". The spec is the one with the most words in common
    whose words are all in the name.
    """
    words = set(re.findall(r"[a-z0-9]+", marketing_name.lower().replace("rtx ", "rtx")))
    if words & OTHER_DEVICES:
        return None
    matching = [spec for spec in DEVICE_SPECS.values() if words.issuperset(spec.name.split("-"))]
    return max(matching, key=lambda spec: len(spec.name.split("-")), default=None)


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
    raise ConfigError(f"--device: {name!r} is unknown; the nearest names are {', '.join(close)}", "the command line")


def _this_cpu(per_node: int, precision: str) -> DeviceSpec:
    import torch

    size = 512
    matrix = torch.ones(size, size, dtype=torch.bfloat16 if precision in BF16_PRECISIONS else torch.float32)
    best_seconds = 1e9
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        best_seconds = min(best_seconds, time.perf_counter() - start)
    cores_per_thread = min(1.0, (os.cpu_count() or 1) / (per_node * torch.get_num_threads()))
    flops = 2 * size**3 / best_seconds * cores_per_thread
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / per_node
    # importing torch takes about 0.4 GiB; assumed: 5 GB/s between processes of a host, 1 Gbit/s between hosts
    # 20 GB/s of the memory for all processes
    links = {"neighbours": 5e9, "network": 0.125e9, "host_link": 10e9 / per_node}
    return DeviceSpec(
        "cpu",
        memory,
        flops,
        flops,
        bandwidth=20e9 / per_node,
        **links,
        context=0.4 * GIB,
        reached=REACHABLE_SHARE_ON_CPU,
        host_memory=memory,
    )
