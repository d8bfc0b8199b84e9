"""The decay of the moving average of the weights, where it is kept, and what its settings refuse."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.configs import only_problem
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.optim.adamw import AdamW
from tinytrain_dist.optim.weight_average import WeightAverage, ema_decay_of_step


def test_the_decay_rises_to_that_of_the_setting() -> None:
    config = TrainingConfig(ema_decay=0.5)
    assert [ema_decay_of_step(config, step) for step in (0, 1, 7, 8, 1000)] == [2 / 11, 3 / 12, 9 / 18, 0.5, 0.5]


def test_the_average_changes_in_every_nth_step_by_the_decay_of_n_steps() -> None:
    config = TrainingConfig(ema_decay=0.9, ema_every=3)
    decays = [ema_decay_of_step(config, step) for step in range(9)]
    assert decays == [1, 1, 2 / 11, 1, 1, 3 / 12, 1, 1, 4 / 13]
    assert ema_decay_of_step(config, 299) == 0.9**3


def test_weights_and_averages_are_exchanged_and_come_back() -> None:
    param = torch.nn.Parameter(torch.zeros(5))
    optimizer = AdamW([param], lr=1.0, weight_decay=0.0)
    optimizer.materialize()
    average = WeightAverage(optimizer, TrainingConfig(ema_decay=0.5))
    average.decay = 2 / 11
    param.grad = torch.ones(5)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["ema"], torch.full((5,), -9 / 11))
    with average.in_place_of_weights():
        torch.testing.assert_close(param.detach(), torch.full((5,), -9 / 11))
    torch.testing.assert_close(param.detach(), torch.full((5,), -1.0))
    average.restart()
    assert torch.equal(optimizer.state[param]["ema"], param)


def test_without_the_setting_there_is_no_average() -> None:
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(5))])
    assert not WeightAverage(optimizer, TrainingConfig())
    assert not optimizer.state


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_of_nothing_or_everything_is_refused(decay: float) -> None:
    assert only_problem(ema_decay=decay).startswith(f"ema_decay: {decay} must be greater than 0 and less than 1")


@pytest.mark.parametrize("settings", [{"ema_every": 5}, {"ema_on_host": True}])
def test_settings_of_an_average_that_is_not_kept_are_refused(settings: dict[str, object]) -> None:
    assert "has no effect without ema_decay" in only_problem(**settings)
