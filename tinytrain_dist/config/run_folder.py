"""Name every file of a run folder, find runs and checkpoints on disk, and read the records of a run.

All code that reads or writes a file of a run takes the name of the file from this module. The only exception is
`requeues`, which is named in `slurm/train.sbatch`, because no other program reads or writes it.

    RUN/                                 target_dir
      config.toml                        the resolved configuration
      environment.json                   versions, git commit, hosts, devices and relevant environment variables
      state.json                         status of the run (running, done, preempted or failed) and its step
      error.json                         the first cause of a failure; removed when the run is started again
      branch.json                        the run and the step that `tinytrain branch` started this run from
      lock.json                          the process that writes to this folder; it keeps the file's time stamp recent
      restarts.jsonl                     why nodes of an elastic run came and went, and the time that each change took
      snapshots.json                     the launch whose snapshots in shared memory may be used, and the newest one
      copies.json                        which checkpoints are copied to checkpoint_copies, and what fails
      stop                               created by a user to make the run save and stop
      requeues                           one line for each requeue of the job, written by slurm/train.sbatch
      submitted/1/                       code, configuration and script of the first job that was submitted
      logs/                              log_dir; heartbeat, stacks and ending.json are always in RUN/logs
        metrics.jsonl                    the records, one per line; log_save_prefix replaces `metrics`
        metrics.replaced.jsonl           records that a resume from an earlier step has replaced
        events.out.tfevents.*            TensorBoard
        wandb/, mlflow/                  files of these trackers, see the setting `trackers`
          run.json                       the ID of the tracker's run, which a resume continues
        profile/                         traces of profiled steps
        heartbeat/rank-00000.json        step and phase of a rank, for the other ranks and for `tinytrain status`
        stacks/rank-00000.txt            the stacks of all threads of a rank, written when the run hangs
        nccl_trace_rank_0                NCCL's last collectives, written when one times out
        ending.json                      a request that all ranks end; it names the launch that it applies to
      checkpoints/                       ckpt_dir
        checkpoint.lock.json             PREFIX.lock.json: the process that saves checkpoints of this prefix
        checkpoint-00001000/             PREFIX-STEP; ckpt_save_prefix gives PREFIX; created by one rename
          config.json, tokenizer.json    a Hugging Face folder
          model-*, optimizer-*           tensors, with an index each
          trainer_state.json             step, configuration, data, metrics
          manifest.json                  sizes and digests of all files and tensors; written last
          kept.json                      why the checkpoint stays, if that was decided after it was written
        checkpoint-00002000.tmp/         a checkpoint that is being written, or was when the process was killed
        checkpoint-00002000.download/    a copy that is being downloaded, or was when the process was killed
        checkpoint-00000500.damaged/     a checkpoint that failed verification; the second is NAME.damaged-2
        checkpoint-00000700.diverged/    a checkpoint that was saved while the run diverged

Must not know torch or the configuration's schema, so that a run with invalid settings can still be inspected.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytrain_dist.errors import CheckpointError, TinytrainError
from tinytrain_dist.utils.json_files import is_file_name, is_number, is_whole_number, nulls_to_nan, parse_json
from tinytrain_dist.utils.permissions import permission_problem
from tinytrain_dist.utils.progress import Advance, no_progress
from tinytrain_dist.utils.regular_files import open_regular, read_bytes

# In RUN.
CONFIG_FILE = "config.toml"
ENVIRONMENT_FILE = "environment.json"
STATE_FILE = "state.json"
ERROR_FILE = "error.json"
BRANCH_FILE = "branch.json"
LOCK_FILE = "lock.json"
STOP_FILE = "stop"
COPIES_FILE = "copies.json"
RESTARTS_FILE = "restarts.jsonl"
SNAPSHOTS_FILE = "snapshots.json"
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
TENSORBOARD_FILES = "events.out.tfevents.*"
TRACKER_STATE_FILE = "run.json"  # in the folder of a tracker

# In each checkpoint.
MANIFEST_FILE = "manifest.json"
TRAINER_STATE_FILE = "trainer_state.json"
KEPT_FILE = "kept.json"

# After the name of a checkpoint.
TEMPORARY_SUFFIX = ".tmp"
DAMAGED_SUFFIX = ".damaged"
DIVERGED_SUFFIX = ".diverged"
DOWNLOAD_SUFFIX = ".download"

STEP_FOLDER = re.compile(r".+-(\d{8,})(\..+)?")  # PREFIX-00001000, optionally with a suffix
# A folder with any of these is a run.
RUN_FILES = (CONFIG_FILE, STATE_FILE, ENVIRONMENT_FILE, LOGS_FOLDER, CHECKPOINTS_FOLDER)
Record = dict[str, Any]
NODE_VALUES = {"host": str, "folder": str, "bytes": int}  # of each node in snapshots.json
# the values of records that are read again
RECORDED_NUMBERS = {"time", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds"}


def heartbeat_folder(run: Path) -> Path:
    """Return the folder with the heartbeat files of all ranks."""
    return run / LOGS_FOLDER / HEARTBEAT_FOLDER


def heartbeat_file(run: Path, rank: int) -> Path:
    """Return the file in which a rank records its step and phase."""
    return heartbeat_folder(run) / f"rank-{rank:05d}.json"


def restarts_file(run: Path) -> Path:
    """Return the file with the history of the nodes of an elastic run."""
    return run / RESTARTS_FILE


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


def checkpoint_lock_file(checkpoints: Path, prefix: str) -> Path:
    """Return the file that names the process that saves checkpoints of a prefix. prefix: ckpt_save_prefix."""
    return checkpoints / f"{prefix}.lock.json"


@dataclass(frozen=True)
class RunFolder:
    """A run on disk: its folder, and where its checkpoints and its records are."""

    folder: Path
    checkpoints: Path
    records: Path

    @classmethod
    def at(cls, folder: Path) -> RunFolder | None:
        """Return the run in `folder`, or None if there is none. `folder` may also be the folder of its checkpoints."""
        if any((folder / name).exists() for name in RUN_FILES):
            texts = {name: value for name, value in read_settings(folder).items() if value and _is_path(value)}
            checkpoints = Path(texts.get("ckpt_dir", folder / CHECKPOINTS_FOLDER))
            logs = Path(texts.get("log_dir", folder / LOGS_FOLDER))
            return cls(folder, checkpoints, records_file(logs, texts.get("log_save_prefix", DEFAULT_RECORDS_PREFIX)))
        if folder.is_dir() and any(is_checkpoint(path) for path in folder.iterdir()):
            return cls(folder.parent, folder, records_file(folder.parent / LOGS_FOLDER))
        return None

    def step_folders(self) -> list[Path]:
        """Return all checkpoint folders, sorted by step, including damaged and incomplete ones."""
        if not self.checkpoints.is_dir():
            return []
        folders = [path for path in self.checkpoints.iterdir() if is_checkpoint(path)]
        return sorted(folders, key=lambda path: (checkpoint_step(path), path.name))

    def committed(self) -> list[Path]:
        """Return the checkpoint folders with their final name (without a suffix), sorted by step."""
        return [path for path in self.step_folders() if not name_suffix(path)]


def read_copies_record(run: Path) -> dict[str, Any]:
    """Return what copies.json says, with values of the expected types; {} if the run makes no copies."""
    try:
        record = parse_json(read_bytes(run / COPIES_FILE))
    except (OSError, ValueError):
        return {}
    expected = {"url": str, "copied": list, "problem": str, "bytes": int, "bytes_copied": int}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in expected.items()):
        return {}
    return record


def read_snapshots_record(run: Path) -> dict[str, Any]:
    """Return what snapshots.json says, with values of the expected types; {} if the run takes no snapshots.

    The newest snapshot is left out as long as there is none.
    """
    try:
        record = parse_json(read_bytes(run / SNAPSHOTS_FILE))
        nodes = record["nodes"]
        known = all(isinstance(node[key], kind) for node in nodes for key, kind in NODE_VALUES.items())
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if not isinstance(nodes, list) or not known:
        return {}
    newest = {name: record.get(name) for name in ("step", "time", "stall_seconds")}
    return {"nodes": nodes} | (newest if all(map(is_number, newest.values())) else {})


def _is_path(value: Any) -> bool:
    """Return whether a setting can be a path: a damaged config.toml may hold anything."""
    return isinstance(value, str) and all(
        is_file_name(part) for part in value.split("/") if part not in ("", ".", "..")
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in a run's config.toml, or {} if it cannot be read.

    Nothing is checked, so that a run with settings unknown to this version can still be inspected.
    """
    try:
        tree = parse_toml(read_bytes(folder / CONFIG_FILE))
    except (OSError, ValueError):
        return {}
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        settings |= value if isinstance(value, dict) else {key: value}
    return settings


def parse_toml(data: bytes) -> dict[str, Any]:
    """Return the content of a TOML file, also with a byte-order mark. Errors: ValueError, whatever the file holds."""
    try:
        text = data.decode("utf-8-sig")  # editors on Windows write the mark
    except UnicodeDecodeError as error:
        raise ValueError(f"is not TOML: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("is not TOML: brackets are nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not TOML: {error}") from None


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
    """Return the step in a checkpoint's name, or -1 if there is none."""
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def name_suffix(path: Path) -> str:
    """Return the part of the name after the step: "" for a complete checkpoint, else ".tmp", ".damaged" or similar."""
    match = STEP_FOLDER.fullmatch(path.name)
    return (match[2] or "") if match else ""


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """Return the folder names, with enough parent folders to make them different."""
    paths = [path.resolve().parts for path in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def open_run(place: Path) -> RunFolder:
    """Return the run at `place`. Errors: CheckpointError if there is neither a run nor a checkpoint."""
    run = RunFolder.at(place)
    if run is None:
        problem = "contains neither a run nor a checkpoint" if place.is_dir() else "is not a folder"
        raise CheckpointError(f"{place}: {problem}; give a run (its target_dir) or one of its checkpoints")
    return run


def read_records(path: Path) -> list[Record]:
    """Return the records of a metrics file. Lines that are cut short or damaged are skipped.

    A number that was not finite is written as null, and is NaN here.
    Errors: TinytrainError if the file cannot be read.
    """
    return list(iter_records(path))


def iter_records(path: Path, advance: Advance = no_progress) -> Iterator[Record]:
    """Yield what `read_records` returns, one record at a time: a long run's records may not fit into memory.

    advance: called with the numbers of bytes that were read.
    """
    for line in _iter_lines(path):
        advance(len(line))
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and _is_record(record):
            yield nulls_to_nan(record) if b"null" in line else record


def _iter_lines(path: Path) -> Iterator[bytes]:
    try:
        with open_regular(path) as file:
            yield from file
    except (OSError, ValueError) as error:  # ValueError: such a name is not possible
        reason = error.strerror if isinstance(error, OSError) else error
        problem = f"{path}: no records of a run ({reason}); give the target_dir of a run that has started"
        raise TinytrainError(permission_problem(error) or problem) from None


def _is_record(record: Record) -> bool:
    """Return whether a record has a step and a kind, and numbers where the readers of records expect them."""
    return (
        is_whole_number(record.get("step"))
        and isinstance(record.get("kind"), str)
        and all(record[name] is None or is_number(record[name]) for name in RECORDED_NUMBERS & record.keys())
    )
