"""Make the numbers of logged steps, and read what a run log wrote."""

import json
from pathlib import Path

from tinytrain_dist.config.schema import TrainingConfig

GROUPS = {"step_time": {"data": 0.25, "forward_backward": 1.5}, "grad_norm_by_layer": {"layers.0": 0.5, "norm": 2.0}}


WORK = [1.0, 1.5]  # seconds of two ranks


def config_in(folder: Path) -> TrainingConfig:
    return TrainingConfig(target_dir=str(folder), batch_size=4, micro_batch_size=2, context_len=8, total_steps=100)


def values(loss: float) -> dict[str, float]:
    return {
        "loss": loss, "lr": 1e-3, "grad_norm": 0.1 + 0.2, "tokens_per_second": 1234.5, "step_seconds": 2.0,
        "data_wait_seconds": 0.0, "memory_gib": 0.5, "skipped_steps": 0.0,
        "goodput": 0.75, "slowest_rank": 1.0, "slowest_to_median": 1.5,
    }  # fmt: skip


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
