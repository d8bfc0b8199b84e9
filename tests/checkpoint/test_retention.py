"""Check which checkpoints of a run are deleted, and how it is recorded that others must stay."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinytrain_dist.checkpoint.retention import (
    CommittedCheckpoint,
    RetentionRules,
    checkpoints_to_delete,
    note_promises,
    read_committed_checkpoint,
    reasons_to_keep,
    without_earlier_settings,
)


def checkpoints(losses: dict[int, float]) -> list[CommittedCheckpoint]:
    return [CommittedCheckpoint(Path(f"checkpoint-{step:08d}"), step, loss) for step, loss in losses.items()]


NOT_EVALUATED = dict.fromkeys([10, 20, 30, 40, 50], math.inf)


@pytest.mark.parametrize(
    ("losses", "keep_last", "keep_every", "best_step", "deleted"),
    [
        ({}, 1, None, None, []),
        (NOT_EVALUATED, 1, None, None, [10, 20, 30, 40]),
        (NOT_EVALUATED, 2, None, None, [10, 20, 30]),
        (NOT_EVALUATED, 5, None, None, []),
        (NOT_EVALUATED, 9, None, None, []),
        (NOT_EVALUATED, 1, 20, None, [10, 30]),
        (NOT_EVALUATED, 1, 0, None, [10, 20, 30, 40]),
        (NOT_EVALUATED, 1, None, 30, [10, 20, 40]),
        (NOT_EVALUATED, 1, 20, 30, [10]),
        ({10: 3.0, 20: 1.0, 30: 2.0, 40: 2.0}, 1, None, None, [10, 30]),
        ({10: 3.0, 20: 1.0, 30: 1.0, 40: 2.0}, 1, None, None, [10, 30]),
        ({10: 3.0, 20: math.inf, 30: 2.0, 40: 1.0}, 1, None, None, [10, 20, 30]),
        ({10: 3.0, 20: 1.0, 30: 2.0, 40: 2.0}, 1, None, 30, [10]),
        ({10: 3.0, 20: 1.0, 30: 2.0, 40: 2.0}, 1, None, 25, [10, 30]),
    ],
    ids=[
        "no checkpoint", "the last", "the last two", "as many as there are", "more than there are", "multiples",
        "multiples of 0 are none", "the best step of the run", "multiples and the best step", "lowest loss",
        "the oldest of two with the lowest loss", "the last has the lowest loss", "lowest loss and another best step",
        "a best step that was not saved",
    ],
)  # fmt: skip
def test_what_no_rule_keeps_is_deleted(
    losses: dict[int, float], keep_last: int, keep_every: int | None, best_step: int | None, deleted: list[int]
) -> None:
    selected = checkpoints_to_delete(checkpoints(losses), RetentionRules(keep_last, keep_every, best_step))
    assert [checkpoint.step for checkpoint in selected] == deleted


@pytest.mark.parametrize(
    ("state", "loss"),
    [
        ({"step": 20, "report": {"eval_loss": 1.5, "eval_step": 20}}, 1.5),
        ({"step": 20, "report": {"eval_loss": 1.5, "eval_step": 10}}, math.inf),
        ({"step": 20, "report": {"eval_loss": math.nan, "eval_step": 20}}, math.inf),
        ({"step": 20, "report": {}}, math.inf),
        ({"step": 20}, math.inf),
        ([], math.inf),
        (None, math.inf),
    ],
    ids=["its own loss", "loss of an earlier step", "NaN", "not evaluated", "no record", "not an object", "no file"],
)
def test_only_a_loss_of_its_own_step_counts(tmp_path: Path, state: Any, loss: float) -> None:
    path = tmp_path / "checkpoint-00000020"
    path.mkdir()
    if state is not None:
        (path / "trainer_state.json").write_text(json.dumps(state))
    checkpoint = read_committed_checkpoint(path)
    assert (checkpoint.step, checkpoint.eval_loss, checkpoint.known) == (20, loss, False)


def deleted(found: list[CommittedCheckpoint], *rules: Any, **more: Any) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints_to_delete(found, RetentionRules(*rules, **more))]


def test_what_an_earlier_keep_every_kept_stays() -> None:
    found = [replace(checkpoint, keep_every=20) for checkpoint in checkpoints(NOT_EVALUATED)]
    assert deleted(found, 1) == [10, 30]
    assert deleted(found, 1, 30) == [10]


def test_what_an_earlier_keep_last_kept_stays() -> None:
    first, *rest = checkpoints(NOT_EVALUATED)
    found = [replace(first, keep_last=4), *(replace(checkpoint, keep_last=4) for checkpoint in rest[:2]), *rest[2:]]
    assert deleted(found, 1) == [10, 40], "there are four newer ones than 10; 20 and 30 were among the last four"


def test_the_best_of_each_evaluation_stays() -> None:
    found = checkpoints({10: 1.0, 20: 2.0, 30: 0.5, 40: 0.6, 50: 0.7})
    found[:2] = [replace(checkpoint, evaluation="other data") for checkpoint in found[:2]]
    assert deleted(found, 1) == [20, 40]


def test_the_newest_sound_one_stays() -> None:
    found = checkpoints(NOT_EVALUATED)
    assert deleted(found, 1, sound_step=39) == [10, 20, 40]
    assert deleted(found, 1, sound_step=50) == [10, 20, 30, 40]
    assert deleted(found, 1, sound_step=-1) == [10, 20, 30, 40]


def test_what_nobody_here_can_know_stays(tmp_path: Path) -> None:
    found = checkpoints(NOT_EVALUATED)
    found[0] = replace(found[0], known=False)
    found[1] = replace(found[1], run=str(tmp_path / "other"))
    found[2] = replace(found[2], run=f"{tmp_path}/x/../run")
    assert deleted(found, 1, run=str(tmp_path / "run")) == [30]
    reasons = reasons_to_keep(found, RetentionRules(1, run=str(tmp_path / "run")))
    assert reasons == [
        "its settings cannot be read",
        f"saved by the run {tmp_path}/other",
        "",
        "saved by the run ",
        "keep_last 1",
    ]


def test_without_earlier_settings_only_the_present_ones_count() -> None:
    found = [
        replace(checkpoint, keep_every=20, keep_last=9, evaluation="old")
        for checkpoint in checkpoints({10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0, 50: 5.0})
    ]
    assert deleted(found, 1) == []
    assert deleted([without_earlier_settings(checkpoint, "new") for checkpoint in found], 1, 30) == [10, 20, 40]
    assert deleted([without_earlier_settings(checkpoint, "old") for checkpoint in found], 1, 30) == [20, 40]


def write_state(folder: Path, step: int, report: dict[str, Any], **settings: Any) -> Path:
    path = folder / f"checkpoint-{step:08d}"
    path.mkdir()
    state = {"step": step, "report": report, "config": {"keep_last": 2, "keep_every": None, **settings}}
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


def test_the_settings_of_a_checkpoint_are_read(tmp_path: Path) -> None:
    path = write_state(tmp_path, 20, {}, keep_last=3, keep_every=10, target_dir="runs/a", val_data="v", eval_steps=4)
    found = read_committed_checkpoint(path)
    assert (found.keep_last, found.keep_every, found.run, found.known) == (3, 10, "runs/a", True)
    assert found.evaluation == '["v", 4, null, null, null]'


def test_what_is_decided_later_is_written_down_once_and_read_by_a_later_start(tmp_path: Path) -> None:
    paths = [write_state(tmp_path, step, {}) for step in (10, 20, 30, 40)]
    rules = RetentionRules(1, 20, best_step=10, best_loss=1.5, evaluation="some data")
    updated = note_promises([read_committed_checkpoint(path) for path in paths], rules)
    assert updated == [read_committed_checkpoint(path) for path in paths]
    assert (updated[0].eval_loss, updated[0].evaluation) == (1.5, "some data")
    assert [checkpoint.keep_every for checkpoint in updated] == [None, 20, None, 20]
    assert sorted(path.parent.name[-2:] for path in tmp_path.rglob("kept.json")) == ["10", "20", "40"]
    for path in tmp_path.rglob("kept.json"):
        path.chmod(0o400)  # a second time would replace it
        before = path.stat().st_ino
        note_promises(updated, rules)
        assert path.stat().st_ino == before
