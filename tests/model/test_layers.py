"""Check single layers against their formula, and their types."""

import pytest
import torch
from torch import nn

from tinytrain_dist.model.layers import Linear, RMSNorm, SwiGLU


def test_swiglu_by_hand():
    layer = SwiGLU(3, 5)
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    gate, up, down = (m.weight for m in (layer.gate_proj, layer.up_proj, layer.down_proj))
    expected = ((x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(layer(x), expected)


def test_rms_norm_by_hand():
    norm = RMSNorm(4, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    expected = x / (30 / 4 + 0.5) ** 0.5 * torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_takes_its_mean_in_float32():
    x = torch.full((1, 4096), 0.1).bfloat16()
    x[0, 0] = 30.0
    exact = x.double() / (x.double().square().mean() + 1e-5).sqrt()
    assert torch.equal(RMSNorm(4096)(x), exact.bfloat16())


@pytest.mark.parametrize("make", [lambda: RMSNorm(33), lambda: Linear(33, 17), lambda: SwiGLU(33, 20)])
def test_layers_give_the_same_bits_when_a_wrapper_has_cast_the_weights(make):
    layer = make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    x = torch.randn(5, 33, generator=generator).bfloat16()
    wide = layer(x)
    assert wide.dtype == torch.bfloat16
    assert torch.equal(layer.bfloat16()(x), wide)


def test_a_model_of_other_modules_can_use_the_parts():
    layer = nn.Sequential(RMSNorm(6), Linear(6, 4))
    assert layer(torch.ones(2, 6)).shape == (2, 4)
