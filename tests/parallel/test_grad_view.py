"""Check what a gradient reduction reads from a model: layers, local gradients, norms and losses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.parallel.grad_view import GradientView, layer_of

CONTEXT = DistributedContext(0, 0, 1, 1, "node", torch.device("cpu"))


@pytest.fixture
def model() -> Iterator[nn.Module]:
    model = nn.Module()
    model.embed = nn.Embedding(3, 2)
    model.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    return model


def test_layers_are_named_once_and_frozen_parameters_left_out(model: nn.Module) -> None:
    view = GradientView(model, BatchPlan(4, 2, 8, 1, 1), CONTEXT)
    assert view.layers == ["embed", "layers.0", "layers.1"]
    assert len(view.params) == 5
    assert view.units == []
    assert layer_of("module.model.layers.12.mlp.gate_proj.weight") == "layers.12"


def test_norms_are_those_of_each_layer(model: nn.Module) -> None:
    view = GradientView(model, BatchPlan(4, 2, 8, 1, 1), CONTEXT)
    for number, param in enumerate(view.params):
        param.grad = torch.full_like(param, number + 1.0)
    grads = [(6 * 1.0) ** 0.5, (4 * 2.0**2 + 2 * 3.0**2) ** 0.5, (4 * 4.0**2 + 2 * 5.0**2) ** 0.5]
    weights = [
        torch.cat([param.flatten() for param in view.params[a:b]]).detach().norm() for a, b in ((0, 1), (1, 3), (3, 5))
    ]
    assert view.layer_norms().tolist() == pytest.approx([*grads, *map(float, weights)], rel=1e-6)


def test_losses_go_to_their_micro_batches(model: nn.Module) -> None:
    view = GradientView(model, BatchPlan(4, 2, 8, 1, 1), CONTEXT)
    losses = view.losses([2, 0], [torch.tensor(0.5), torch.tensor(1.5)], 4)
    assert losses.dtype == torch.float64
    assert losses.tolist() == [1.5, 0.0, 0.5, 0.0]
