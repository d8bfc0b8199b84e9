"""The branches of the model's code that a GPU takes, taken on a CPU."""

from __future__ import annotations

import pytest
import torch

from tinytrain_dist.model import loss
from tinytrain_dist.model.attention import causal_attention
from tinytrain_dist.model.loss import chunk_loss_and_grad, head_loss_sum
from tinytrain_dist.model.matmul import add_product, runs_on_cuda, simulate_device


def test_the_device_is_simulated_only_inside_the_context():
    x = torch.empty(1)
    with simulate_device("cuda"):
        assert runs_on_cuda(x)
        with simulate_device("cpu"):
            assert not runs_on_cuda(x)
        assert runs_on_cuda(x)
    assert not runs_on_cuda(x)


def test_products_are_added_in_float32_without_rounding_to_bf16():
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, 64).bfloat16(), torch.randn(2, 64, 16).bfloat16()
    exact = a[0].double() @ b[0].double() + a[1].double() @ b[1].double()

    def error() -> float:
        total = add_product(None, a[0], b[0], torch.float32)
        total = add_product(total, a[1], b[1], torch.float32)
        assert total.dtype == torch.float32
        return float((total - exact).abs().max())

    on_cpu = error()
    with simulate_device("cuda"):
        assert error() < 1e-5 < on_cpu


def test_chunks_are_larger_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "MAX_CHUNK_LOGITS", 30)
    monkeypatch.setattr(loss, "MAX_CHUNK_LOGITS_ON_CUDA", 60)
    sizes: list[int] = []

    def chunk_loss(logits, targets):
        sizes.append(len(logits))
        return chunk_loss_and_grad(logits, targets)

    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(12, 4).bfloat16(), torch.randn(10, 4), torch.randint(0, 10, (12,))
    on_cpu = head_loss_sum(hidden, weight, targets, None, chunk_loss)
    sizes.clear()
    with simulate_device("cuda"):
        on_gpu = head_loss_sum(hidden, weight, targets, None, chunk_loss)
    # a CPU without bf16 instructions computes the logits in float32
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-2, atol=0.0)
    assert sizes == [6, 6]


def test_a_gpu_gets_keys_and_values_without_repetition(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 8, 16).bfloat16().requires_grad_() for heads in (4, 2, 2))
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watch(q, k, v, **options):
        seen.append((k.shape[1], options.get("enable_gqa", False)))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    on_cpu = causal_attention(q, k, v)
    grads = torch.autograd.grad(on_cpu.sum(), (q, k, v))
    with simulate_device("cuda"):
        found = causal_attention(q, k, v)
        torch.testing.assert_close(found, on_cpu, rtol=2e-2, atol=2e-2)
        found_grads = torch.autograd.grad(found.sum(), (q, k, v))
        torch.testing.assert_close(found_grads, grads, rtol=2e-2, atol=5e-2)
        causal_attention(q.float(), k.float(), v.float())
    assert seen == [(4, False), (2, True), (4, False)]  # float32 kernels of a GPU have no grouped queries
