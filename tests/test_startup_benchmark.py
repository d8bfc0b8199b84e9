"""benchmarks/startup.py: its quick run prints a table and writes a file, in which the parts of a start are measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "startup.py"


@pytest.mark.slow
def test_a_quick_run_prints_and_writes_the_parts_of_a_start(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it finds the checkout itself
    command = [sys.executable, str(PROGRAM), "--quick", "--json", str(tmp_path / "turns.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    (case,) = json.loads((tmp_path / "turns.json").read_text(encoding="utf-8"))
    (turn,) = case["turns"]
    assert (case["system"], case["ranks"]) == ("eager", 1)
    assert turn["parts"]["imports"] > 0
    assert 0 < sum(turn["parts"].values()) <= turn["total"] + 0.1
    assert f"| eager | 1 | {turn['total']:.1f} s (" in done.stdout


def test_unknown_systems_are_named() -> None:
    command = [sys.executable, str(PROGRAM), "--systems", "eager,cool"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--systems: got cool; expected names from torchrun-eager, eager, warm, cold, hf" in done.stderr
