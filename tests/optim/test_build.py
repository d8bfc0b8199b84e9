"""Which parameters of a model decay, and how several optimizers work as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.optim.adamw import AdamW
from tinytrain_dist.optim.base import Optimizer, StateTensor
from tinytrain_dist.optim.build import weight_decay_groups
from tinytrain_dist.optim.run_optimizer import GroupSettings, RunOptimizer
from tinytrain_dist.optim.step_settings import apply_step_settings


def test_decay_groups_put_matrices_apart_from_vectors():
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 5))
    groups = weight_decay_groups(model, 0.1)
    assert [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (0.1, [(5, 3), (5, 3)]),
        (0.0, [(3,), (3,), (5,)]),
    ]


def test_decay_groups_leave_out_frozen_and_count_tied_weights_once():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    groups = weight_decay_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [1]  # and no empty group


class Doubling(Optimizer):
    """Another optimizer: it adds twice the gradient, and counts its steps."""

    def state_tensors(self, param: Tensor) -> tuple[StateTensor, ...]:
        return (StateTensor("half", tuple(param.shape), torch.bfloat16), StateTensor("count", (2,), torch.int64))

    def step(self, closure: Any = None, *, skip: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data.add_(param.grad, alpha=2 * group["lr"])
                self.state[param]["count"] += 1


def test_a_further_optimizer_is_a_part_of_the_run_optimizer():
    first, second = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))
    parts = [AdamW([first], lr=0.0), Doubling([{"params": [second]}], {"lr": 0.0})]
    settings = [GroupSettings(0.5, 0.25), GroupSettings(2.0, 0.75)]
    optimizer = RunOptimizer(parts, settings, clips_in_kernel=False)
    optimizer.materialize()
    assert set(optimizer.state) == {first, second}
    for param in (first, second):
        made = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in optimizer.state[param].items()}
        assert made == {tensor.name: (tensor.shape, tensor.dtype) for tensor in optimizer.state_tensors(param)}
    config = TrainingConfig(lr_max=0.1, lr_min=0.1, warmup_iters=0, schedule="constant")
    assert apply_step_settings(optimizer, config, 5) == 0.1
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.05, 0.25), (0.2, 0.75)]

    called: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: called.append(1))
    first.grad, second.grad = torch.ones(3, 2), torch.tensor([3.0, 4.0])
    optimizer.clip_and_step(torch.tensor(10.0), 5.0, torch.zeros(()))
    torch.testing.assert_close(second.detach(), 1 + 0.4 * torch.tensor([1.5, 2.0]))
    assert first.detach().max() < 1
    assert first.grad is None
    assert second.grad is None
    assert optimizer.state[second]["count"].tolist() == [1, 1]
    assert called == [1]
