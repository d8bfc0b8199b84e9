"""Multiply activations by weights, and choose the type in which that is computed.

Must not know layers or losses. On an x86 CPU without bf16 instructions, products of a bf16 run are computed in
float32. Products of bf16 values are exact in float32, and every bf16 unit sums them in float32 as well. The head and
attention then also leave out roundings to bf16 between their steps, as compiled code may do everywhere.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def _cpu_lacks_bf16() -> bool:
    """Return whether this is an x86 CPU without bf16 instructions; other kinds are assumed to have them."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return platform.machine().lower() in ("x86_64", "amd64") and not has_bf16


# On such a CPU torch emulates bf16 products, at a fifth of the float32 rate.
# measured (2-core x86 VM, 2026-11-25), per core: bf16 33 GFLOP/s, float32 150 GFLOP/s
CPU_LACKS_BF16 = _cpu_lacks_bf16()


def widens_bf16(precision: str, device: torch.device) -> bool:
    """Return whether products of a run of this precision are computed in float32 although it is bf16."""
    return CPU_LACKS_BF16 and precision == "bf16" and device.type == "cpu"


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which products with `x` are computed: its own, but float32 for bf16 on a CPU without it."""
    emulated = CPU_LACKS_BF16 and x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return torch.float32 if emulated else x.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T with the weight rounded to x's type.

    x: [..., k]; weight: [n, k]; returns [..., n] in x's type.
    """
    narrow = weight.to(x.dtype)
    dtype = matmul_dtype(x)
    if dtype == x.dtype:
        return F.linear(x, narrow)  # without a cast of the result: under autocast it has another type
    return F.linear(x.to(dtype), narrow.to(dtype)).to(x.dtype)


@contextlib.contextmanager
def assume_cpu_lacks_bf16(lacks_bf16: bool) -> Iterator[None]:
    """Choose types as on a CPU with or without bf16 instructions, for a simulation of another device's step."""
    global CPU_LACKS_BF16
    before = CPU_LACKS_BF16
    CPU_LACKS_BF16 = lacks_bf16
    try:
        yield
    finally:
        CPU_LACKS_BF16 = before
