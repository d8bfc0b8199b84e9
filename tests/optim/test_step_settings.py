"""The weight decay of each step: a factor on that of every group, and the same bits as before without a schedule."""

from __future__ import annotations

import pytest
import torch

from tinytrain_dist.config.parameter_groups import ResolvedGroup
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.optim.adamw import AdamW
from tinytrain_dist.optim.lr_schedule import learning_rate, weight_decay_factor
from tinytrain_dist.optim.run_optimizer import RunOptimizer
from tinytrain_dist.optim.step_settings import apply_step_settings

SCHEDULE = {"schedule": "wsd", "lr_max": 0.5, "lr_min": 0.1, "warmup_iters": 10, "decay_iters": 20, "total_steps": 100}
DECAYS = [0.1, 0.3]  # of two groups


def two_groups(params: list[torch.nn.Parameter]) -> RunOptimizer:
    adamw = AdamW([{"params": [param]} for param in params])
    groups = [ResolvedGroup(f"{decay}", "adamw", 1.0, decay, ()) for decay in DECAYS]
    return RunOptimizer([adamw], groups, clips_in_kernel=False)


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.1), (9, 1.0), (49, 1.0), (79, 1.0), (89, 0.6), (99, 0.2), (500, 0.2)]
)
def test_the_decay_follows_the_rate(step: int, factor: float) -> None:
    config = TrainingConfig(**SCHEDULE, weight_decay_schedule="lr")
    assert weight_decay_factor(config, step) == pytest.approx(factor, rel=1e-12)
    assert weight_decay_factor(TrainingConfig(**SCHEDULE), step) == 1.0


def test_every_group_is_scaled_and_weights_shrink_by_the_product() -> None:
    """Without gradients an update is the decay alone: theta <- (1 - lr * weight_decay * factor) * theta."""
    config = TrainingConfig(**SCHEDULE, weight_decay_schedule="lr")
    params = [torch.nn.Parameter(torch.full((16,), 2.0)) for _ in DECAYS]
    optimizer = two_groups(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    step = 89
    lr = apply_step_settings(optimizer, config, step)
    optimizer.step(skip=torch.zeros(()))
    assert lr == learning_rate(config, step)
    for param, decay in zip(params, DECAYS, strict=True):
        assert param.tolist() == pytest.approx([2.0 * (1 - lr * decay * 0.6)] * 16, rel=1e-6)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.06, 0.18])


def test_without_a_schedule_the_values_are_exactly_those_of_the_groups() -> None:
    optimizer = two_groups([torch.nn.Parameter(torch.zeros(2)) for _ in DECAYS])
    for step in (0, 50, 95):
        apply_step_settings(optimizer, TrainingConfig(**SCHEDULE), step)
        assert [group["weight_decay"] for group in optimizer.param_groups] == DECAYS
