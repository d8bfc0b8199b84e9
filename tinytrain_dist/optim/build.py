"""Make the optimizer of a run: divide the parameters into groups, and choose the class for each.

Must not call collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tinytrain_dist.config.parameter_groups import NamedShape, ResolvedGroup, group_problems, resolve_groups
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.optim.adamw import AdamW
from tinytrain_dist.optim.base import Optimizer
from tinytrain_dist.optim.muon import Muon
from tinytrain_dist.optim.run_optimizer import RunOptimizer
from tinytrain_dist.optim.weight_average import WeightAverage
from tinytrain_dist.utils.parameter_names import original_name

ParamGroups = list[dict[str, Any]]


def build_optimizer(
    model: nn.Module, config: TrainingConfig, context: DistributedContext | None = None
) -> RunOptimizer:
    """Return the optimizer of a run for `model`, with its whole state as zeros. Frozen parameters are in no group.

    context: of the ranks that share the model (None: a model on the CPU of one process). Call this after DDP or FSDP
    has wrapped `model`: only then are its parameters those that get gradients.
    Errors: ConfigError if param_groups does not fit the parameters of this model.
    """
    params = trained_parameters(model)
    groups = group_parameters(list(params), config)
    parts: list[Optimizer] = []
    for name, make in MAKERS.items():
        own_groups = [
            {"params": [params[parameter] for parameter in group.parameters], "weight_decay": group.weight_decay}
            for group in groups
            if group.optimizer == name
        ]
        if own_groups:
            parts.append(make(own_groups, config, context))
    on_gpu = context is not None and context.device.type == "cuda"
    optimizer = RunOptimizer(parts, groups, clips_in_kernel=on_gpu)
    optimizer.materialize()
    optimizer.average = WeightAverage(optimizer, config)
    return optimizer


def _make_adamw(groups: ParamGroups, config: TrainingConfig, context: DistributedContext | None) -> Optimizer:
    return AdamW(groups, config.lr_max, config.betas, config.eps, config.weight_decay)


def _make_muon(groups: ParamGroups, config: TrainingConfig, context: DistributedContext | None) -> Optimizer:
    return Muon(
        groups,
        config.lr_max,
        config.muon_momentum,
        config.weight_decay,
        steps=config.muon_steps,
        scale=config.muon_scale,
        context=context,
    )


MAKERS: dict[str, Callable[[ParamGroups, TrainingConfig, DistributedContext | None], Optimizer]]
MAKERS = {"adamw": _make_adamw, "muon": _make_muon}  # in the order of OPTIMIZERS


def trained_parameters(model: nn.Module) -> dict[NamedShape, nn.Parameter]:
    """Return the parameters that are not frozen, by their original names and their shape; a tied weight once."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.requires_grad:
            names.setdefault(param, []).append(original_name(name))
    return {NamedShape(tuple(own), tuple(param.shape)): param for param, own in names.items()}


def group_parameters(parameters: list[NamedShape], config: TrainingConfig) -> list[ResolvedGroup]:
    """Divide parameters into groups. Errors: ConfigError if param_groups does not fit them."""
    problems = group_problems(parameters, config.param_groups)
    if problems:
        raise ConfigError(problems)
    return resolve_groups(parameters, config)
