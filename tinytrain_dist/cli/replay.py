"""`tinytrain replay`: train the steps after a checkpoint again, and compare them with the records.

Must not know how a run is trained: it starts a run from the checkpoint, in a temporary folder, and reads its records.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.discovery import find_checkpoint, read_trainer_state
from tinytrain_dist.checkpoint.state_digests import tensor_entries
from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.config.checkpoint_copies import COPIES_SETTINGS
from tinytrain_dist.config.run_folder import (
    CHECKPOINTS_FOLDER,
    LOGS_FOLDER,
    Record,
    checkpoint_name,
    open_run,
    read_records,
    records_file,
)
from tinytrain_dist.config.schema import FIELDS, TrainingConfig
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.launch.start import local_command
from tinytrain_dist.reliability.stop_requests import exit_on_stop_signals
from tinytrain_dist.utils.json_files import whole_number
from tinytrain_dist.utils.stale_files import describe_leftovers, hold_folder, owner, remove_leftovers

COMPARED_KEYS = ("loss", "grad_norm")
NATIVE_TOLERANCE = 1e-3  # relative; another order of sums changes a loss by less over a few hundred steps


def replay(checkpoint: PathArgument, steps: int = 10, nproc: int = 1, settings: tuple[str, ...] = ()) -> int:
    """Train the steps after a checkpoint again, and compare losses and gradient norms with the recorded ones.

    They must be equal to the last bit if the run is reproducible, or within 0.1 % if it is not. Exit code 1 if they
    differ.

    Args:
        checkpoint: A checkpoint in the folder of its run, or a run (its newest valid checkpoint is used).
        steps: Number of steps to train.
        nproc: Number of processes on this machine; at most one for each micro-batch.
        settings: Further settings of the replayed run, such as allow_drift=true, train_data=PATH or
            train_data='["PATH", "PATH"]'.
    """
    path = find_checkpoint(checkpoint)
    state = read_trainer_state(path)
    run = open_run(path.parent)
    start = state["step"]
    stop = start + steps
    if "config" not in state:
        raise CheckpointError(
            f"{path}: holds no configuration (save_checkpoint writes none); give a checkpoint of a training run"
        )
    exact = bool(state["config"].get("reproducible"))
    recorded = {step: record for step, record in _train_records(run.records).items() if step > start}
    if not recorded:
        raise CheckpointError(
            f"{path}: no step after {start} is recorded in {run.records}; give an earlier checkpoint of the run"
        )
    _announce(remove_leftovers(Path(tempfile.gettempdir())))
    with tempfile.TemporaryDirectory(prefix=f"tinytrain-replay-{owner()}-") as scratch:
        held = hold_folder(Path(scratch))
        target = Path(scratch) / "run"
        _train(_replay_config(state["config"], path, target, stop, settings), Path(scratch), nproc, held)
        replayed = _train_records(records_file(target / LOGS_FOLDER))
        common_steps = sorted(recorded.keys() & replayed.keys())
        if not common_steps:
            needed = min(recorded) - start
            raise CheckpointError(
                f"{run.records}: none of the steps {start + 1} to {stop} was logged; give --steps {needed}"
            )
        saved_end = path.with_name(checkpoint_name(path.name.rpartition("-")[0], stop))
        replayed_end = next(iter((target / CHECKPOINTS_FOLDER).iterdir()))
        tensors_differ = exact and saved_end.is_dir() and tensor_entries(saved_end) != tensor_entries(replayed_end)
    if tensors_differ:
        print(f"step {stop}: the tensors differ from those of {saved_end}")
    differing = [step for step in common_steps if not _agree(recorded[step], replayed[step], exact)]
    for step in differing[:1]:
        for key in COMPARED_KEYS:
            print(f"step {step}: {key} was recorded as {recorded[step][key]!r}, the replay has {replayed[step][key]!r}")
    how = "to the last bit" if exact else f"within {NATIVE_TOLERANCE:.1%}, as the run is not reproducible"
    num_same = len(common_steps) - len(differing)
    if tensors_differ and stop in common_steps and stop not in differing:
        num_same -= 1
    print(f"{num_same} of {len(common_steps)} recorded steps are the same {how}")
    return 1 if differing or tensors_differ else 0


def _train_records(path: Path) -> dict[int, Record]:
    """Return the records of training, by step."""
    return {record["step"]: record for record in read_records(path) if _is_step(record)}


def _is_step(record: Record) -> bool:
    return record["kind"] == "train" and record.keys() >= set(COMPARED_KEYS)


def _agree(recorded: Record, replayed: Record, exact: bool) -> bool:
    """Return whether a replayed step equals the recorded one, to the last bit or within the tolerance."""
    for key in COMPARED_KEYS:
        a, b = recorded[key], replayed[key]
        if not math.isfinite(a) and not math.isfinite(b):  # records of NaN and of infinity are the same
            continue
        if exact and a != b:
            return False
        if not exact and not abs(a - b) <= NATIVE_TOLERANCE * abs(a):  # also for NaN
            return False
    return True


def _replay_config(
    saved: dict[str, Any], checkpoint: Path, target: Path, stop: int, settings: tuple[str, ...]
) -> TrainingConfig:
    """Return the saved configuration, changed to train from the checkpoint to step `stop` in another folder."""
    folders = {"target_dir": str(target), "log_dir": None, "ckpt_dir": None}
    start = {"resume": str(checkpoint.resolve()), "ckpt_path_to_resume": None, "init_from": None}
    end = {"stop_at_step": stop if stop < whole_number(saved.get("total_steps")) else None, "time_limit": None}
    end |= {"early_stop_patience": None}
    # log every step to metrics.jsonl, save only at the end, and leave out what does not affect training
    logging: dict[str, Any] = {"log_every": 1, "log_save_prefix": "metrics", "val_data": None}
    logging |= {"profile": None, "sample_tokens": 0, "fingerprint_every": None}
    logging |= {name: FIELDS[name].default for name in ("eval_every", "eval_steps")}  # no effect without val_data
    checkpoints: dict[str, Any] = {"ckpt_save_prefix": "checkpoint", "ckpt_every": 10**9, "keep_every": None}
    checkpoints |= {"ckpt_writers": None, **{name: FIELDS[name].default for name in COPIES_SETTINGS}}
    mesh = {"parallel": "auto", "dp_replicate": None, "dp_shard": None, "reshard_after_forward": None}
    given = dict(map(_parse_setting, settings))
    values = {**saved, **folders, **start, **end, **logging, **checkpoints, **mesh, **given}
    return TrainingConfig.from_dict(values, "the replayed run")


def _parse_setting(setting: str) -> tuple[str, Any]:
    """Split NAME=VALUE, where VALUE is in TOML, or a text without quotes."""
    name, _, text = setting.removeprefix("--").partition("=")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    return name.replace("-", "_"), value


def _announce(removed: list[Path]) -> None:
    if removed:
        print(describe_leftovers(removed), file=sys.stderr)


def _train(config: TrainingConfig, folder: Path, nproc: int, held: int | None) -> None:
    """Train by the usual command line, with its output on stderr. Errors: CheckpointError if training fails.

    held: the mark of the scratch folder. Training has it as well, so that the folder stays while it runs, also if this
    process is killed.
    """
    config_file = folder / "replay.toml"
    config_file.write_text(config.to_toml(), encoding="utf-8")
    command = local_command(config_file, [], nproc)
    environment = {**os.environ, **command.environment}
    marks = [] if held is None else [held]
    with subprocess.Popen(command.arguments, stdout=sys.stderr, pass_fds=marks, env=environment) as process:
        try:
            exit_code = process.wait()
        except BaseException:  # a stop request
            process.terminate()  # not killed: the agent ends its ranks, and then `with` has waited for all of them
            raise
    if exit_code:
        raise CheckpointError(f"the replayed run ended with exit code {exit_code}; its own error is above")


def main(args: list[str]) -> int:
    """Run `tinytrain replay`."""
    with exit_on_stop_signals():
        return call_verb(replay, "replay", args)
