"""Runs with damaged metadata, and runs whose loss was not finite, are resumed and looked at like any other."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.damage import DEEP
from tests.helpers.ranks import run_ranks
from tests.helpers.training import fit, settings_for
from tinytrain_dist.checkpoint.discovery import find_checkpoint, read_trainer_state
from tinytrain_dist.cli.main import main
from tinytrain_dist.config.run_folder import read_records

pytestmark = pytest.mark.multiprocess
METADATA = ("manifest.json", "trainer_state.json", "model.safetensors.index.json", "config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 8 steps that saved steps 2, 4, 6 and 8, and whose evaluations were not finite."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(1, fit, settings(folder), evaluate_to_infinity)
    return folder


def settings(folder: Path, **others: Any) -> dict[str, Any]:
    run = {"total_steps": 8, "ckpt_every": 2, "eval_every": 4, "keep_last": 9, "early_stop_patience": 9}
    return settings_for(folder, "run", **{**run, **others})


def evaluate_to_infinity(trainer: Any) -> None:
    """Let evaluations have infinite and undefined losses, and the records of training an undefined norm."""
    from dataclasses import replace

    plain = trainer.evaluator.run
    losses = iter([math.inf, math.nan, math.nan])
    trainer.evaluator.run = lambda step: replace(plain(step), loss=next(losses))


def strict(text: str) -> Any:
    """A JSON value as parsers other than Python's read it."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_every_json_file_of_a_run_without_finite_losses_is_strict_json(folder: Path) -> None:
    files = list((folder / "run").rglob("*.json"))
    assert len(files) > 10
    for file in files:
        strict(file.read_text())
    lines = [strict(line) for line in (folder / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "eval"] == [None, None]
    read = [record for record in read_records(folder / "run" / "logs" / "metrics.jsonl") if record["kind"] == "eval"]
    assert all(math.isnan(record["loss"]) for record in read)
    assert math.isnan(read_trainer_state(find_checkpoint(folder / "run"))["report"]["eval_loss"])


def test_such_a_run_is_shown_compared_and_resumed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(folder / "run")
    assert main(["status", run]) == 0
    assert main(["ls", run]) == 0
    assert main(["plot", run, "--out", str(tmp_path / "loss.png")]) == 0
    assert main(["compare", run, run]) == 0
    assert "nan" in capsys.readouterr().out
    shutil.copytree(folder / "run", tmp_path / "run")
    again = settings(folder, total_steps=10, eval_every=2, target_dir=str(tmp_path / "run"))
    assert run_ranks(1, fit, again)[0]["state"] == "done"
    last = [record for record in read_records(tmp_path / "run" / "logs" / "metrics.jsonl") if record["kind"] == "eval"]
    assert math.isfinite(last[-1]["loss"]), "the evaluation of the resumed run counts"
    state = read_trainer_state(find_checkpoint(tmp_path / "run"))
    assert state["report"]["best_eval_step"] == 10


def test_training_falls_back_over_checkpoints_with_damaged_metadata(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for step, name in zip((8, 6, 4), METADATA, strict=False):
        (checkpoints / f"checkpoint-{step:08d}" / name).write_bytes(DEEP)
    assert main(["verify", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().out.count("DAMAGED") == 3
    assert main(["ls", str(tmp_path / "run")]) == 0
    assert main(["status", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert "brackets are nested deeper than 200 levels" in output
    assert output.count("DAMAGED") == 3
    result = run_ranks(1, fit, settings(folder, target_dir=str(tmp_path / "run")))
    assert result[0]["step"] == 8
    aside = sorted(path.name for path in checkpoints.iterdir() if path.name.endswith(".damaged"))
    assert aside == [f"checkpoint-{step:08d}.damaged" for step in (4, 6, 8)]
