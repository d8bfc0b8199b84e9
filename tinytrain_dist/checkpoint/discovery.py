"""Find the newest valid checkpoint of a run, and read its saved state.

For commands and users who look at a run from outside. Must not import torch at the top: a listing of runs need not wait
the seconds that this takes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.manifest import read_manifest
from tinytrain_dist.config.run_folder import TRAINER_STATE_FILE, is_checkpoint, open_run
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.regular_files import read_text


def quick_problems(folder: Path) -> list[str]:
    """Return what is wrong with a checkpoint as far as manifest and file sizes tell; empty if nothing."""
    try:
        files = read_manifest(folder).files
    except CheckpointError as error:
        return [str(error)]
    problems: list[str] = []
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            state = "is missing" if size is None else f"has {size:,} bytes"
            problems.append(f"{path}: {state}, but {entry['bytes']:,} were written")
    return problems


def find_checkpoint(place: Path, kind: str | None = None) -> Path:
    """Return `place` itself if it is a checkpoint, or the newest valid one of the run there.

    Sizes are checked, and with `kind` ("model" or "optimizer") also every byte of the files of that kind. Damaged
    checkpoints of a run are skipped and named on stderr. Errors: CheckpointError if the checkpoint that was asked for
    is damaged, or if the run has no valid one.
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
        print(f"passed over, damaged: {'; '.join(problems)}", file=sys.stderr)
    raise CheckpointError(
        f"{run.checkpoints}: none of {len(candidates)} checkpoint(s) is valid; train on, or give another run"
        if candidates
        else f"{run.checkpoints}: has no checkpoint yet; wait for the first (ckpt_every), or give another run"
    )


def _problems(path: Path, kind: str | None) -> list[str]:
    """Return what is wrong with sizes; if nothing is and `kind` is given, what is wrong with the files of that kind."""
    problems = quick_problems(path)
    if problems or kind is None:
        return problems
    names = [name for name in read_manifest(path).files if name.startswith(kind)]
    if not names:
        return []
    from tinytrain_dist.checkpoint.verify import find_damage  # imports torch

    return find_damage(path, names)


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read trainer_state.json of a checkpoint. Errors: CheckpointError if it is missing or broken."""
    try:
        state: dict[str, Any] = json.loads(read_text(checkpoint / TRAINER_STATE_FILE))
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: {TRAINER_STATE_FILE} cannot be read ({error}); give a checkpoint of a training run"
        ) from None
