"""Owns what a run runs on: the kernels that decide bits, what one device holds, and the record of hosts and versions.

Must not know ranks' work: it looks at one process, and is told what the others found.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinytrain_dist import __version__
from tinytrain_dist.config import TrainingConfig
from tinytrain_dist.products import WITHOUT_BF16, widened

ARITHMETIC = 4  # raised when a step is computed in another order; reproducible runs notice at a resume


def free_memory(device: torch.device, local_world_size: int) -> float:
    """Bytes that a process may still take: what is free on its GPU, or its share of the host's; infinite if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
        return 1024 * float(meminfo.split("MemAvailable:")[1].split()[0]) / local_world_size
    except (OSError, ValueError, IndexError):
        return math.inf


def keep_memory(device: torch.device) -> None:
    """Let glibc keep large blocks on a CPU instead of giving them back and faulting them in again at each step.

    Measured: 11,400 page faults and 25 ms of 420 ms CPU time a step less. MALLOC_ variables of the user go first.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for variable, option in (("MALLOC_TRIM_THRESHOLD_", -1), ("MALLOC_MMAP_THRESHOLD_", -3)):
            if variable not in os.environ:
                mallopt(option, 2**31 - 1)


def compile_pays(config: TrainingConfig, device: torch.device) -> bool:
    """Whether the run is long enough for torch.compile; from the configuration and the kind of device alone.

    So two machines never differ. Compiling takes 10 to 60 s and saves a fifth to a third of the time of a step; the
    bounds are runs of about five minutes on two CPU cores, or on one large GPU.
    """
    weights = parameter_count(config)
    flops = 6.0 * weights * config.total_steps * config.batch_size * config.context_len
    return flops >= (1e17 if device.type == "cuda" else 3e13)


def why_not_compile(device: torch.device, exact_bf16: bool = False) -> str:
    """Empty if torch.compile works on this device here, else what it says: it needs a C++ compiler or Triton.

    exact_bf16: a layout must not decide bits. Where bf16 products are computed in float32, only torch 2.13 can be kept
    from leaving out the rounding of weights before them (joint_graph.py, pointless_convert).
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if exact_bf16 and device.type == "cpu" and WITHOUT_BF16 and version < (2, 13):
        return f"torch {torch.__version__} leaves out roundings to bf16 that decide bits; 2.13 does not"
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return ""


def parameter_count(config: TrainingConfig) -> int:
    """Weights of the embedding (unless shared), the head and the matrices of the blocks: all but some thousands."""
    embedding = (config.vocab_size or 0) * config.d_model * (1 if config.tie_embeddings else 2)
    attention = 2 * config.d_model * config.head_width * (config.num_heads + config.kv_heads)
    return embedding + config.num_layers * (attention + 3 * config.d_model * config.ffn_dim)


def collect_garbage(first: bool = False) -> None:
    """Collect now, on all ranks at the same steps, and not by itself: then one rank stops and the others wait for it.

    What is there at the first step stays; leaving it out makes later collections take milliseconds.
    """
    gc.disable()
    gc.collect()
    if first:
        gc.freeze()


def decide_bits(config: TrainingConfig, device: torch.device) -> dict[str, Any]:
    """Choose the kernels that a reproducible run needs; what decides the last bit besides the run's identity."""
    keep_memory(device)
    threads = config.cpu_threads or (1 if config.reproducible else None)
    if threads is not None:
        torch.set_num_threads(threads)
    if config.reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - costs time; we read none
        if config.compile:
            import torch._inductor.config as inductor

            # without it fused kernels skip roundings to bf16 where they see both sides of a cast, and FSDP's weights,
            # which arrive in bf16, get other gradients than DDP's, which are cast inside (measured: other bits)
            inductor.emulate_precision_casts = True
    kernels = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    if widened(config.precision, device):
        kernels += ", bf16 products in float32"
    settings = ("reproducible", "micro_batch_size", "precision", "compile", "loss_chunk_tokens")
    return {
        "arithmetic": ARITHMETIC,
        **{name: getattr(config, name) for name in settings},
        "torch": torch.__version__,
        "kernels": f"{device.type} {kernels}",
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def versions() -> dict[str, Any]:
    """Of what computes: the same on all ranks, or their results are not. The NVIDIA ones only where there is a GPU."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if not torch.cuda.is_available():
        return found
    driver = Path("/proc/driver/nvidia/version")  # nvidia-smi would take a second
    version = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", driver.read_text()) if driver.exists() else None
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {**found, "CUDA": torch.version.cuda, "NCCL": nccl, "driver": version[1] if version else None}


def environment(ranks: list[Any]) -> dict[str, Any]:
    """What the run ran on. Variables are an allow-list: an environment holds people's keys."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    submitted = Path(__file__).parent.parent / "COMMIT"  # launch/submit.py writes it into its copy of the code
    wanted = ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_JOB_NODELIST"]
    wanted += ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "THP_MEM_ALLOC_ENABLE"]
    return {
        "tinytrain_dist": __version__,
        **versions(),
        "platform": platform.platform(),
        "git_commit": submitted.read_text().strip() if submitted.exists() else git.stdout.strip() or None,
        "threads": torch.get_num_threads(),
        "ranks": [{"host": host, "device": device, "pid": pid} for host, device, pid in ranks],
        "variables": {name: os.environ[name] for name in wanted if name in os.environ},
    }
