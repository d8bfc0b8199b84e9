"""End a run that diverged: find out which weights are sound, and say which checkpoint to return to and how.

Must not know how a step is made. Rank 0 looks at the folder and changes it; all ranks get its sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import DivergenceError
from tinytrain_dist.metrics.step_metrics import StepMetrics
from tinytrain_dist.training.run_saver import RunSaver
from tinytrain_dist.utils.text import format_list

LR_DIVISOR = 10.0  # of the learning rate that is given as an example


class Divergence:
    """What a run does when updates are skipped: weights are tested, and checkpoints that are not sound set aside."""

    def __init__(
        self,
        metrics: StepMetrics,
        saver: RunSaver,
        compute_again: Callable[[int], tuple[float, float]],
        source: Path | None,
    ) -> None:
        """Look after a run.

        compute_again: returns loss and gradient norm of the batch that is drawn after so many steps, with the present
        weights, and changes nothing. source: the checkpoint that this process resumed from, if any.
        """
        self.metrics = metrics
        self.saver = saver
        self.checkpoints = saver.checkpoints
        self.config: TrainingConfig = self.checkpoints.config
        self.context = self.checkpoints.context
        self.compute_again = compute_again
        self.source = source

    def check_last_weights(self) -> None:
        """Check the weights of a run that ends with skipped updates. A collective.

        Errors: DivergenceError if they are not sound.
        """
        self._test_weights()
        step = self.metrics.read_step
        if self.context.any_rank(self.metrics.level.sound_step < step):
            raise DivergenceError(
                f"step {step}: the run ends here, but its last {self.metrics.skips.in_row} update(s) were skipped, "
                "and its weights have no finite gradient"
            )

    def explain(self, error: DivergenceError) -> DivergenceError:
        """Return the error with the checkpoint to return to and how to continue. A collective.

        Checkpoints that are not sound are renamed. The newest one is then from before the divergence, so that
        `resume = auto` takes it.
        """
        self.saver.collect(self.metrics.read_step, wait=True)
        if self.context.any_rank(self.saver.saved_step > self.metrics.level.sound_step):
            self._test_weights()
        text = ""
        if self.context.is_main:
            aside = self.checkpoints.set_aside_after(self.metrics.level.sound_step)
            text = f"{error}. {self._advice(aside)}"
        return DivergenceError(self.context.broadcast_object(text))

    def _test_weights(self) -> None:
        """Compute the last step that was not skipped again, with the present weights; note if they are sound.

        No update was made since, so they are also the weights after every step since. A collective.
        """
        last_update = self.metrics.skips.last_update
        if last_update < 1:
            return
        loss, norm = self.compute_again(last_update - 1)
        if math.isfinite(norm):
            self.metrics.level.update(self.metrics.read_step + 1, loss)

    def _advice(self, aside: list[Path]) -> str:
        level = self.metrics.level
        own = self.checkpoints.committed()
        first_skipped = self.metrics.skips.last_update + 1
        first_unusual = level.sound_step + 2  # the loss of the step before it was usual, and gave the sound step
        event = f"the skipped steps (from step {first_skipped} on)"
        if 2 <= first_unusual < first_skipped:
            event = f"the jump of the loss (above {level.limit:.3g} at step {first_unusual})"
        if own:
            start = f"The newest checkpoint from before {event} is {own[-1]}; the same command resumes from it"
        elif self.source is not None and not _is_inside(self.source, self.config.checkpoints_dir):
            start = f"This run has no checkpoint from before {event}; the same command begins again at {self.source}"
        else:
            start = f"There is no checkpoint from before {event}; the same command begins again at step 0"
        moved = f". Later checkpoints are set aside: {format_list([path.name for path in aside])}" if aside else ""
        settings = [*_lower_learning_rate(self.config), *_resume_settings(self.config, bool(own))]
        leave_out = self.metrics.skips.setting_that_leaves_out(self.metrics.read_step)
        lower = (
            f"Give it a lower learning rate, for example {', '.join(settings)}; or look at those windows, and leave "
            f"their steps out with {leave_out}"
        )
        return f"{start}. {lower}{moved}"


def _lower_learning_rate(config: TrainingConfig) -> list[str]:
    """Return settings with a lower learning rate that fit together."""
    lr_max = config.lr_max / LR_DIVISOR
    lower_min = config.lr_min > float(f"{lr_max:g}")
    return [f"lr_max = {lr_max:g}", *([f"lr_min = {config.lr_min / LR_DIVISOR:g}"] if lower_min else [])]


def _resume_settings(config: TrainingConfig, has_own: bool) -> list[str]:
    """Return what must change so that the run resumes from its own newest checkpoint, if anything."""
    given = config.resume_from
    names_own = given not in ("auto", "never") and _is_inside(Path(given), config.checkpoints_dir)
    if not names_own and not (given == "never" and has_own):
        return []
    names = ("resume", "ckpt_path_to_resume")
    return [f"{name} = auto" for name in names if getattr(config, name) not in (None, "auto")]


def _is_inside(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == folder.resolve()
