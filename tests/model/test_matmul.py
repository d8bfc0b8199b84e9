"""Check in which type products are computed: bf16 where the CPU has it, else float32 with the same roundings."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.model import matmul
from tinytrain_dist.model.attention import causal_attention
from tinytrain_dist.model.loss import head_loss_sum
from tinytrain_dist.model.transformer import TransformerLM


@pytest.fixture(params=[False, True], ids=["with-bf16", "without-bf16"])
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(matmul, "CPU_LACKS_BF16", request.param)
    return bool(request.param)


def test_only_bf16_on_a_cpu_that_has_none_is_widened(without: bool) -> None:
    assert matmul.matmul_dtype(torch.zeros(1)) == torch.float32
    assert matmul.matmul_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64
    assert matmul.matmul_dtype(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
    wide = matmul.matmul_dtype(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32
    assert wide == without


def test_a_product_is_that_of_the_rounded_values_rounded_once(without: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64).bfloat16().requires_grad_(), torch.randn(7, 64, requires_grad=True)
    y = matmul.linear(x, weight)
    assert y.dtype == torch.bfloat16
    exact = x.detach().double() @ weight.detach().bfloat16().double().T
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-8)
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(weight.grad, x.detach().float().sum(0).expand(7, -1), rtol=2**-7, atol=2**-7)


def products_of(build: Callable[[], None]) -> set[torch.dtype]:
    """The types in which matrix products were computed."""
    seen = set[torch.dtype]()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = func.__name__
            if any(word in name for word in ("mm", "scaled_dot_product")) and "masked" not in name:
                seen.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Watch():
        build()
    return seen


def test_every_product_of_a_step_is_in_one_type(without: bool) -> None:
    config = TrainingConfig(
        vocab_size=50, num_layers=2, num_heads=2, d_model=16, d_ff=32, context_len=8, precision="bf16"
    )
    model, ids = TransformerLM(config), torch.randint(0, 50, (2, 8))
    seen = products_of(lambda: model(ids, ids).backward())
    assert seen == {torch.float32 if without else torch.bfloat16}
    assert all(param.grad is not None and param.grad.dtype == torch.float32 for param in model.parameters())


def test_both_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8).bfloat16() for _ in range(3))
    hidden, weight = torch.randn(6, 16).bfloat16().requires_grad_(), torch.randn(11, 16, requires_grad=True)
    targets, found = torch.tensor([0, 3, -100, 10, 5, 5]), []
    for flag in (False, True):
        monkeypatch.setattr(matmul, "CPU_LACKS_BF16", flag)
        loss = head_loss_sum(hidden, weight, targets)
        found.append((causal_attention(q, k, v), loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for native, widened in zip(*found, strict=True):
        assert native.dtype == widened.dtype
        torch.testing.assert_close(widened, native, rtol=0.03, atol=0.03)
    assert math.isfinite(float(found[0][1]))
