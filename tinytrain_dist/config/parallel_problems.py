"""Check the settings that divide a run over ranks: those without effect, and those that contradict each other.

Must not know how many ranks there are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tinytrain_dist.config.batch_sizes import divisors
from tinytrain_dist.utils.text import format_list

if TYPE_CHECKING:  # not at run time, because schema.py imports this module
    from tinytrain_dist.config.schema import TrainingConfig


def parallel_problems(config: TrainingConfig) -> list[str]:
    """Return problems of settings that have no effect in the chosen data-parallel mode."""
    problems = []
    if config.parallel != "hsdp":
        problems += [
            f"{name}: has no effect with parallel = {config.parallel}; leave it out, or set parallel = hsdp"
            for name in ("dp_replicate", "dp_shard")
            if getattr(config, name) is not None
        ]
    if config.parallel in ("none", "ddp") and config.reshard_after_forward is not None:
        problems.append(f"reshard_after_forward: has no effect with parallel = {config.parallel}; leave it out")
    has_replicas = config.parallel != "fsdp" and (config.parallel != "none" or config.cp > 1)
    if config.fingerprint_every is not None and not has_replicas:
        problems.append(f"fingerprint_every: parallel = {config.parallel} has no replicas to compare; leave it out")
    if config.activation_offload and config.activation_checkpointing != "block":
        problems.append(
            "activation_offload: needs activation_checkpointing = block, whose inputs it moves, but that is "
            f"{config.activation_checkpointing}; set it, or leave activation_offload out"
        )
    return problems + _cp_problems(config)


def _cp_problems(config: TrainingConfig) -> list[str]:
    """Return a problem if the columns or the heads of a sequence cannot be divided evenly among `cp` ranks."""
    possible = divisors(math.gcd(config.context_len, config.num_heads))
    return [
        f"cp: {config.cp} does not divide {name} {getattr(config, name)}; possible: cp {format_list(possible)}"
        for name in ("context_len", "num_heads")
        if getattr(config, name) % config.cp
    ]
