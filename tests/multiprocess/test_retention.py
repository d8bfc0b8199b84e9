"""Checkpoints that an earlier setting, another run or the user kept stay, until `tinytrain prune` removes them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for, train
from tinytrain_dist.cli import main
from tinytrain_dist.training.evaluation import LossSum

pytestmark = pytest.mark.multiprocess


def best_at_step_2(trainer: Any) -> None:
    tokens = trainer.config.eval_steps * trainer.train_step.plan.tokens_per_step
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    trainer.evaluator.summed_loss = lambda _: LossSum(tokens * next(losses), 0, tokens)


def fit_best_at_step_2(settings: dict[str, Any]) -> None:
    fit(settings, best_at_step_2)


def test_best_by_eval_loss_is_kept(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", total_steps=6, ckpt_every=1, eval_every=1, keep_last=1)
    run_ranks(1, fit_best_at_step_2, settings)
    assert Run(tmp_path / "run").values("eval", "loss") == [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    kept = sorted(int(path.name[-8:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [2, 6]


def kept_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in folder.glob("checkpoint-????????"))


def test_a_resume_applies_other_settings_only_to_new_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """keep_every = 2 keeps steps 2, 4, 6; then keep_every = 4 keeps 8; then it is unset. Step 5 is a user's copy."""
    settings = {"ckpt_every": 1, "keep_last": 1, "val_data": None}
    folder = tmp_path / "run" / "checkpoints"
    train(tmp_path, "other", 1, total_steps=5, **settings)
    train(tmp_path, "run", 1, total_steps=6, keep_every=2, **settings)
    assert kept_steps(folder) == [2, 4, 6]
    shutil.copytree(tmp_path / "other" / "checkpoints" / "checkpoint-00000005", folder / "checkpoint-00000005")
    longer = (folder / "checkpoint-00000004").rename(tmp_path / "later")  # so that keep_every = 4 is new to step 4
    state = longer / "trainer_state.json"
    state.write_text(state.read_text().replace('"keep_every": 2', '"keep_every": null'))
    longer.rename(folder / "checkpoint-00000004")
    train(tmp_path, "run", 1, total_steps=9, keep_every=4, **settings)
    assert kept_steps(folder) == [2, 4, 5, 6, 8, 9]
    train(tmp_path, "run", 1, total_steps=11, **settings)
    assert kept_steps(folder) == [2, 4, 5, 6, 8, 11]

    for options in (["--dry-run"], [], []):
        before = kept_steps(folder)
        assert main.main(["prune", str(tmp_path / "run"), "--keep-every", "8", *options]) == 0
        out = capsys.readouterr().out
        num_removed = 4 if before == [2, 4, 5, 6, 8, 11] else 0
        assert f"{'would remove' if options else 'removed'} {num_removed} of {len(before)} checkpoints" in out
        assert "stays: keep_every 8" in out
        assert kept_steps(folder) == ([2, 4, 5, 6, 8, 11] if options else [8, 11])


def test_runs_with_other_prefixes_in_one_folder_are_left_alone(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    settings = {"ckpt_every": 3, "keep_last": 1, "val_data": None, "ckpt_dir": str(shared)}
    train(tmp_path, "long", 1, ckpt_save_prefix="checkpoint-a", **settings)
    for name in ("checkpoint-a-00000009.tmp", "checkpoint-00000009.tmp"):
        (shared / name).mkdir()
    train(tmp_path, "short", 1, ckpt_save_prefix="checkpoint", **settings)
    assert {path.name for path in shared.iterdir()} >= {"checkpoint-a-00000006", "checkpoint-a-00000009.tmp"}
    assert not (shared / "checkpoint-00000009.tmp").exists()


def test_records_of_another_run_in_the_same_log_dir_are_not_lost(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    settings = {"ckpt_every": 9, "eval_every": 9, "log_dir": str(logs)}
    for name in ("first", "second"):
        run_ranks(1, fit, settings_for(tmp_path, name, **settings))
    replaced = (logs / "metrics.replaced.jsonl").read_text().splitlines()
    assert sum('"kind": "train"' in line for line in replaced) == 6
