"""Multiply matrices in float8, with one scale for each tensor, computed from its values each time.

Must not know layers. Products are summed in float32 by the hardware. The largest value of a tensor is scaled to the
largest of the format: activations and weights have three bits of mantissa (e4m3), gradients two and a wider range
(e5m2). Source: Micikevicius et al. 2022 (arXiv 2209.05433).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FORWARD_TYPE = torch.float8_e4m3fn
BACKWARD_TYPE = torch.float8_e5m2
SIZE_MULTIPLE = 16  # of both sizes of a weight, which the hardware needs
MIN_CAPABILITY = (8, 9)  # of a GPU with float8 units: Ada, Hopper and newer
TINY = 1e-12  # the scale of a tensor of zeros stays finite


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T in x's type, with both rounded to float8.

    x: [..., k] in bf16; weight: [n, k], whose gradient has its own type; k and n are multiples of SIZE_MULTIPLE.
    """
    y: Tensor = _Fp8Linear.apply(x.reshape(-1, x.shape[-1]), weight)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x scaled and rounded to the float8 type `dtype`, and the factor (float32 scalar) that undoes the scale.

    A value that is not finite makes the factor or the value NaN, so the loss shows it.
    """
    inverse = inverse_scale(x, dtype)
    return scale_and_round(x, inverse, dtype), inverse


def inverse_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest magnitude in x divided by the largest value of `dtype`: float32 scalar."""
    return x.abs().amax().float().clamp(min=TINY) / torch.finfo(dtype).max


def scale_and_round(x: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x / inverse rounded to the float8 type `dtype`."""
    largest = torch.finfo(dtype).max
    return (x.float() / inverse).clamp(-largest, largest).to(dtype)  # without clamp, rounding up gives NaN


class _Fp8Linear(torch.autograd.Function):
    """The product in float8, and both products of its backward.

    The kernel multiplies a row-major by a column-major matrix, so backward transposes float8 copies. Kept for backward
    are x in float8, and the weight itself: under FSDP a copy of it would stay in memory while the weight is freed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_inverse = quantize(x, FORWARD_TYPE)
        # rounded to x's type first, so that a wrapper that has already done so changes nothing
        weight8, weight_inverse = quantize(weight.to(x.dtype), FORWARD_TYPE)
        ctx.save_for_backward(x8, x_inverse, weight, weight_inverse)
        # the fast sum of the hardware keeps fewer bits; it is precise enough for activations, not for gradients
        return _product(x8, weight8.t(), x_inverse, weight_inverse, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grad_outputs
        x8, x_inverse, weight, weight_inverse = ctx.saved_tensors
        grad8, grad_inverse = quantize(grad, BACKWARD_TYPE)
        weight8 = scale_and_round(weight.to(grad.dtype), weight_inverse, FORWARD_TYPE)
        grad_x = _product(grad8, _column_major(weight8), grad_inverse, weight_inverse, grad.dtype)
        if padding := -len(x8) % SIZE_MULTIPLE:  # rows of zeros add nothing to the sum over tokens
            x8, grad8 = (
                F.pad(tensor.view(torch.uint8), (0, 0, 0, padding)).view(tensor.dtype) for tensor in (x8, grad8)
            )
        grad_weight = _product(grad8.t().contiguous(), _column_major(x8), grad_inverse, x_inverse, grad.dtype)
        # FSDP passes the weight in bf16, DDP in float32; rounded to bf16 first, the gradient is the same with both
        return grad_x, grad_weight.to(weight.dtype)


def _product(
    a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """Return a @ b in `dtype`; a: [n, k] row-major, b: [k, m] column-major, both float8.

    Versions: _scaled_mm in torch 2.11 to 2.15, on CPU and CUDA.
    """
    return torch._scaled_mm(a, b, scale_a=a_inverse, scale_b=b_inverse, out_dtype=dtype, use_fast_accum=fast)


def _column_major(x: Tensor) -> Tensor:
    return x.t().contiguous().t()
