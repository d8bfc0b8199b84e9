"""`tinytrain replay`: repeated steps agree with the record, or the first difference is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import REPOSITORY
from tests.helpers.tools import Cli
from tinytrain_dist.cli import replay
from tinytrain_dist.config.schema import TrainingConfig


def replay_in_process(checkpoint: Path) -> tuple[int, str, str]:
    """Replay 3 steps from a command line: the replayed run writes to the real stderr, which tests replace.

    A module in the current folder has the name of a library module, and must not hide it.
    """
    folder = checkpoint.parents[2]
    (folder / "random.py").write_text("raise SystemExit('random.py of the current folder was imported')\n")
    command = [sys.executable, "-P", "-m", "tinytrain_dist", "replay", str(checkpoint), "--steps", "3"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.multiprocess
def test_replay_agrees_with_the_record_and_names_the_first_step_that_differs(run: Path) -> None:
    checkpoint = run / "checkpoints" / "checkpoint-00000003"
    code, out, err = replay_in_process(checkpoint)
    assert (code, out) == (0, "3 of 3 recorded steps are the same within 0.1%, as the run is not reproducible\n"), err
    path = run / "logs" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["kind"] == "train" and record["step"] >= 5:
            record["loss"] *= 1.01
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, _ = replay_in_process(checkpoint)
    assert code == 1
    assert out.startswith("step 5: loss ")
    assert "1 of 3 recorded steps are the same" in out


def test_a_replay_makes_no_copies(tmp_path: Path) -> None:
    saved = TrainingConfig(checkpoint_copies="s3://bucket/x", copies_keep_last=5, ckpt_every=2, copies_keep_every=4)
    config = replay._replay_config(saved.to_dict(), tmp_path, tmp_path / "scratch", 9, ())
    assert config.checkpoint_copies is None


def test_a_step_that_was_not_recorded_cannot_be_replayed(tinytrain: Cli, run: Path) -> None:
    code, _, err = tinytrain("replay", run)
    assert code == 2
    assert "no step after 6 is recorded" in err


@pytest.mark.parametrize(("loss", "exact", "agrees"), [(2.0, True, True), (2.0001, True, False), (2.0001, False, True),
                                                       (2.1, False, False), (float("nan"), False, False)])  # fmt: skip
def test_agreement_is_exact_or_within_the_tolerance(loss: float, exact: bool, agrees: bool) -> None:
    recorded: dict[str, Any] = {"loss": 2.0, "grad_norm": 1.0}
    assert replay._agree(recorded, {**recorded, "loss": loss}, exact) == agrees


def test_settings_are_toml_or_plain_text() -> None:
    assert replay._parse_setting("allow_drift=true") == ("allow_drift", True)
    assert replay._parse_setting("--train-data=a/b.npy") == ("train_data", "a/b.npy")
    assert replay._parse_setting('train_data=["a", "b"]') == ("train_data", ["a", "b"])
