"""Find runs and checkpoints on disk by their names, and read the plain record of a run.

Must not know torch: listing runs must be fast. It only reads. It lies in config/ because metrics and reliability, which
checkpoint/ builds on, write files of a run folder, too.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytrain_dist.config.loading import read_toml
from tinytrain_dist.errors import CheckpointError, ConfigError, TinytrainError

MANIFEST_FILE, TRAINER_STATE_FILE = "manifest.json", "trainer_state.json"  # in each checkpoint
STEP_FOLDER = re.compile(r".+-(\d{8,})(\..+)?")  # PREFIX-00001000, and what is set aside: .tmp, .damaged
RUN_FILES = ("config.toml", "state.json", "environment.json", "logs", "checkpoints")
Record = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """A run folder: where its checkpoints and its plain record lie."""

    folder: Path
    checkpoints: Path
    records: Path

    @classmethod
    def at(cls, folder: Path) -> RunFolder | None:
        """Return the run in `folder`, which may also be its folder of checkpoints; None if there is none."""
        if any((folder / name).exists() for name in RUN_FILES):
            settings = read_settings(folder)
            checkpoints = Path(settings.get("ckpt_dir") or folder / "checkpoints")
            logs = Path(settings.get("log_dir") or folder / "logs")
            return cls(folder, checkpoints, logs / f"{settings.get('log_save_prefix', 'metrics')}.jsonl")
        if folder.is_dir() and any(is_checkpoint(path) for path in folder.iterdir()):
            return cls(folder.parent, folder, folder.parent / "logs" / "metrics.jsonl")
        return None

    def step_folders(self) -> list[Path]:
        """Everything named like a checkpoint, by step, also what is damaged or half-written."""
        found = (
            [path for path in self.checkpoints.iterdir() if is_checkpoint(path)] if self.checkpoints.is_dir() else []
        )
        return sorted(found, key=lambda path: (checkpoint_step(path), path.name))

    def committed(self) -> list[Path]:
        """Checkpoints under their final name, by step."""
        return [path for path in self.step_folders() if not name_suffix(path)]


def read_settings(folder: Path) -> dict[str, Any]:
    """Read config.toml; an empty dictionary where there is none or it cannot be read, since looking must not fail."""
    try:
        return read_toml(folder / "config.toml")[0] if (folder / "config.toml").is_file() else {}
    except ConfigError:
        return {}


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is, or was meant to be, a checkpoint."""
    if not path.is_dir() or (path / "config.toml").exists():
        return False
    return (
        (path / MANIFEST_FILE).exists()
        or (path / TRAINER_STATE_FILE).exists()
        or bool(STEP_FOLDER.fullmatch(path.name))
    )


def checkpoint_step(path: Path) -> int:
    """Return the step in a checkpoint's name, -1 where it has none."""
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def name_suffix(path: Path) -> str:
    """Return what follows the step in a name: "" for a committed checkpoint, else ".tmp", ".damaged" or the like."""
    match = STEP_FOLDER.fullmatch(path.name)
    return (match[2] or "") if match else ""


def open_run(place: Path) -> RunFolder:
    """Return the run at `place`. Errors: CheckpointError saying what was looked for."""
    run = RunFolder.at(place)
    if run is None:
        state = "holds neither a run nor a checkpoint" if place.is_dir() else "is not a folder"
        raise CheckpointError(f"{place}: {state}; give a run (its target_dir) or one of its checkpoints")
    return run


def read_records(path: Path) -> list[Record]:
    """Read the records of a metrics.jsonl; a torn line, which a crash leaves, is skipped.

    Errors: TinytrainError if there is no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise TinytrainError(
            f"{path}: no record of a run ({error.strerror}); give a folder that a run has written to (its target_dir)"
        ) from None
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record and "kind" in record:
            found.append(record)
    return found
