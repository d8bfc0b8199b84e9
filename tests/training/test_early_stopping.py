"""Check stopping by evaluation loss. The losses of each step are given by the test."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for
from tinytrain_dist.training.evaluation import LossSum

pytestmark = pytest.mark.multiprocess

LOSSES = [5.0, 4.0, 4.5, 4.2, 3.0, 3.5, 3.1, 2.0, 2.0, 2.0]  # after steps 1, 2, ...


def scripted(trainer: Any, losses: list[float], other: list[float] | None = None) -> None:
    """Make the evaluations of this trainer return `losses` by step (`other` on ranks above 0)."""
    mine = other if other is not None and trainer.context.rank else losses
    tokens = trainer.config.eval_steps * trainer.train_step.plan.tokens_per_step
    trainer.evaluator.summed_loss = lambda _: LossSum(mine[trainer.step - 1] * tokens, 0, tokens)


def run(folder: Path, world_size: int = 1, prepare: Any = None, **overrides: Any) -> list[dict[str, Any]]:
    """Make a run that evaluates after every step and, without early stopping, saves only at its end."""
    every = {"eval_every": 1, "ckpt_every": 100, "total_steps": 10, "early_stop_patience": 2, "micro_batch_size": 4}
    prepare = prepare or functools.partial(scripted, losses=LOSSES)
    return run_ranks(world_size, fit, settings_for(folder, "run", **{**every, **overrides}), prepare)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def test_the_run_ends_as_done_and_its_best_checkpoint_is_there(tmp_path: Path) -> None:
    (end,) = run(tmp_path)
    assert (end["state"], end["step"]) == ("done", 4)
    assert json.loads((tmp_path / "run" / "state.json").read_text()) == {"state": "done", "step": 4}
    (text,) = Run(tmp_path / "run").values("stopped", "text")
    assert "done (no better eval loss than 4.0000 in 2 evaluations, early_stop_patience; " in text
    assert "the best is checkpoint-00000002) at step 4 of 10" in text
    # the best step is no multiple of ckpt_every; keep_last is 2; steps 1 and 2 were each the best of their time
    assert "checkpoint-00000002" in checkpoints(tmp_path)
    report = json.loads((Run(tmp_path / "run").checkpoint / "trainer_state.json").read_text())["report"]
    assert (report["best_eval_loss"], report["best_eval_step"], report["evals_since_best"]) == (4.0, 2, 2)
    (end,) = run(tmp_path)
    assert (end["state"], end["step"]) == ("done", 4), "started again it is still done"
    (end,) = run(tmp_path, early_stop_patience=3)
    assert (end["state"], end["step"]) == ("done", 10), "with more patience it goes on"
    assert "checkpoint-00000008" in checkpoints(tmp_path)


def test_the_best_outlives_later_checkpoints(tmp_path: Path) -> None:
    losses = [5.0, 1.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    prepare = functools.partial(scripted, losses=losses)
    (end,) = run(tmp_path, prepare=prepare, early_stop_patience=6, ckpt_every=1, keep_last=1)
    assert end["step"] == 8
    assert checkpoints(tmp_path) == ["checkpoint-00000002", "checkpoint-00000008"]


def test_the_count_survives_a_resume(tmp_path: Path) -> None:
    (end,) = run(tmp_path, stop_at_step=3)
    assert (end["state"], end["step"]) == ("done", 3)
    (end,) = run(tmp_path)
    assert (end["state"], end["step"]) == ("done", 4)


def test_the_best_loss_on_other_data_does_not_count(tmp_path: Path) -> None:
    (end,) = run(tmp_path, stop_at_step=3)  # the best is 4.0
    assert end["state"] == "done"
    np.save(tmp_path / "other.npy", np.load(tmp_path / "val.npy")[::-1])
    harder = functools.partial(scripted, losses=[0.0, 0.0, 0.0, 9.7, 9.6, 9.5, 9.4, 9.3, 9.2, 9.1])
    (end,) = run(tmp_path, prepare=harder, val_data=str(tmp_path / "other.npy"))
    assert (end["state"], end["step"]) == ("done", 10), "each loss is lower than the one before, on the new data"
    (text,) = Run(tmp_path / "run").values("resumed", "text")
    assert text.endswith(
        "; the lowest eval loss so far (4.0000 at step 2) no longer counts, because it was measured with another "
        "val_data"
    )
    report = json.loads((Run(tmp_path / "run").checkpoint / "trainer_state.json").read_text())["report"]
    assert (report["best_eval_loss"], report["best_eval_step"]) == (9.1, 10)


def test_an_evaluation_out_of_turn_does_not_count(tmp_path: Path) -> None:
    prepare = functools.partial(scripted, losses=[5.0, 4.0, 4.5, 4.6, 4.7, 4.8, 4.9, 4.9, 4.9, 4.9])
    every = {"eval_every": 2, "prepare": prepare}
    (end,) = run(tmp_path, **every, stop_at_step=3)  # evaluates at 2 and, since the process ends there, at 3
    (end,) = run(tmp_path, **every, stop_at_step=5)
    (end,) = run(tmp_path, **every)
    assert end["step"] == 6


def test_not_a_number_is_no_better(tmp_path: Path) -> None:
    prepare = functools.partial(scripted, losses=[5.0, float("nan"), float("nan"), 1.0])
    (end,) = run(tmp_path, prepare=prepare)
    assert (end["state"], end["step"]) == ("done", 3)


def test_ranks_that_differ_in_the_last_bit_still_stop_together(tmp_path: Path) -> None:
    other = [5.0, 4.0, 4.0 - 1e-12, 4.1, 4.1, 3.0, 2.0, 2.0, 2.0, 2.0]
    prepare = functools.partial(scripted, losses=[5.0, 4.0, 4.0, 4.1, 4.1, 3.0, 2.0, 2.0, 2.0, 2.0], other=other)
    ends = run(tmp_path, 2, prepare, parallel="ddp")
    assert [(end["state"], end["step"]) for end in ends] == [("done", 5)] * 2


def test_without_patience_nothing_stops_and_no_best_is_saved_by_itself(tmp_path: Path) -> None:
    (end,) = run(tmp_path, early_stop_patience=None)
    assert (end["state"], end["step"]) == ("done", 10)
    assert checkpoints(tmp_path) == ["checkpoint-00000010"]


def stopped_in_evaluation(trainer: Any) -> None:
    scripted(trainer, LOSSES)
    plain = trainer.evaluator.summed_loss

    def stop(files: Any) -> Any:
        trainer.metrics.stopping = trainer.metrics.stopping or trainer.step == 3
        return None if trainer.metrics.stopping else plain(files)

    trainer.evaluator.summed_loss = stop


def test_an_evaluation_that_a_stop_cut_short_is_made_up_for(tmp_path: Path) -> None:
    (end,) = run(tmp_path, prepare=stopped_in_evaluation)
    assert (end["state"], end["step"]) == ("preempted", 3)
    (end,) = run(tmp_path)
    assert (end["state"], end["step"]) == ("done", 4), "as without the stop"
    assert len(Run(tmp_path / "run").values("eval", "loss")) == 4
