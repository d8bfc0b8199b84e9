"""Building a run: problems are found before anything is changed, and the start is logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for
from tinytrain_dist.config.schema import TrainingConfig


def build_error(settings: dict[str, Any], different_slots: bool = False) -> str:
    """On a rank: build a run and return its error."""
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.training import build

    if different_slots:
        real = build._check_ranks

        def check(train_step: Any, data: Any, step: int) -> None:
            train_step.slots = [0, 1, 2, 3]
            real(train_step, data, step)

        build._check_ranks = check
    try:
        build.build_trainer(TrainingConfig(**settings), init_distributed("cpu"))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.multiprocess
def test_more_writers_than_ranks_are_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", parallel="ddp", ckpt_writers=3)
    errors = run_ranks(2, build_error, settings)
    assert errors[0] == errors[1]
    assert "ckpt_writers: 3 is more than the 2 ranks of this run" in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.multiprocess
def test_ranks_that_draw_the_same_slots_do_not_start(tmp_path: Path) -> None:
    errors = run_ranks(2, build_error, settings_for(tmp_path, "run", parallel="ddp"), True)
    assert errors[0] == errors[1]
    assert "ranks draw slots [0, 0, 1, 1" in errors[0]


@pytest.mark.multiprocess
def test_a_resumed_run_logs_the_checkpoint_and_the_changed_settings(tmp_path: Path) -> None:
    run_ranks(1, fit, settings_for(tmp_path, "run", stop_at_step=3))
    run_ranks(1, fit, settings_for(tmp_path, "run", log_every=2))
    resumed = [record for record in Run(tmp_path / "run").records if record["kind"] == "resumed"]
    assert [record["step"] for record in resumed] == [3]
    assert "checkpoint-00000003" in resumed[0]["text"]
    assert "log_every: 1 -> 2" in resumed[0]["text"]
