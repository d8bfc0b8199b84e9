"""The evaluation loss is the mean over all windows on any number of ranks; early stopping follows the best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.ranks import run_ranks
from tests.helpers.training import settings_for
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.window_sampling import EVAL_STREAM
from tinytrain_dist.training.evaluation import EarlyStopping


class OneRank:
    """A stand-in for the context of a single rank."""

    def any_rank(self, flag: bool) -> bool:
        return flag


def stopping_after(losses: list[float], patience: int | None) -> EarlyStopping:
    early_stopping = EarlyStopping(patience, {})
    for step, loss in enumerate(losses, 1):
        early_stopping.update(step, loss, OneRank())  # type: ignore[arg-type]
    return early_stopping


def test_patience_counts_evaluations_since_the_best() -> None:
    assert not stopping_after([5.0, 4.0, 4.1], patience=2).out_of_patience
    stopped = stopping_after([5.0, 4.0, 4.1, 4.0], patience=2)
    assert stopped.out_of_patience
    assert stopped.is_best(2)
    assert stopped.record == {"best_eval_loss": 4.0, "best_eval_step": 2, "evals_since_best": 2}
    assert stopped.summary() == "no better eval loss than 4.0000 in 2 evaluations"


def test_without_patience_no_step_is_the_best_and_nothing_stops() -> None:
    early_stopping = stopping_after([5.0, 6.0, 7.0], patience=None)
    assert not early_stopping.out_of_patience
    assert not early_stopping.is_best(1)


def test_a_loss_that_is_not_a_number_is_no_better() -> None:
    assert stopping_after([5.0, math.nan], patience=1).out_of_patience


def evaluated(settings: dict[str, Any], stop: bool = False) -> tuple[Any, float]:
    """On a rank: return the trainer's evaluation, and the mean loss over all windows computed in this test."""
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.training.trainer import Trainer

    config = TrainingConfig(**settings)
    trainer = Trainer.build(config, init_distributed("cpu"))
    if stop:
        trainer.evaluator.wants_stop = lambda: trainer.context.rank == trainer.context.world_size - 1
    evaluation = trainer.evaluator.run(0)
    dataset = next(iter(trainer.data.evaluation.values()))
    slots = range(config.eval_steps * config.batch_size)
    rows = dataset.read(*dataset.draw(0, 0, slots, EVAL_STREAM)).tokens.long()
    with torch.no_grad():
        logits = trainer.train_step.model(rows[:, :-1])
        expected = F.cross_entropy(logits.flatten(0, 1).double(), rows[:, 1:].flatten()).item()
    return (None if evaluation is None else (evaluation.loss, evaluation.others)), expected


@pytest.mark.multiprocess
def test_the_loss_is_the_mean_over_the_windows_of_all_ranks(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", parallel="ddp", eval_steps=3)
    (alone, expected), *_ = run_ranks(1, evaluated, {**settings, "target_dir": str(tmp_path / "one")})
    assert alone[0] == pytest.approx(expected, rel=1e-6)
    results = run_ranks(2, evaluated, settings)
    assert results[0][0] == results[1][0], "all ranks know the same number"
    assert results[0][0][0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.multiprocess
def test_several_files_count_the_same_and_bytes_are_summed(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", parallel="none")
    np.save(tmp_path / "token_bytes.npy", np.full(53, 2))
    np.save(tmp_path / "other.npy", np.load(tmp_path / "val.npy")[::-1].copy())
    settings["val_data"] = [settings["val_data"], str(tmp_path / "other.npy")]
    ((loss, others), _), *_ = run_ranks(1, evaluated, settings)
    assert loss == pytest.approx((others["loss/val.npy"] + others["loss/other.npy"]) / 2)
    assert others["bits_per_byte"] == pytest.approx(loss / math.log(2) / 2)  # two bytes a token


@pytest.mark.multiprocess
def test_a_wish_to_stop_of_one_rank_ends_the_evaluation_on_all(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", parallel="ddp", eval_steps=2)
    assert [result[0] for result in run_ranks(2, evaluated, settings, True)] == [None, None]
