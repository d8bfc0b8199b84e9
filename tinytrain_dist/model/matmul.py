"""Multiply activations by weights, and choose the type in which products are computed.

Must not know layers or losses. On an x86 CPU without bf16 instructions, the matrix products of a bf16 run are computed
in float32. This is no less precise: products of bf16 values are exact in float32, and hardware with bf16 instructions
also sums them in float32. The head and attention then also skip roundings to bf16 between their steps, as compiled
code may do everywhere.

Code of the model that differs between devices asks `runs_on_cuda`, not the tensor, so that a simulation on the CPU
(`simulate_device`) takes the same branches as the device that it stands for.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytrain_dist.config.sections import BF16_PRECISIONS


def _cpu_lacks_bf16() -> bool:
    """Return whether this is an x86 CPU without bf16 instructions; other CPUs are assumed to have them."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return platform.machine().lower() in ("x86_64", "amd64") and not has_bf16


# On a CPU without bf16 instructions torch emulates bf16 products, at a fifth of the float32 rate.
# measured (2-core x86 VM, 2026-11-25), per core: bf16 33 GFLOP/s, float32 150 GFLOP/s
CPU_LACKS_BF16 = _cpu_lacks_bf16()
_simulated_device: str | None = None  # see simulate_device


def widens_bf16(precision: str, device: torch.device) -> bool:
    """Return whether a bf16 run on this device computes its products in float32; False for other precisions."""
    return CPU_LACKS_BF16 and precision in BF16_PRECISIONS and device.type == "cpu"


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


def add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return total + a @ b in `dtype`, computed in place if there is a `total` (None: nothing to add to).

    a: [n, k], b: [k, m]; returns [n, m]. On a GPU one kernel multiplies bf16 and adds to a float32 total. It rounds
    nothing to bf16, and needs no memory for the product. measured (H200, 2026-11-27), [50304, 4096] x [4096, 2048]:
    1.17 ms; as a bf16 product that is then added: 1.58 ms
    """
    if runs_on_cuda(a) and dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16:
        if a.is_cuda:
            if total is None:
                return torch.mm(a, b, out_dtype=dtype)
            return torch.addmm(total, a, b, out_dtype=dtype, out=total)
        if is_fake(a):  # a simulation, in which only the memory matters: the kernel needs none besides its result
            return torch.empty(len(a), b.shape[1], dtype=dtype) if total is None else total
        a, b = a.to(dtype), b.to(dtype)
    if total is None:
        return (a @ b).to(dtype)
    if a.dtype == b.dtype == total.dtype:  # types differ under a user's autocast
        return total.addmm_(a, b)
    return total.add_(a @ b)


def runs_on_cuda(x: Tensor) -> bool:
    """Return whether code that gets `x` runs on a CUDA device, or simulates one."""
    return (_simulated_device or x.device.type) == "cuda"


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has a shape but no memory. Versions: FakeTensor in torch 2.11 to 2.15."""
    if torch.compiler.is_compiling():
        return False  # there every tensor is fake; the code is for real ones
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


@contextlib.contextmanager
def simulate_device(device_type: str) -> Iterator[None]:
    """Take the branches of another type of device ("cpu", "cuda") in this context, with tensors on the CPU."""
    global CPU_LACKS_BF16, _simulated_device
    previous = CPU_LACKS_BF16, _simulated_device
    CPU_LACKS_BF16, _simulated_device = CPU_LACKS_BF16 and device_type == "cpu", device_type
    try:
        yield
    finally:
        CPU_LACKS_BF16, _simulated_device = previous
