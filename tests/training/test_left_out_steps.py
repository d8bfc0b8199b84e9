"""Check which step of a run is the first to be computed; what leaving out does is in test_skipped_steps.py."""

from types import SimpleNamespace
from typing import Any

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.training.left_out_steps import StepRunner


def test_the_first_computed_step_comes_after_those_that_are_left_out() -> None:
    train_step: Any = SimpleNamespace(config=TrainingConfig(skip_steps="5:6,1:2"))
    runner = StepRunner(train_step)
    assert [runner.first_computed(step) for step in range(1, 8)] == [3, 3, 3, 4, 7, 7, 7]
