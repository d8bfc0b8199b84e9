"""How the parameters of a model are divided into groups, and how several optimizers work as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.training import TINY
from tinytrain_dist.config.parameter_groups import NamedShape, ResolvedGroup
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.optim.adamw import AdamW
from tinytrain_dist.optim.base import Optimizer, StateTensor
from tinytrain_dist.optim.build import build_optimizer
from tinytrain_dist.optim.run_optimizer import RunOptimizer
from tinytrain_dist.optim.step_settings import apply_step_settings


def divided(model: nn.Module, **settings: Any) -> list[tuple[float, list[tuple[int, ...]]]]:
    groups = build_optimizer(model, TrainingConfig(weight_decay=0.1, **settings)).param_groups
    return [(group["weight_decay"], [tuple(param.shape) for param in group["params"]]) for group in groups]


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 5))
    assert divided(model) == [(0.1, [(5, 3), (5, 3)]), (0.0, [(3,), (3,), (5,)])]


def test_frozen_parameters_are_left_out_and_tied_weights_count_once():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    assert divided(model) == [(0.1, [(5, 3)])]  # and no empty group


def test_patterns_apply_to_the_names_of_any_model():
    """The configuration can only check the names of its own model; those of another are checked when it is built."""
    config = TrainingConfig(**TINY, param_groups=("lm_head.*: lr_factor=2",))
    with pytest.raises(ConfigError, match=r"'lm_head\.\*' matches no parameter of the model"):
        build_optimizer(nn.Linear(3, 5), config)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_uses_the_values_of_each_group(tied: bool):
    config = TrainingConfig(
        **TINY,
        vocab_size=53,
        tie_embeddings=tied,
        weight_decay=0.1,
        param_groups=("lm_head.*: lr_factor=8 weight_decay=0.5", "*.q_proj.*, *norm*: lr_factor=0.5"),
    )
    model = TransformerLM(config)
    optimizer = build_optimizer(model, config)
    lr = apply_step_settings(optimizer, config, 3)
    used = {
        id(param): (group["lr"] / lr, group["weight_decay"])
        for group in optimizer.param_groups
        for param in group["params"]
    }
    for name, param in model.named_parameters():
        expected = (1.0, 0.1)
        if name == ("model.embed_tokens.weight" if tied else "lm_head.weight"):
            expected = (8.0, 0.5)
        elif "norm" in name:
            expected = (0.5, 0.0)
        elif "q_proj" in name:
            expected = (0.5, 0.1)
        assert used.pop(id(param)) == expected, name
    assert not used


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
    groups = [
        ResolvedGroup("first", "adamw", 0.5, 0.25, (NamedShape(("a",), (3, 2)),)),
        ResolvedGroup("second", "doubling", 2.0, 0.75, (NamedShape(("b",), (2,)),)),
    ]
    optimizer = RunOptimizer(parts, groups, clips_in_kernel=False)
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
