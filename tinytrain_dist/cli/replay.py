"""`tinytrain replay`: train the steps after a checkpoint again, and compare them with what was recorded.

Must not know how a run is trained: it starts one from the checkpoint, in a folder of its own, and reads its record.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import tyro

from tinytrain_dist.checkpoint.digests import tensor_entries
from tinytrain_dist.checkpoint.discovery import find_checkpoint, read_trainer_state
from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.config.run_folder import (
    CHECKPOINTS_FOLDER,
    LOGS_FOLDER,
    checkpoint_name,
    open_run,
    read_records,
    records_file,
)
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import CheckpointError

NATIVE_TOLERANCE = 1e-3  # relative; sums in another order move a loss by less over a few hundred steps


def replay(checkpoint: PathArgument, steps: int = 10, nproc: int = 1, settings: tuple[str, ...] = ()) -> int:
    """Train the steps after a checkpoint again and compare losses and gradient norms with the recorded ones.

    To the last bit where the run is reproducible, within 0.1 % where not. Exit code 1 if they differ.

    Args:
        checkpoint: A checkpoint of a run, in its folder; or a run: its newest valid checkpoint.
        steps: How many steps.
        nproc: Processes on this machine; any number that divides the batch.
        settings: More settings for the replayed run, such as allow_drift=true, train_data=PATH or
            train_data='["PATH", "PATH"]'.
    """
    path = find_checkpoint(checkpoint)
    state, run = read_trainer_state(path), open_run(path.parent)
    start = int(state["step"])
    recorded = {r["step"]: r for r in read_records(run.records) if r["kind"] == "train" and r["step"] > start}
    if not recorded:
        raise CheckpointError(
            f"{path}: no step after {start} is recorded in {run.records}; give an earlier checkpoint of the run"
        )
    with tempfile.TemporaryDirectory(prefix="tinytrain-replay-") as folder:
        target = Path(folder) / "run"
        _train(_config(state["config"], path, target, start + steps, settings), Path(folder), nproc)
        again = {r["step"]: r for r in read_records(records_file(target / LOGS_FOLDER)) if r["kind"] == "train"}
        exact = bool(state["config"]["reproducible"])
        common = sorted(recorded.keys() & again.keys())
        if not common:
            raise CheckpointError(
                f"{run.records}: none of the steps {start + 1} to {start + steps} was logged; raise --steps"
            )
        differ = [step for step in common if not _same(recorded[step], again[step], exact)]
        end = path.with_name(checkpoint_name(path.name.rpartition("-")[0], start + steps))
        replayed = next(iter((target / CHECKPOINTS_FOLDER).iterdir()))
        if exact and end.is_dir() and tensor_entries(end) != tensor_entries(replayed):
            print(f"step {start + steps}: the tensors are not those of {end}")
            differ.append(start + steps)
    how = "to the last bit" if exact else f"within {NATIVE_TOLERANCE:.1%}, as the run is not reproducible"
    for step in differ[:1]:
        for key in ("loss", "grad_norm") if step in common else ():
            print(f"step {step}: {key} {recorded[step][key]!r} was recorded, {again[step][key]!r} came out")
    print(f"{len(common) - len(set(differ) & set(common))} of {len(common)} recorded steps are the same {how}")
    return 1 if differ else 0


def _same(one: dict[str, Any], two: dict[str, Any], exact: bool) -> bool:
    pairs = [(one[key], two[key]) for key in ("loss", "grad_norm")]
    return all(a == b if exact else abs(a - b) <= NATIVE_TOLERANCE * abs(a) for a, b in pairs)


def _config(saved: dict[str, Any], path: Path, target: Path, stop: int, settings: tuple[str, ...]) -> TrainingConfig:
    """Return the saved configuration in another folder, from the checkpoint to `stop`, on any number of ranks."""
    moved = {"target_dir": str(target), "log_dir": None, "ckpt_dir": None, "init_from": None, "time_limit": None}
    resumed = {"resume": str(path.resolve()), "ckpt_path_to_resume": None, "ckpt_save_prefix": "checkpoint"}
    quiet: dict[str, Any] = {"log_every": 1, "log_save_prefix": "metrics", "val_data": None, "ckpt_every": 10**9}
    quiet |= {"early_stop_patience": None, "keep_every": None, "profile": None, "sample_tokens": 0}
    quiet |= {"fingerprint_every": None}
    layout = {"parallel": "auto", "dp_replicate": None, "dp_shard": None, "stop_at_step": stop}
    given: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.removeprefix("--").partition("=")
        try:
            given[name.replace("-", "_")] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            given[name.replace("-", "_")] = text
    if stop >= saved["total_steps"]:
        layout["stop_at_step"] = None
    values = {**saved, **moved, **resumed, **quiet, **layout, **given}
    return TrainingConfig.from_dict(values, "the replayed run")


def _train(config: TrainingConfig, folder: Path, nproc: int) -> None:
    """Run it as a user would; its output goes to stderr. Errors: CheckpointError if it fails."""
    (folder / "replay.toml").write_text(config.to_toml(), encoding="utf-8")
    command = [sys.executable, "-m", "tinytrain_dist.agent", "--standalone", f"--nproc-per-node={nproc}"]
    done = subprocess.run(
        [*command, "-m", "tinytrain_dist.train", str(folder / "replay.toml")], stdout=sys.stderr, check=False
    )
    if done.returncode:
        raise CheckpointError(f"the replayed run ended with exit code {done.returncode}; its own sentence is above")


def main(args: list[str]) -> int:
    """`tinytrain replay`."""
    return tyro.cli(replay, prog="tinytrain replay", args=args)
