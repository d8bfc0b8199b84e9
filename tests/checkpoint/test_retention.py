"""Which checkpoints of a run are deleted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tinytrain_dist.checkpoint.retention import CommittedCheckpoint, checkpoints_to_delete, read_committed_checkpoint


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
    selected = checkpoints_to_delete(checkpoints(losses), keep_last, keep_every, best_step)
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
    assert read_committed_checkpoint(path) == CommittedCheckpoint(path, 20, loss)
