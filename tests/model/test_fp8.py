"""Matrix products in float8: their errors, their gradients, and models that use them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.model.fp8 import BACKWARD_TYPE, FORWARD_TYPE, fp8_linear, quantize
from tinytrain_dist.model.layers import Linear
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.parallel.activation_checkpointing import apply_activation_checkpointing

SIZES = ModelConfig(vocab_size=50, num_layers=2, d_model=64, num_heads=4, num_kv_heads=2, d_ff=96, context_len=24)


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [FORWARD_TYPE, BACKWARD_TYPE])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_values_of_any_size_keep_the_precision_of_the_format(dtype: torch.dtype, size: float):
    torch.manual_seed(0)
    x = torch.randn(64, 64) * size
    rounded, inverse = quantize(x, dtype)
    error = relative_error(rounded.float() * inverse, x)
    # half of the distance of neighbours: 2^-4 with three bits of mantissa, 2^-3 with two; 1e-20 is below TINY
    assert error < (0.04 if dtype == FORWARD_TYPE else 0.08) or size == 1e-20
    assert rounded.float().isfinite().all()


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen():
    rounded, inverse = quantize(torch.zeros(4, 4), FORWARD_TYPE)
    assert not (rounded.float() * inverse).any()
    for bad in (float("nan"), float("inf")):
        rounded, inverse = quantize(torch.tensor([[1.0, bad]]), FORWARD_TYPE)
        assert not (rounded.float() * inverse).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 16, 32), (5, 7, 32)])  # 35 tokens are padded to 48
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_close_to_exact_ones(shape: tuple[int, ...], weight_dtype: torch.dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).bfloat16().requires_grad_()
    weight = (torch.randn(48, 32) / 6).to(weight_dtype).requires_grad_()
    grad = torch.randn(*shape[:2], 48).bfloat16()
    y = fp8_linear(x, weight)
    y.backward(grad)
    wide_x, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = wide_x @ wide_weight.T
    expected.backward(grad.double())
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    assert weight.grad is not None
    assert weight.grad.dtype == weight_dtype
    assert x.grad is not None
    assert relative_error(y, expected) < 0.05
    assert relative_error(x.grad, wide_x.grad) < 0.08
    assert relative_error(weight.grad, wide_weight.grad) < 0.08


def test_a_rounded_weight_gives_the_same_bits_as_the_float32_weight():
    torch.manual_seed(0)
    x, grad = torch.randn(16, 32).bfloat16(), torch.randn(16, 48).bfloat16()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.linspace(-1, 1, 48 * 32).view(48, 32).to(dtype).requires_grad_()
        y = fp8_linear(x, weight)
        y.backward(grad)
        assert weight.grad is not None
        results.append((y, weight.grad.float()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_the_linear_layers_of_blocks_use_it_and_the_head_does_not():
    model = TransformerLM(SIZES, precision="fp8")
    used = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, Linear) and module.fp8}
    assert used == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("how", ["none", "selective", "block"])
def test_a_model_has_nearly_the_loss_and_the_gradients_of_bf16(how: str):
    torch.manual_seed(0)
    ids, targets = torch.randint(0, 50, (2, 2, 24))
    losses, grads = [], []
    for precision in ("bf16", "fp8"):
        model = TransformerLM(SIZES, precision=precision)
        for block in model.model.layers:
            apply_activation_checkpointing(block, how)
        loss = model(ids, targets)
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([param.grad.flatten() for param in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[1] != losses[0]
    assert relative_error(grads[1], grads[0]) < 0.1


def test_sizes_that_the_hardware_cannot_multiply_are_refused():
    with pytest.raises(
        ConfigError, match=r"d_ff: precision = fp8 needs .* multiples of 16, .* one of 100; possible: d_ff"
    ):
        TransformerLM(replace(SIZES, d_ff=100), precision="fp8")
