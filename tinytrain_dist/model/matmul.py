"""Multiply activations by weights, and choose the type in which products are computed.

Must not know layers or losses. On an x86 CPU without bf16 instructions, the matrix products of a bf16 run are computed
in float32. This is no less precise: products of bf16 values are exact in float32, and hardware with bf16 instructions
also sums them in float32. The head and attention then also skip roundings to bf16 between their steps, as compiled
code may do everywhere.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def _cpu_lacks_bf16() -> bool:
    """Return whether this is an x86 CPU without bf16 instructions; other CPUs are assumed to have them."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return platform.machine().lower() in ("x86_64", "amd64") and not has_bf16


# On a CPU without bf16 instructions torch emulates bf16 products, at a fifth of the float32 rate.
# measured (2-core x86 VM, 2026-11-25), per core: bf16 33 GFLOP/s, float32 150 GFLOP/s
CPU_LACKS_BF16 = _cpu_lacks_bf16()


def widens_bf16(precision: str, device: torch.device) -> bool:
    """Return whether a bf16 run on this device computes its products in float32; False for other precisions."""
    return CPU_LACKS_BF16 and precision == "bf16" and device.type == "cpu"


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the type for products with `x`: its own, or float32 for bf16 on a CPU without bf16 instructions."""
    emulated = CPU_LACKS_BF16 and x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return torch.float32 if emulated else x.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T with the weight rounded to x's type.

    x: [..., k]; weight: [n, k]; returns [..., n] in x's type.
    """
    rounded_weight = weight.to(x.dtype)
    dtype = matmul_dtype(x)
    if dtype == x.dtype:
        return F.linear(x, rounded_weight)  # not cast to x's type, because under autocast the result has another
    return F.linear(x.to(dtype), rounded_weight.to(dtype)).to(x.dtype)


@contextlib.contextmanager
def assume_cpu_lacks_bf16(lacks_bf16: bool) -> Iterator[None]:
    """Choose types as on a CPU with or without bf16 instructions, to simulate a step of another device."""
    global CPU_LACKS_BF16
    previous = CPU_LACKS_BF16
    CPU_LACKS_BF16 = lacks_bf16
    try:
        yield
    finally:
        CPU_LACKS_BF16 = previous
