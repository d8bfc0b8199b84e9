"""Find the newest valid checkpoint of a run, and read its saved state."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tinytrain_dist.config.run_folder import TRAINER_STATE_FILE, is_checkpoint, open_run
from tinytrain_dist.errors import CheckpointError


def quick_problems(folder: Path) -> list[str]:
    """Return what is wrong with a checkpoint as far as manifest and file sizes tell; empty if nothing."""
    from tinytrain_dist.checkpoint.manifest import (
        read_manifest,  # torch takes seconds, and who lists runs need not wait
    )

    try:
        files = read_manifest(folder).files
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            has = "is missing" if size is None else f"has {size:,} bytes"
            found.append(f"{path}: {has}, but {expected['bytes']:,} were written")
    return found


def find_checkpoint(place: Path, kind: str | None = None) -> Path:
    """`place` itself if it is a checkpoint, or the newest valid one of the run there; sizes checked.

    kind: also read every byte of its "model" or "optimizer" files. Those that are passed over are named on stderr.
    Errors: CheckpointError if the one that was asked for is damaged, or if the run has no valid one.
    """

    from tinytrain_dist.checkpoint.manifest import read_manifest
    from tinytrain_dist.checkpoint.verify import find_damage

    def problems(path: Path) -> list[str]:
        found = quick_problems(path)
        names = [] if found or kind is None else [n for n in read_manifest(path).files if n.startswith(kind)]
        return found + (find_damage(path, names) if names else [])

    if is_checkpoint(place):
        if found := problems(place):
            raise CheckpointError("\n".join(found))
        return place
    run = open_run(place)
    candidates = run.committed()
    for path in reversed(candidates):
        found = problems(path)
        if not found:
            return path
        print(f"passed over, damaged: {'; '.join(found)}", file=sys.stderr)
    raise CheckpointError(
        f"{run.checkpoints}: none of {len(candidates)} checkpoint(s) is valid; train on, or give another run"
        if candidates
        else f"{run.checkpoints}: has no checkpoint yet; wait for the first (ckpt_every), or give another run"
    )


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint. Errors: CheckpointError if it is missing or broken."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: {TRAINER_STATE_FILE} cannot be read ({error}); give a checkpoint of a training run"
        ) from None
