"""Set what each parameter group uses in one step: its learning rate and its weight decay.

Everything that changes from step to step is set here, as a pure function of the step. Must not know gradients or ranks.
"""

from __future__ import annotations

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.optim.lr_schedule import learning_rate, weight_decay_factor
from tinytrain_dist.optim.run_optimizer import RunOptimizer
from tinytrain_dist.optim.weight_average import ema_decay_of_step


def apply_step_settings(optimizer: RunOptimizer, config: TrainingConfig, step: int) -> float:
    """Set the values of the update after `step` completed steps in every group; return the schedule's learning rate."""
    lr = learning_rate(config, step)
    decay_factor = weight_decay_factor(config, step)
    for param_group, group in zip(optimizer.param_groups, optimizer.groups, strict=True):
        param_group["lr"] = lr * group.lr_factor
        param_group["weight_decay"] = group.weight_decay * decay_factor
    optimizer.average.decay = ema_decay_of_step(config, step)
    return lr
