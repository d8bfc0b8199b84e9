"""Saves in the background: the same bits as in the foreground, and no unnecessary copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoint_runs import RUN
from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for, train

pytestmark = pytest.mark.multiprocess


def test_background_and_foreground_saves_are_the_same(folder: Path, undisturbed: Run) -> None:
    assert train(folder, "foreground", 2, **RUN, ckpt_async=False).digests() == undisturbed.digests()


def copies(trainer: Any) -> None:
    """Record at which steps the state is copied for a save."""
    buffers, note = trainer.checkpoints.buffers, (trainer.checkpoints.folder(0).parent.parent / "copies.txt").open("a")
    plain = buffers.copy

    def copy() -> Any:
        print(trainer.step, file=note, flush=True)
        return plain()

    buffers.copy = copy


def fit_with_copies(settings: dict[str, Any]) -> None:
    fit(settings, copies)


@pytest.mark.parametrize(("ckpt_every", "stop_at_step", "steps"), [(2, 6, [2, 4]), (100, 3, []), (2, 3, [2])])
def test_the_last_save_copies_nothing(
    folder: Path, undisturbed: Run, ckpt_every: int, stop_at_step: int, steps: list[int]
) -> None:
    name = f"copies-{ckpt_every}-{stop_at_step}"
    settings = settings_for(folder, name, **{**RUN, "ckpt_every": ckpt_every, "stop_at_step": stop_at_step})
    run_ranks(2, fit_with_copies, settings)
    found = [int(line) for line in (folder / name / "copies.txt").read_text().split()]
    assert sorted(found) == sorted(2 * steps)  # each of two ranks
    run = Run(folder / name)
    assert run.checkpoint.name == f"checkpoint-{stop_at_step:08d}"
    manifest = json.loads((run.checkpoint / "manifest.json").read_text())
    assert manifest["tensors"]["model"]


def test_buffers_are_allocated_at_the_start_only_if_a_save_will_run_beside_training(folder: Path) -> None:
    for ckpt_every, taken in ((2, True), (100, False)):
        settings = settings_for(folder, f"b{ckpt_every}", **{**RUN, "ckpt_every": ckpt_every})
        assert run_ranks(1, buffers_at_start, settings) == [taken]


def buffers_at_start(settings: dict[str, Any]) -> bool:
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.training.trainer import Trainer

    trainer = Trainer.build(TrainingConfig(**{**settings, "parallel": "none"}), init_distributed("cpu"))
    return bool(trainer.checkpoints.buffers._copied)
