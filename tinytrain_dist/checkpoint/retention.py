"""Decide which checkpoints of a run are deleted.

Must not know how they are deleted: the decision is a pure function of what is on disk and of the settings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinytrain_dist.config.run_folder import TRAINER_STATE_FILE, checkpoint_step
from tinytrain_dist.utils.regular_files import read_text


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A checkpoint under its final name."""

    path: Path
    step: int
    eval_loss: float  # in nats per token, measured at its own step; infinite if it was not evaluated there


def read_committed_checkpoint(path: Path) -> CommittedCheckpoint:
    """Read step and eval loss of a checkpoint; a state that cannot be read counts as not evaluated."""
    return CommittedCheckpoint(path, checkpoint_step(path), _eval_loss(path))


def _eval_loss(path: Path) -> float:
    try:
        state = json.loads(read_text(path / TRAINER_STATE_FILE))
        record = state["report"]
        if record.get("eval_step") != state["step"]:  # it is the loss of an earlier step
            return math.inf
        loss = float(record["eval_loss"])
        return loss if math.isfinite(loss) else math.inf
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def checkpoints_to_delete(
    checkpoints: Sequence[CommittedCheckpoint], keep_last: int, keep_every: int | None, best_step: int | None
) -> list[CommittedCheckpoint]:
    """Return the checkpoints that no rule keeps, oldest first.

    Kept are

    * the last `keep_last`
    * those at a multiple of `keep_every` (None or 0: none)
    * the one with the lowest eval loss at its own step; of equal ones the oldest
    * the one at `best_step`, the best step that the run knows of. It can be evaluated after a resume, and then its own
      state does not contain the loss.

    Args:
        checkpoints: all that are committed, by step
        keep_last: the setting, at least 1
        keep_every: the setting, in steps
        best_step: step with the best eval loss so far; None if nothing was evaluated
    """
    best = min(checkpoints, key=lambda checkpoint: checkpoint.eval_loss, default=None)

    def is_kept(checkpoint: CommittedCheckpoint) -> bool:
        if keep_every and checkpoint.step % keep_every == 0:
            return True
        if checkpoint == best and math.isfinite(checkpoint.eval_loss):
            return True
        return checkpoint.step == best_step

    return [checkpoint for checkpoint in checkpoints[:-keep_last] if not is_kept(checkpoint)]
