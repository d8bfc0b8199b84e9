"""Decide which checkpoints of a run are deleted.

Must not know how they are deleted: the decision is a pure function of what is on disk and of the settings.

A checkpoint stays as long as the settings with which it was saved keep it, whatever the present ones are. These
settings are in its trainer_state.json. What is decided later is in its `kept.json`, which the manifest does not list:

* `keep_every`: a later setting that keeps it
* `eval_loss` and `evaluation`: an evaluation of it that was made after a resume

`tinytrain prune` removes what only earlier settings keep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinytrain_dist.config.run_folder import KEPT_FILE, TRAINER_STATE_FILE, checkpoint_step
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.utils.atomic_files import read_json_object, write_atomically
from tinytrain_dist.utils.json_files import is_number

# Eval losses can be compared if these settings are the same.
EVALUATION_SETTINGS = ("val_data", "eval_steps", "batch_size", "context_len", "vocab_size")


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A checkpoint under its final name, and what the settings with which it was saved say about it."""

    path: Path
    step: int
    eval_loss: float  # in nats per token, measured with its weights; infinite if it was not evaluated
    evaluation: str = ""  # what the loss was measured on, see `evaluation_key`
    keep_last: int = 1
    keep_every: int | None = None
    run: str = ""  # target_dir of the run that saved it
    known: bool = True  # its settings could be read

    @property
    def promised_by_keep_every(self) -> bool:
        """Whether the `keep_every` of its own run keeps it for ever."""
        return bool(self.keep_every) and self.step % (self.keep_every or 1) == 0


@dataclass(frozen=True)
class RetentionRules:
    """What keeps a checkpoint at present."""

    keep_last: int  # the setting, at least 1
    keep_every: int | None = None  # the setting, in steps; None or 0: none
    best_step: int | None = None  # step with the best eval loss that the run knows of; None if nothing was evaluated
    best_loss: float | None = None  # that loss
    evaluation: str = ""  # what it was measured on, see `evaluation_key`
    sound_step: int | None = None  # the newest step from which training is known to continue well; see LossLevel
    run: str | None = None  # keep what runs with another target_dir than this one have saved; None: keep none of them

    @classmethod
    def of(cls, config: TrainingConfig, record: Mapping[str, Any], sound_step: int | None) -> RetentionRules:
        """Return the rules of a run. `record`: its evaluations, see EarlyStopping."""
        return cls(
            config.keep_last,
            config.keep_every,
            record.get("best_eval_step"),
            record.get("best_eval_loss"),
            evaluation_key(config.resolved()),
            sound_step,
            run=config.target_dir,
        )


def evaluation_key(settings: Mapping[str, Any]) -> str:
    """Return a text that is equal for settings whose eval losses can be compared."""
    return json.dumps([settings.get(name) for name in EVALUATION_SETTINGS])


def changed_evaluation_settings(state: Mapping[str, Any], config: TrainingConfig) -> list[str]:
    """Return the settings because of which the eval losses of a trainer_state.json cannot be compared with new ones."""
    saved, present = state.get("config", {}), config.resolved()
    return [name for name in EVALUATION_SETTINGS if name in saved and saved[name] != present[name]]


def read_committed_checkpoint(path: Path) -> CommittedCheckpoint:
    """Read what decides whether a checkpoint stays; what cannot be read counts as not evaluated and not known."""
    state = read_json_object(path / TRAINER_STATE_FILE)
    kept = read_json_object(path / KEPT_FILE)
    settings = state.get("config")
    known = isinstance(settings, dict)
    settings = settings if isinstance(settings, dict) else {}
    eval_loss, evaluation = _own_eval_loss(state), evaluation_key(settings)
    if math.isinf(eval_loss):
        eval_loss, evaluation = _number(kept.get("eval_loss"), math.inf), str(kept.get("evaluation", evaluation))
    checkpoint = CommittedCheckpoint(
        path,
        checkpoint_step(path),
        eval_loss,
        evaluation,
        keep_last=int(_number(settings.get("keep_last"), 1)),
        keep_every=int(_number(settings.get("keep_every"), 0)) or None,
        run=str(settings.get("target_dir", "")),
        known=known,
    )
    if checkpoint.promised_by_keep_every:
        return checkpoint
    return replace(checkpoint, keep_every=int(_number(kept.get("keep_every"), 0)) or None)


def _own_eval_loss(state: dict[str, Any]) -> float:
    """Return the eval loss in a trainer_state.json if it is of its own step, else infinity."""
    record = state.get("report")
    if not isinstance(record, dict) or record.get("eval_step") != state.get("step"):  # the loss of an earlier step
        return math.inf
    return _number(record.get("eval_loss"), math.inf)


def _number(value: Any, default: float) -> float:
    return float(value) if is_number(value) and math.isfinite(value) else default


def note_promises(checkpoints: Sequence[CommittedCheckpoint], rules: RetentionRules) -> list[CommittedCheckpoint]:
    """Write down what keeps a checkpoint and is not in its own state, so that a later start knows it.

    Returns the checkpoints as a later start would read them. Errors: OSError.
    """
    updated = []
    for checkpoint in checkpoints:
        news: dict[str, Any] = {}
        if rules.keep_every and checkpoint.step % rules.keep_every == 0 and not checkpoint.promised_by_keep_every:
            news["keep_every"] = rules.keep_every
        if checkpoint.step == rules.best_step and math.isinf(checkpoint.eval_loss) and rules.best_loss is not None:
            news |= {"eval_loss": rules.best_loss, "evaluation": rules.evaluation}
        if news:
            kept_file = checkpoint.path / KEPT_FILE
            write_atomically(kept_file, read_json_object(kept_file) | news)
            checkpoint = replace(checkpoint, **news)
        updated.append(checkpoint)
    return updated


def reasons_to_keep(
    checkpoints: Sequence[CommittedCheckpoint],
    rules: RetentionRules,
    is_damaged: Callable[[Path], bool] = lambda path: False,
) -> list[str]:
    """Return for each checkpoint why it stays, or "" for one that nothing keeps. `checkpoints`: all, by step.

    Kept are, with the present settings or with those of the checkpoint,

    * the last `keep_last`
    * those at a multiple of `keep_every`
    * of each evaluation that was ever configured, the one with the lowest eval loss; of equal ones the oldest
    * the one at `best_step`: its own state need not contain the loss
    * the newest one that is sound
    * one whose settings cannot be read, and one of another run: nobody here can know whether it must stay

    A damaged one stays where an intact one would, but the next one is kept as well. is_damaged: called only for those
    because of which others are not kept, because it reads files.
    """
    damaged: dict[Path, str] = {}
    intact: set[Path] = set()
    counted = list(checkpoints)
    while True:
        chosen = _chosen_by_comparison(counted, rules)
        found = {path for path in chosen if path not in intact and is_damaged(path)}
        if not found:
            break
        intact |= chosen.keys() - found
        damaged |= {path: f"damaged and not counted, else {chosen[path]}" for path in found}
        counted = [checkpoint for checkpoint in counted if checkpoint.path not in found]
    reasons = damaged | chosen
    return [reasons.get(checkpoint.path) or _own_reason(checkpoint, rules) for checkpoint in checkpoints]


def _chosen_by_comparison(checkpoints: Sequence[CommittedCheckpoint], rules: RetentionRules) -> dict[Path, str]:
    """Return the checkpoints that stay because of how they compare with the others, each with the reason."""
    best = _best_of_each_evaluation(checkpoints)
    sound = [c.step for c in checkpoints if rules.sound_step is not None and c.step <= rules.sound_step]

    def reason(newer: int, checkpoint: CommittedCheckpoint) -> str:
        if newer < rules.keep_last:
            return f"keep_last {rules.keep_last}"
        if checkpoint in best or checkpoint.step == rules.best_step:
            return "best eval loss"
        if checkpoint.step in sound[-1:]:
            return "the newest that training is known to continue well from"
        if newer < checkpoint.keep_last:
            return f"keep_last {checkpoint.keep_last}, an earlier setting"
        return ""

    reasons = {c.path: reason(newer, c) for newer, c in enumerate(reversed(checkpoints))}
    return {path: reason for path, reason in reasons.items() if reason}


def _own_reason(checkpoint: CommittedCheckpoint, rules: RetentionRules) -> str:
    """Return why a checkpoint stays whatever the others are, or ""."""
    if rules.keep_every and checkpoint.step % rules.keep_every == 0:
        return f"keep_every {rules.keep_every}"
    if not checkpoint.known:
        return "its settings cannot be read"
    if rules.run is not None and Path(checkpoint.run).resolve() != Path(rules.run).resolve():
        return f"saved by the run {checkpoint.run}"
    if checkpoint.promised_by_keep_every:
        return f"keep_every {checkpoint.keep_every}, an earlier setting"
    return ""


def _best_of_each_evaluation(checkpoints: Sequence[CommittedCheckpoint]) -> list[CommittedCheckpoint]:
    best: dict[str, CommittedCheckpoint] = {}
    for checkpoint in checkpoints:
        if math.isinf(checkpoint.eval_loss):
            continue
        known_best = best.setdefault(checkpoint.evaluation, checkpoint)
        if checkpoint.eval_loss < known_best.eval_loss:
            best[checkpoint.evaluation] = checkpoint
    return list(best.values())


def checkpoints_to_delete(
    checkpoints: Sequence[CommittedCheckpoint],
    rules: RetentionRules,
    is_damaged: Callable[[Path], bool] = lambda path: False,
) -> list[CommittedCheckpoint]:
    """Return the checkpoints that nothing keeps, oldest first. The arguments: see `reasons_to_keep`."""
    reasons = reasons_to_keep(checkpoints, rules, is_damaged)
    return [checkpoint for checkpoint, reason in zip(checkpoints, reasons, strict=True) if not reason]


def without_earlier_settings(checkpoint: CommittedCheckpoint, evaluation: str) -> CommittedCheckpoint:
    """Return a checkpoint as if it had been saved with the present settings. `evaluation`: see `evaluation_key`."""
    eval_loss = checkpoint.eval_loss if checkpoint.evaluation == evaluation else math.inf
    return replace(checkpoint, eval_loss=eval_loss, keep_last=1, keep_every=None)
