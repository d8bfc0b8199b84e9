"""`tinytrain branch`: make a new run that continues from a checkpoint of another run, and decays its learning rate.

Must not know how a run is trained. The new folder is an ordinary run that was stopped after the checkpoint's step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from tinytrain_dist.checkpoint.discovery import own_checkpoints, read_trainer_state
from tinytrain_dist.checkpoint.manifest import quick_problems, read_manifest
from tinytrain_dist.checkpoint.resume_rules import check_same_run
from tinytrain_dist.cli.arguments import UsageError, parse_options
from tinytrain_dist.config.batch_phases import sizes_before
from tinytrain_dist.config.checkpoint_copies import COPIES_SETTINGS
from tinytrain_dist.config.loading import read_command_line
from tinytrain_dist.config.run_folder import (
    BRANCH_FILE,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    LOGS_FOLDER,
    MANIFEST_FILE,
    STATE_FILE,
    TENSORBOARD_FILES,
    RunFolder,
    checkpoint_name,
    checkpoint_step,
    open_run,
    read_settings,
    records_file,
)
from tinytrain_dist.config.schema import FIELDS, TrainingConfig
from tinytrain_dist.config.weight_phases import phases_before
from tinytrain_dist.errors import CheckpointError, ConfigError
from tinytrain_dist.optim.lr_schedule import learning_rate, weight_decay_factor
from tinytrain_dist.utils.atomic_files import fsync_folder, write_atomically
from tinytrain_dist.utils.json_files import is_whole_number, parse_json, to_json
from tinytrain_dist.utils.lost_output import print_line
from tinytrain_dist.utils.stale_files import remove_leftovers, temporary_path
from tinytrain_dist.utils.text import format_list

# kinds of records with which a run continues from a checkpoint
START_OF_SESSION = ("parameter_groups", "restarted", "resumed")


@dataclasses.dataclass(frozen=True)
class BranchOptions:
    """Make a new run that continues from a checkpoint of another run, and decays its learning rate to lr_min.

    tinytrain branch RUN --at STEP --decay-iters N [--to NEW_RUN] [SETTINGS]

    The new run has a checkpoint and the records of RUN up to STEP. It needs RUN no more, and RUN does not change. Then
    `tinytrain train NEW_RUN` trains it to step STEP + N. SETTINGS are those in which the new run differs, such as
    --lr-min 0 or --decay-shape sqrt.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run (its target_dir). It may still be training."""
    at: Annotated[int, tyro.conf.arg(metavar="STEP")]
    """The step of the checkpoint to continue from."""
    decay_iters: Annotated[int, tyro.conf.arg(metavar="N")]
    """Steps of the decay."""
    to: Annotated[Path | None, tyro.conf.arg(metavar="NEW_RUN", help_behavior_hint="")] = None
    """The new run's folder (default: RUN-at-STEP-decay-N)."""


def main(args: list[str]) -> int:
    """Make a branch of a run."""
    options, settings = parse_options(BranchOptions, "branch", args)
    if options.decay_iters < 1:
        raise UsageError(f"--decay-iters: {options.decay_iters} must be at least 1", "branch")
    run = open_run(options.run)
    checkpoint = _checkpoint_of_step(run, options.at)
    state = read_trainer_state(checkpoint)
    beside = run.folder if run.folder.name else run.folder.resolve()
    target = options.to or beside.with_name(f"{beside.name}-at-{options.at}-decay-{options.decay_iters}")
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"--to: {target} exists already; give the name of a new or empty folder", "branch")
    config = _configuration(options, checkpoint, state, target, settings)
    _make_run(run, checkpoint, config, options.at)
    first, last = learning_rate(config, options.at - 1), learning_rate(config, config.total_steps - 1)
    print(
        f"{target}: continues {run.folder} after step {options.at}; its learning rate falls from {first:g} to "
        f"{last:g} over {options.decay_iters} steps, to step {config.total_steps}"
    )
    print(f"next: tinytrain train {shlex.quote(str(target))}")
    return 0


def _checkpoint_of_step(run: RunFolder, step: int) -> Path:
    """Return the checkpoint of a step. Errors: CheckpointError if there is none, or if it is damaged."""
    committed = own_checkpoints(run, read_settings(run.folder), print_line).committed()
    paths = {checkpoint_step(path): path for path in committed}
    if step not in paths:
        steps = format_list([*paths]) if paths else ""
        remedy = f"give one of those that it has: --at {steps}" if paths else "it has none yet (ckpt_every)"
        raise CheckpointError(f"{run.checkpoints}: has no checkpoint of step {step}; {remedy}")
    if problems := quick_problems(paths[step]):
        raise CheckpointError("; ".join(problems))
    return paths[step]


# ---------------------------------------------------------------- configuration


def _configuration(
    options: BranchOptions, checkpoint: Path, state: dict[str, Any], target: Path, settings: list[str]
) -> TrainingConfig:
    """Return the configuration of the new run.

    Errors: ConfigError and CheckpointError if the settings do not fit the parent, or if the learning rate would jump.
    """
    if "config" not in state:
        raise CheckpointError(
            f"{checkpoint}: holds no configuration (save_checkpoint writes none); give a checkpoint of a training run"
        )
    parent = TrainingConfig.from_dict(state["config"], str(checkpoint))
    end = options.at + options.decay_iters
    follows = {
        "schedule": "wsd",
        "warmup_iters": min(parent.warmup_steps, options.at),
        "cosine_iters": None,
        "decay_iters": options.decay_iters,
        "total_steps": end,
        "epochs": None,
        "stop_at_step": None,
        "target_dir": str(target),
        "ckpt_dir": None,
        "log_dir": None,
        "resume": "auto",
        "ckpt_path_to_resume": None,
    }
    batch_size, warmup = sizes_before(parent.batch_size, parent.batch_size_warmup, end)
    other: dict[str, Any] = {
        "allow": None,
        "profile": None,
        "train_weights": phases_before(parent.train_weights, end),
        "batch_size": batch_size,
        "batch_size_warmup": warmup,
    }
    other |= {name: FIELDS[name].default for name in COPIES_SETTINGS}  # the copies at a URL belong to one run
    values = {**parent.to_dict(), **other, **_given_settings(settings, follows), **follows}
    config = TrainingConfig.from_dict(values, "the settings of the branch")
    check_same_run(checkpoint, state, config, state.get("data", {}))
    _check_continuity(options, parent, config)
    return config


def _check_continuity(options: BranchOptions, parent: TrainingConfig, config: TrainingConfig) -> None:
    """Check that neither the learning rate nor the weight decay jumps where the branch begins. Errors: ConfigError."""
    step = options.at - 1  # completed before the last update of the parent
    before, after = learning_rate(parent, step), learning_rate(config, step)
    if before != after:
        remedy = f"add --lr-max {before!r} to decay from there" if before else "give an earlier step with --at"
        raise ConfigError(
            f"lr_max: the decay would begin at {after!r}, but the learning rate of {options.run} after step "
            f"{options.at} is {before!r} (schedule = {parent.schedule}), so it would jump; {remedy}, or branch a run "
            "with schedule = wsd or constant"
        )
    decay = parent.weight_decay * weight_decay_factor(parent, step)
    if config.weight_decay * weight_decay_factor(config, step) != decay:
        raise ConfigError(
            f"weight_decay: {config.weight_decay} is where the branch would begin, but the weight decay of "
            f"{options.run} after step {options.at} is {decay!r} (weight_decay_schedule = "
            f"{parent.weight_decay_schedule}), so it would jump; add --weight-decay {decay!r}"
        )


def _given_settings(settings: list[str], follows: dict[str, Any]) -> dict[str, Any]:
    """Return the settings on the command line. follows: those that follow from the options. Errors: ConfigError."""
    path, given = read_command_line(settings, "tinytrain branch")
    if path is not None:
        raise UsageError(f"{path}: one argument too many; leave it out", "branch")
    problems = [
        f"{name}: follows from the options of `tinytrain branch`, see --help; leave it out"
        for name in given
        if name in follows
    ]
    if problems:
        raise UsageError(problems, "branch")
    return given


# ---------------------------------------------------------------- files


def _make_run(parent: RunFolder, checkpoint: Path, config: TrainingConfig, step: int) -> None:
    """Write the folder of the new run, which appears complete or not at all. Errors: CheckpointError; OSError."""
    from tinytrain_dist.checkpoint.state_digests import TITLE_OF_KIND, state_digest, tensor_entries  # imports torch

    target = Path(config.target_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, of=target.name)
    new = temporary_path(target)
    try:
        copied = new / CHECKPOINTS_FOLDER / checkpoint_name(config.ckpt_save_prefix, step)
        _link_checkpoint(checkpoint, copied)
        entries = tensor_entries(copied)
        digests = {TITLE_OF_KIND[kind]: state_digest(of_kind) for kind, of_kind in entries.items()}
        record = {"run": str(parent.folder.resolve()), "step": step, "digests": digests}
        text = f"branched from {parent.folder} after step {step}"
        event = {"kind": "branched", "step": step, "time": round(time.time(), 3), "text": text, **record}
        _copy_logs(parent, new / LOGS_FOLDER, config, step, event)
        write_atomically(new / BRANCH_FILE, record)
        write_atomically(new / STATE_FILE, {"state": "preempted", "step": step, "reason": text})
        write_atomically(new / CONFIG_FILE, config.to_toml())
        fsync_folder(new)
        new.rename(target)
        fsync_folder(target.parent)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint}: was removed while it was copied ({error.filename}); give another --at, or set keep_every "
            "in the run, which keeps checkpoints"
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _link_checkpoint(checkpoint: Path, copied: Path) -> None:
    """Let `copied` hold the same files as a checkpoint, by hard links where the file system allows them.

    A checkpoint is never modified after its commit, only deleted, so two runs can share its files. kept.json is left
    out: it is replaced later, and it is about the other run. Errors: OSError; CheckpointError.
    """
    copied.mkdir(parents=True)
    for name in (*read_manifest(checkpoint).files, MANIFEST_FILE):
        with contextlib.suppress(OSError):  # another file system, or one without hard links
            os.link(checkpoint / name, copied / name)
            continue
        shutil.copyfile(checkpoint / name, copied / name)
        with open(copied / name, "rb") as file:
            os.fsync(file.fileno())
    fsync_folder(copied)
    if problems := quick_problems(copied):
        raise CheckpointError("; ".join(problems))


def _copy_logs(parent: RunFolder, logs: Path, config: TrainingConfig, step: int, event: dict[str, Any]) -> None:
    """Copy the records up to a step, followed by the event of the branch, and the files of TensorBoard.

    Where the parent itself was resumed from this checkpoint is left out, because the branch was not.

    A resume hides what TensorBoard's files have after that step.
    """
    logs.mkdir()
    kept = []
    for line in parent.records.read_bytes().split(b"\n") if parent.records.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut short
            record = parse_json(line)
            record_step, starts_session = record["step"], record.get("kind") in START_OF_SESSION
            if is_whole_number(record_step) and (record_step < step or (record_step == step and not starts_session)):
                kept.append(line.decode() + "\n")
    write_atomically(records_file(logs, config.log_save_prefix), "".join([*kept, to_json(event) + "\n"]))
    for path in parent.records.parent.glob(f"**/{TENSORBOARD_FILES}"):
        folder = logs / path.relative_to(parent.records.parent).parent
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)
