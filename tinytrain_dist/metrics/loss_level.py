"""Follow the level of the train loss, to know from which weights training is known to continue well.

The loss and the gradient of step s + 1 are computed with the weights after step s. If both are finite and the loss is
at its usual level, the weights after step s are sound. Weights that are finite can still have blown up: the step after
them shows it. Must not know files or checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

# A loss is unusual above FACTOR x the lowest mean so far + NATS. A step that is wrongly called unusual costs nothing,
# because the next usual step makes up for it.
FACTOR, NATS = 2.0, 1.0
MEAN_STEPS = 10  # horizon of the running mean, so that one easy batch does not set the level
SPIKE_WINDOW_KEY = "spike_window"  # in a checkpoint: the losses and norms that skip_spikes compares with
KEYS = ("sound_step", "mean_loss", "lowest_loss")


class LossLevel:
    """The level of the train loss and the newest sound step; kept in `record`, which every checkpoint keeps.

    Keys of the record: sound_step, mean_loss (running mean of usual losses), lowest_loss (lowest of these means).
    """

    def __init__(self, record: dict[str, Any]) -> None:
        """Continue with what `record` has; it is updated in place."""
        self.record = record

    @property
    def sound_step(self) -> int:
        """The newest step after which the weights were sound; -1 if none is known."""
        return int(self.record.get("sound_step", -1))

    @property
    def limit(self) -> float:
        """The highest usual loss, in nats per token; infinite before the first step."""
        return FACTOR * float(self.record.get("lowest_loss", math.inf)) + NATS

    def update(self, step: int, loss: float) -> None:
        """Take the loss of a step whose update was not skipped, and so whose gradient was finite."""
        if not (math.isfinite(loss) and loss <= self.limit):
            return
        mean = float(self.record.get("mean_loss", loss))
        mean += (loss - mean) / MEAN_STEPS
        lowest = min(mean, float(self.record.get("lowest_loss", math.inf)))
        self.record |= {"sound_step": step - 1, "mean_loss": mean, "lowest_loss": lowest}


def forget_level(record: dict[str, Any]) -> None:
    """Forget the level of the loss, because the data has changed and losses cannot be compared."""
    for key in (*KEYS, SPIKE_WINDOW_KEY):
        record.pop(key, None)
