"""Compute learning rate and weight decay as pure functions of the step, so that there is nothing to save or restore.

Must not know optimizers, torch or ranks.
"""

from __future__ import annotations

import math

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.sections import DecayShape


def cosine_lr_schedule(t: int, lr_max: float, lr_min: float, warmup_iters: int, cosine_iters: int) -> float:
    """Return the learning rate of step t: warm-up to `lr_max`, then a cosine to `lr_min`.

    The warm-up is linear, from 0 at step 0 to `lr_max` at step `warmup_iters`. The cosine ends at step `cosine_iters`;
    after that the rate is `lr_min`. Errors: ValueError if a step is negative or if cosine_iters < warmup_iters, because
    the rate would then jump. Source: Loshchilov & Hutter 2016 (arXiv 1608.03983).
    """
    if min(t, warmup_iters) < 0 or cosine_iters < warmup_iters:
        raise ValueError(
            f"cosine_lr_schedule: needs 0 <= t, 0 <= warmup_iters <= cosine_iters, "
            f"got t={t}, warmup_iters={warmup_iters}, cosine_iters={cosine_iters}"
        )
    if t < warmup_iters:
        return lr_max * t / warmup_iters
    if t > cosine_iters:
        return lr_min
    progress = (t - warmup_iters) / max(1, cosine_iters - warmup_iters)
    return lr_min + 0.5 * (1 + math.cos(math.pi * progress)) * (lr_max - lr_min)


def linear_lr_schedule(t: int, lr_max: float, lr_min: float, warmup_iters: int, end: int) -> float:
    """Return the learning rate of step t: warm-up to `lr_max`, then a straight line to `lr_min` at step `end`.

    After that the rate is `lr_min`. Errors: ValueError if a step is negative or if end < warmup_iters.
    Source: Bergsma et al. 2025 (arXiv 2502.15938), who recommend it with lr_min = 0.
    """
    if min(t, warmup_iters) < 0 or end < warmup_iters:
        raise ValueError(
            f"linear_lr_schedule: needs 0 <= t, 0 <= warmup_iters <= end, "
            f"got t={t}, warmup_iters={warmup_iters}, end={end}"
        )
    if t < warmup_iters:
        return lr_max * t / warmup_iters
    if t > end:
        return lr_min
    progress = (t - warmup_iters) / max(1, end - warmup_iters)
    return lr_max + progress * (lr_min - lr_max)


def wsd_lr_schedule(
    t: int,
    lr_max: float,
    lr_min: float,
    warmup_iters: int,
    decay_iters: int,
    end: int,
    *,
    shape: DecayShape = "linear",
) -> float:
    """Return the learning rate of step t: warm-up to `lr_max`, then constant, then a decay to `lr_min`.

    The decay takes the last `decay_iters` steps before step `end`. After that the rate is `lr_min`. shape: with
    progress p from 0 to 1, the rate falls as 1 - p (linear) or as 1 - sqrt(p) (sqrt).
    Errors: ValueError if warm-up and decay overlap. Sources: Hu et al. 2024, MiniCPM (arXiv 2404.06395); sqrt: Haegele
    et al. 2024 (arXiv 2405.18392).
    """
    if min(t, warmup_iters) < 0 or decay_iters < 1 or warmup_iters + decay_iters > end:
        raise ValueError(
            f"wsd_lr_schedule: needs 0 <= t, 1 <= decay_iters, warmup_iters + decay_iters <= end, "
            f"got t={t}, warmup_iters={warmup_iters}, decay_iters={decay_iters}, end={end}"
        )
    if t < warmup_iters:
        return lr_max * t / warmup_iters
    progress = min(1.0, max(0.0, (t - (end - decay_iters)) / decay_iters))
    if shape == "sqrt":
        progress = math.sqrt(progress)
    return lr_max + progress * (lr_min - lr_max)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of the update after `step` completed steps; for the first update it is not 0.

    For the last update it is lr_min, with every schedule but `constant`.
    """
    t = step + 1
    warmup = config.warmup_steps
    if config.schedule == "wsd":
        ends = (warmup, config.decay_steps, config.total_steps)
        return wsd_lr_schedule(t, config.lr_max, config.lr_min, *ends, shape=config.decay_shape)
    if config.schedule == "linear":
        return linear_lr_schedule(t, config.lr_max, config.lr_min, warmup, config.total_steps)
    if config.schedule == "constant":
        return config.lr_max * min(1.0, t / max(1, warmup))
    return cosine_lr_schedule(t, config.lr_max, config.lr_min, warmup, config.cosine_end)


def weight_decay_factor(config: TrainingConfig, step: int) -> float:
    """Return by what every weight decay is multiplied in the update after `step` completed steps.

    With `weight_decay_schedule = "lr"` it is the learning rate relative to lr_max. AdamW multiplies the weight decay by
    the learning rate as well, so the weights then shrink in proportion to its square. Without this, the norms of
    weights and gradients drift while the rate falls. Sources: Defazio 2025 (arXiv 2506.02285); Chou 2025 (arXiv
    2512.08217).
    """
    return 1.0 if config.weight_decay_schedule == "constant" else learning_rate(config, step) / config.lr_max
