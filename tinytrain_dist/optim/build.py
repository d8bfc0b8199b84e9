"""Make the optimizer of a run: decide which parameters decay, and choose the class.

Must not call collectives.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.optim.adamw import AdamW
from tinytrain_dist.optim.run_optimizer import GroupSettings, RunOptimizer


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices (two or more axes) decay, vectors such as norm weights do not.

    Frozen parameters are in neither group. An empty group is left out.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, config: TrainingConfig, context: DistributedContext | None = None
) -> RunOptimizer:
    """Return the optimizer of a run for `model`, with its whole state as zeros.

    context: of the ranks that share the model (None: a model on the CPU of one process). Call this after DDP or FSDP
    has wrapped `model`: only then are its parameters those that get gradients.
    """
    groups = weight_decay_groups(model, config.weight_decay)
    adamw = AdamW(groups, config.lr_max, config.betas, config.eps, config.weight_decay)
    on_gpu = context is not None and context.device.type == "cuda"
    settings = [GroupSettings(weight_decay=group["weight_decay"]) for group in groups]
    optimizer = RunOptimizer([adamw], settings, clips_in_kernel=on_gpu)
    optimizer.materialize()
    return optimizer
