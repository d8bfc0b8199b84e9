"""Name every file of a run folder, find runs and checkpoints on disk, and read their records.

This module owns the names and the layout; everything that reads or writes a file of a run takes its name from here.
Only `requeues` is named in `slurm/train.sbatch`, because no other program reads or writes it.

    RUN/                                 target_dir
      config.toml                        the resolved configuration
      environment.json                   versions, git commit, hosts, devices and relevant environment variables
      state.json                         how the run stands or ended: running, done, preempted or failed, and the step
      error.json                         the first cause of a failure; removed by the next start
      lock.json                          which process writes to this folder; touched while that process lives
      stop                               a file that a user makes to have the run save and stop
      requeues                           of slurm/train.sbatch: a line for each requeue of the job
      submitted/1/                       launch/submit.py: code, configuration and script of the first submitted job
      logs/                              log_dir; heartbeat, stacks and ending.json are in RUN/logs in any case
        metrics.jsonl                    the records; named by log_save_prefix
        metrics.replaced.jsonl           records that a resume from an earlier step has replaced
        events.out.tfevents.*            TensorBoard
        profile/                         traces of profiled steps
        heartbeat/rank-00000.json        what each rank does, for the others and for `tinytrain status`
        stacks/rank-00000.txt            the stacks of all threads of a rank when the run hung
        nccl_trace_rank_0                what NCCL was doing when a collective timed out
        ending.json                      the request that all ranks end; it names the launch that it is meant for
      checkpoints/                       ckpt_dir
        checkpoint-00001000/             PREFIX-STEP, prefix from ckpt_save_prefix; appears by one rename
          config.json, tokenizer.json    a Hugging Face folder
          model-*, optimizer-*           tensors, with an index each
          trainer_state.json             step, configuration, data, metrics
          manifest.json                  sizes and digests of all files and tensors; written last
          kept.json                      why it stays, where that was decided after it was written
        checkpoint-00002000.tmp/         a checkpoint that is being written, or was when its writer died
        checkpoint-00000500.damaged/     a checkpoint that did not verify; a second one is NAME.damaged-2
        checkpoint-00000700.diverged/    a checkpoint that was saved while the run diverged

Must not know torch, nor the configuration's schema: looking at a run must work when its settings do not.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytrain_dist.errors import CheckpointError, TinytrainError
from tinytrain_dist.utils.regular_files import read_text

# In RUN.
CONFIG_FILE = "config.toml"
ENVIRONMENT_FILE = "environment.json"
STATE_FILE = "state.json"
ERROR_FILE = "error.json"
LOCK_FILE = "lock.json"
STOP_FILE = "stop"
SUBMITTED_FOLDER = "submitted"
LOGS_FOLDER = "logs"
CHECKPOINTS_FOLDER = "checkpoints"

# In RUN/logs, or in log_dir.
PROFILE_FOLDER = "profile"
HEARTBEAT_FOLDER = "heartbeat"
STACKS_FOLDER = "stacks"
ABORT_FILE = "ending.json"
DEFAULT_RECORDS_PREFIX = "metrics"
REPLACED_SUFFIX = ".replaced.jsonl"  # in place of .jsonl

# In each checkpoint.
MANIFEST_FILE = "manifest.json"
TRAINER_STATE_FILE = "trainer_state.json"
KEPT_FILE = "kept.json"

# After the name of a checkpoint.
TEMPORARY_SUFFIX = ".tmp"
DAMAGED_SUFFIX = ".damaged"
DIVERGED_SUFFIX = ".diverged"

STEP_FOLDER = re.compile(r".+-(\d{8,})(\..+)?")  # PREFIX-00001000, also with a suffix
RUN_FILES = (CONFIG_FILE, STATE_FILE, ENVIRONMENT_FILE, LOGS_FOLDER, CHECKPOINTS_FOLDER)  # any of them: a run
Record = dict[str, Any]


def heartbeat_folder(run: Path) -> Path:
    """Return the folder with the heartbeat files of all ranks."""
    return run / LOGS_FOLDER / HEARTBEAT_FOLDER


def heartbeat_file(run: Path, rank: int) -> Path:
    """Return the file in which a rank writes what it does."""
    return heartbeat_folder(run) / f"rank-{rank:05d}.json"


def stacks_file(run: Path, rank: int) -> Path:
    """Return the file in which a rank writes the stacks of its threads when the run hangs."""
    return run / LOGS_FOLDER / STACKS_FOLDER / f"rank-{rank:05d}.txt"


def abort_file(run: Path) -> Path:
    """Return the file that asks all ranks to end."""
    return run / LOGS_FOLDER / ABORT_FILE


def records_file(logs: Path, prefix: str = DEFAULT_RECORDS_PREFIX) -> Path:
    """Return the file with the records of a run. prefix: log_save_prefix."""
    return logs / f"{prefix}.jsonl"


def checkpoint_name(prefix: str, step: int) -> str:
    """Return the name of a checkpoint's folder. prefix: ckpt_save_prefix."""
    return f"{prefix}-{step:08d}"


@dataclass(frozen=True)
class RunFolder:
    """A run on disk: its folder, and where its checkpoints and its records are."""

    folder: Path
    checkpoints: Path
    records: Path

    @classmethod
    def at(cls, folder: Path) -> RunFolder | None:
        """Return the run in `folder`, which may also be its folder of checkpoints; None if there is none."""
        if any((folder / name).exists() for name in RUN_FILES):
            settings = read_settings(folder)
            checkpoints = Path(settings.get("ckpt_dir") or folder / CHECKPOINTS_FOLDER)
            logs = Path(settings.get("log_dir") or folder / LOGS_FOLDER)
            return cls(folder, checkpoints, records_file(logs, settings.get("log_save_prefix", DEFAULT_RECORDS_PREFIX)))
        if folder.is_dir() and any(is_checkpoint(path) for path in folder.iterdir()):
            return cls(folder.parent, folder, records_file(folder.parent / LOGS_FOLDER))
        return None

    def step_folders(self) -> list[Path]:
        """Return everything named like a checkpoint, by step, including damaged and half-written ones."""
        if not self.checkpoints.is_dir():
            return []
        folders = [path for path in self.checkpoints.iterdir() if is_checkpoint(path)]
        return sorted(folders, key=lambda path: (checkpoint_step(path), path.name))

    def committed(self) -> list[Path]:
        """Return the checkpoints under their final name, by step."""
        return [path for path in self.step_folders() if not name_suffix(path)]


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in a run's config.toml, {} where there is none or it cannot be read.

    Nothing is checked: a run with settings that this version does not have can still be looked at.
    """
    try:
        tree = tomllib.loads(read_text(folder / CONFIG_FILE))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        settings |= value if isinstance(value, dict) else {key: value}
    return settings


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is, or was meant to be, a checkpoint."""
    if not path.is_dir() or (path / CONFIG_FILE).exists():
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
    """Return what follows the step in the name: "" for a committed checkpoint, else ".tmp", ".damaged" or similar."""
    match = STEP_FOLDER.fullmatch(path.name)
    return (match[2] or "") if match else ""


def open_run(place: Path) -> RunFolder:
    """Return the run at `place`. Errors: CheckpointError that says what was expected there."""
    run = RunFolder.at(place)
    if run is None:
        state = "holds neither a run nor a checkpoint" if place.is_dir() else "is not a folder"
        raise CheckpointError(f"{place}: {state}; give a run (its target_dir) or one of its checkpoints")
    return run


def read_records(path: Path) -> list[Record]:
    """Return the records of a metrics file; a line that a crash cut short is ignored.

    Errors: TinytrainError if there is no such file.
    """
    try:
        lines = read_text(path, errors="replace").splitlines()
    except OSError as error:
        raise TinytrainError(
            f"{path}: no record of a run ({error.strerror}); give a folder that a run has written to (its target_dir)"
        ) from None
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record and "kind" in record:
            records.append(record)
    return records
