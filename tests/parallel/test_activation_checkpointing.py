"""Recomputation changes neither results nor parameter names, and recomputes the intended operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinytrain_dist.parallel.activation_checkpointing import apply_activation_checkpointing


class Count(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def run(how: str) -> tuple[Tensor, list[str], Count]:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    names = [name for name, _ in block.named_parameters()]
    apply_activation_checkpointing(block, how)
    assert [name for name, _ in block.named_parameters()] == names
    ids = torch.ones(2, 4, requires_grad=True)
    with Count() as count:
        block(ids).sum().backward()
    return block[0].weight.grad, names, count


@pytest.mark.parametrize(("how", "extra_tanh", "extra_mm"), [("none", 0, 0), ("selective", 1, 0), ("block", 1, 2)])
def test_what_is_recomputed(how: str, extra_tanh: int, extra_mm: int) -> None:
    expected, _, plain = run("none")
    grad, _, count = run(how)
    assert torch.equal(grad, expected)
    assert count.calls["tanh"] == plain.calls["tanh"] + extra_tanh
    assert plain.calls["mm"] <= count.calls["mm"] <= plain.calls["mm"] + extra_mm
    assert (count.calls["mm"] > plain.calls["mm"]) == bool(extra_mm)
