"""Choose the kernels of reproducible runs, and control how memory is freed and when garbage is collected."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from typing import Any

import torch

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.validation import ROUNDING_SETTINGS
from tinytrain_dist.distributed.torch_internals import (
    emulate_eager_rounding,
    prefer_attention_kernels,
    use_deterministic_kernels,
)
from tinytrain_dist.metrics.device_specs import product_type
from tinytrain_dist.model.matmul import widens_bf16

# Increased when a step is computed in another order on this type of device; checked when a reproducible run resumes.
ARITHMETIC_VERSION = {"cpu": 4, "cuda": 5}


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep large freed blocks, if the run is on a CPU.

    Otherwise glibc returns the blocks to the system, and each step pays for page faults when it allocates them again.
    Measured: this saves 11,400 page faults per step, and 25 ms of 420 ms of CPU time. MALLOC_ variables that the user
    has set take precedence.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        # the numbers are M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        for variable, option in (("MALLOC_TRIM_THRESHOLD_", -1), ("MALLOC_MMAP_THRESHOLD_", -3)):
            if variable not in os.environ:
                mallopt(option, 2**31 - 1)


def switch_threads_sooner(device: torch.device) -> None:
    """Let the main thread of a run on a GPU wait for Python's lock for at most 0.5 ms instead of 5 ms at a time.

    It takes the lock to launch every kernel. During a save in the background, other threads hold it too.
    """
    if device.type == "cuda":
        sys.setswitchinterval(5e-4)


def choose_float32_products(config: TrainingConfig, device: torch.device) -> None:
    """Compute float32 matrix products on a GPU in TF32, which is several times faster, unless the run is reproducible.

    TF32 rounds the factors to 10 bits after the point. On a CPU, and on a GPU without TF32, this changes nothing.
    """
    if device.type == "cuda":
        in_tf32 = product_type(config.precision, config.reproducible) == "tf32"
        torch.set_float32_matmul_precision("high" if in_tf32 else "highest")


def collect_garbage(first: bool = False) -> None:
    """Collect garbage now, and switch off automatic collection.

    All ranks call this at the same steps. Automatic collection would interrupt one rank at a time, and each time all
    other ranks would wait for it. first: also exclude all existing objects from later collections, which then take
    only milliseconds.
    """
    gc.disable()
    gc.collect()
    if first:
        gc.freeze()


def choose_attention_kernels(device: torch.device, reproducible: bool) -> None:
    """Set the order in which attention tries its kernels on a GPU; a CPU has no choice.

    On Hopper and newer GPUs cuDNN's kernels come first. measured (H200, 2026-11-27), bf16, forward and backward:
    [8, 16, 2048, 128] cuDNN 1.09 ms, FlashAttention 2 1.87 ms; [8, 32, 2048, 64] 1.40 and 2.07 ms. Reproducible runs
    do not use cuDNN, whose backward is not deterministic.
    """
    if device.type != "cuda":
        return
    fast = ["CUDNN_ATTENTION"] if not reproducible and torch.cuda.get_device_capability(device) >= (9, 0) else []
    prefer_attention_kernels(*fast, "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def configure_determinism(config: TrainingConfig, device: torch.device) -> dict[str, Any]:
    """Choose the kernels that a reproducible run needs, and return what its bits depend on.

    These are versions, the processor, and settings that affect only the bits. Checkpoints contain them, to be compared
    when the run resumes.
    """
    keep_freed_memory(device)
    switch_threads_sooner(device)
    choose_float32_products(config, device)
    threads = config.cpu_threads or (1 if config.reproducible else None)
    if threads is not None:
        torch.set_num_threads(threads)
    if config.reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        use_deterministic_kernels(compiles=bool(config.compile))
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - costs time; not needed
        if config.compile:
            # Without this, a fused kernel that contains a cast to bf16 skips the rounding. DDP casts weights inside
            # the kernel, FSDP before it, so their gradients would differ in bits (measured).
            emulate_eager_rounding()
    choose_attention_kernels(device, config.reproducible)
    kernels = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    if widens_bf16(config.precision, device):
        kernels += ", bf16 products in float32"
    return {
        "arithmetic": ARITHMETIC_VERSION[device.type],
        **{name: getattr(config, name) for name in ROUNDING_SETTINGS},
        "torch": torch.__version__,
        "kernels": f"{device.type} {kernels}",
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }
