"""benchmarks/speedrun.py: its recipes are valid, and it trains each for the steps that were asked for."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.helpers.configs import problems_of
from tests.helpers.programs import load_program
from tests.helpers.token_files import save_tokens

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "speedrun.py"


@pytest.fixture(scope="module")
def speedrun() -> ModuleType:
    return load_program(PROGRAM)


def test_recipes_run_with_and_without_a_change(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 64, 4000)
    save_tokens(tmp_path / "train.npy", ids[:3000])
    save_tokens(tmp_path / "val.npy", ids[3000:])
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 64}), encoding="utf-8")
    command = [sys.executable, str(PROGRAM), "--data", str(tmp_path), "--steps", "20", "--seeds", "0"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it finds the checkout itself
    for options, rows in (
        (["--recipes", "baseline,loop"], ["baseline", "loop"]),
        (["--recipes", "quickstart", "--without", "Muon"], ["quickstart", "quickstart without: Muon"]),
    ):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=env, cwd="/")
        assert done.returncode == 0, done.stderr
        table = re.findall(r"^\| ([a-z][\w: ]*) \| 20 \| 40,960 \| ([\d.]+) \(", done.stdout, re.MULTILINE)
        assert [name for name, _ in table] == rows
        assert all(3.5 < float(loss) < 6 for _, loss in table), table  # a uniform guess has ln 64 = 4.16


def test_each_recipe_without_each_change_is_a_valid_configuration(speedrun: ModuleType) -> None:
    for name in ("quickstart", "speedrun"):
        whole = speedrun.recipe(name)
        for change in speedrun.CHANGES:
            settings = whole.without(change).settings
            assert problems_of(train_data=["t.npy"], val_data=["v.npy"], target_dir="r", **settings) == [], change
            assert settings != whole.settings, change


def test_steps_fill_the_minutes_that_start_and_evaluation_leave(
    speedrun: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: object, recipe: object, steps: int, seed: int, folder: str) -> object:
        return speedrun.Outcome(0, 5 + steps / 2)

    monkeypatch.setattr(speedrun, "run", run)
    assert speedrun.steps_in(argparse.Namespace(), speedrun.recipe("baseline"), 10, "") == (600 - 5) * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipes", "cool"], "--recipes: got cool; expected names from baseline, loop, quickstart, speedrun"),
        (["--steps", "2", "--without", "luck"], "--without: got luck; expected all, or of Muon, "),
        (["--steps", "2", "--minutes", "3"], "give either --steps or --minutes"),
        ([], "give either --steps or --minutes"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
