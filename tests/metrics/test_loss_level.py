"""The level of the loss: which step is known to be sound."""

from __future__ import annotations

import json
import math
from typing import Any

from tinytrain_dist.metrics.loss_level import KEYS, LossLevel, forget_level


def followed(losses: list[float], record: dict[str, Any] | None = None, first_step: int = 1) -> LossLevel:
    level = LossLevel({} if record is None else record)
    for step, loss in enumerate(losses, first_step):
        level.update(step, loss)
    return level


def test_a_usual_loss_shows_that_the_weights_before_it_were_sound() -> None:
    assert LossLevel({}).sound_step == -1
    assert followed([4.0]).sound_step == 0
    assert followed([4.0, 3.5, 6.0]).sound_step == 2, "one hard batch is no jump"


def test_after_a_jump_nothing_is_sound_until_the_loss_is_back() -> None:
    assert followed([4.0, 3.0, 400.0, 90.0, 40.0]).sound_step == 1
    assert followed([4.0, 3.0, 400.0, 90.0, 5.0]).sound_step == 4
    assert followed([4.0, math.nan, math.inf]).sound_step == 0
    assert followed([math.inf]).sound_step == -1


def test_one_easy_batch_does_not_set_the_level() -> None:
    assert followed([4.0, 0.1, 5.0]).sound_step == 2


def test_a_run_that_stops_and_resumes_has_the_same_level() -> None:
    losses = [4.0, 3.9, 0.1234567, 3.7, 900.0, 3.6]
    record = json.loads(json.dumps(followed(losses[:3]).record))
    assert followed(losses[3:], record, 4).record == followed(losses).record


def test_the_level_can_be_forgotten_and_the_rest_of_the_record_stays() -> None:
    record = followed([4.0, 3.0]).record | {"eval_loss": 3.5}
    assert set(record) == {*KEYS, "eval_loss"}
    forget_level(record)
    assert record == {"eval_loss": 3.5}
