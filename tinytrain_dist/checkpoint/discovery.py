"""Find the newest valid checkpoint of a run, and read its saved state.

For commands and users who look at a run from outside. Must not import torch at the top: that takes seconds, and a
listing of runs does not need it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.checkpoint_folder import CheckpointFolder
from tinytrain_dist.checkpoint.manifest import read_manifest
from tinytrain_dist.checkpoint.retention import RetentionRules, evaluation_key
from tinytrain_dist.config.run_folder import (
    TRAINER_STATE_FILE,
    RunFolder,
    is_checkpoint,
    open_run,
)
from tinytrain_dist.config.schema import FIELDS
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.atomic_files import read_json_object
from tinytrain_dist.utils.output import print_line
from tinytrain_dist.utils.regular_files import read_text

DEFAULT_KEEP_LAST = FIELDS["keep_last"].default
DEFAULT_PREFIX = FIELDS["ckpt_save_prefix"].default


def quick_problems(folder: Path) -> list[str]:
    """Return what is wrong with a checkpoint, judging by its manifest and file sizes alone; empty if nothing is."""
    try:
        files = read_manifest(folder).files
    except CheckpointError as error:
        return [str(error)]
    problems: list[str] = []
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            problems.append(f"{path}: {found}, but {entry['bytes']:,} bytes were written")
    return problems


def find_checkpoint(place: Path, kind: str | None = None) -> Path:
    """Return `place` itself if it is a checkpoint, else the newest valid checkpoint of the run at `place`.

    File sizes are checked. With `kind` ("model" or "optimizer"), every byte of the files of that kind is checked, too.
    Damaged checkpoints of a run are skipped and named on stderr.
    Errors: CheckpointError if `place` is a damaged checkpoint, or a run without a valid one.
    """
    if is_checkpoint(place):
        if problems := _problems(place, kind):
            raise CheckpointError("\n".join(problems))
        return place
    run = open_run(place)
    candidates = run.committed()
    for path in reversed(candidates):
        problems = _problems(path, kind)
        if not problems:
            return path
        print(f"skipped a damaged checkpoint: {'; '.join(problems)}", file=sys.stderr)
    raise CheckpointError(
        f"{run.checkpoints}: none of {len(candidates)} checkpoint(s) is valid; continue training, or give another run"
        if candidates
        else f"{run.checkpoints}: has no checkpoint yet; wait for the first (ckpt_every), or give another run"
    )


def _problems(path: Path, kind: str | None) -> list[str]:
    """Return what is wrong with the sizes, or, if nothing is, with the contents of the files of `kind`."""
    problems = quick_problems(path)
    if problems or kind is None:
        return problems
    names = [name for name in read_manifest(path).files if name.startswith(kind)]
    if not names:
        return []
    from tinytrain_dist.checkpoint.verify import find_damage  # imports torch

    return find_damage(path, names)


def own_checkpoints(run: RunFolder, settings: dict[str, Any], warn: Callable[[str], None]) -> CheckpointFolder:
    """Return the checkpoints of a run with its own prefix. `settings`: those in its config.toml. `warn`: see there."""
    return CheckpointFolder(run.checkpoints, str(settings.get("ckpt_save_prefix", DEFAULT_PREFIX)), warn)


def present_rules(run: RunFolder, settings: dict[str, Any]) -> RetentionRules:
    """Return what keeps the checkpoints of a run with its present settings. `settings`: those in its config.toml."""
    own = own_checkpoints(run, settings, print_line).committed()
    state = read_json_object(own[-1] / TRAINER_STATE_FILE) if own else {}
    record = state.get("report")
    record = record if isinstance(record, dict) else {}
    sound_step = record.get("sound_step")
    if isinstance(sound_step, int) and sound_step >= state.get("step", 0) - 1:
        sound_step = None  # the loss was at its usual level when the newest was saved
    return RetentionRules(
        int(settings.get("keep_last", DEFAULT_KEEP_LAST)),
        settings.get("keep_every"),
        record.get("best_eval_step"),
        record.get("best_eval_loss"),
        evaluation_key(settings),
        sound_step,
        run=str(settings.get("target_dir", "")),
    )


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read trainer_state.json of a checkpoint. Errors: CheckpointError if it is missing or broken."""
    try:
        state: dict[str, Any] = json.loads(read_text(checkpoint / TRAINER_STATE_FILE))
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: {TRAINER_STATE_FILE} cannot be read ({error}); give a checkpoint of a training run"
        ) from None
