"""The best checkpoint of a run is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for

pytestmark = pytest.mark.multiprocess


def best_at_step_2(trainer: Any) -> None:
    tokens = trainer.config.eval_steps * trainer.train_step.plan.tokens_per_step
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    trainer.evaluator.summed_loss = lambda _: (tokens * next(losses), 0)


def fit_best_at_step_2(settings: dict[str, Any]) -> None:
    fit(settings, best_at_step_2)


def test_best_by_eval_loss_is_kept(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", total_steps=6, ckpt_every=1, eval_every=1, keep_last=1)
    run_ranks(1, fit_best_at_step_2, settings)
    assert Run(tmp_path / "run").values("eval", "loss") == [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    kept = sorted(int(path.name[-8:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [2, 6]
