"""benchmarks/long_context.py: what its windows ask, and that an extended model finds keys in the whole window."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.helpers.programs import load_program

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "long_context.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_program(PROGRAM)


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it finds the checkout itself
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False, env=env, cwd="/"
    )


def test_every_question_has_one_answer_anywhere_in_the_window(benchmark: ModuleType, tmp_path: Path) -> None:
    task, length = benchmark.Task(facts=10), 100
    benchmark.write_windows(tmp_path / "a.npy", task, windows=200, context_len=length, seed=[1])
    ids = np.load(tmp_path / "a.npy").astype(np.int64).reshape(200, length + 1)
    counted = np.load(tmp_path / "a.mask.npy").reshape(200, length + 1)
    assert np.load(tmp_path / "a.documents.npy").tolist() == list(range(0, 200 * 101, 101))
    assert ids.max() < task.vocab_size
    distances = []
    for window, counts in zip(ids, counted, strict=True):
        assert np.flatnonzero(counts).tolist() == task.answers(length).tolist() == list(range(82, 101, 2))
        for answer, distance in zip(task.answers(length), task.distances(window), strict=True):
            key = window[answer - 1]
            assert window[answer - 1 - distance] == key
            assert window[answer - distance] == window[answer] >= task.fillers + task.keys
            assert np.flatnonzero(window == key).tolist() == [answer - 1 - distance, answer - 1]
        distances += task.distances(window).tolist()
    assert min(distances) <= 4
    assert max(distances) >= 96
    assert len({bytes(window) for window in ids}) == 200


@pytest.mark.multiprocess
def test_an_extended_model_finds_keys_in_the_whole_window(tmp_path: Path) -> None:
    small = ("--context-len", "64", "--facts", "8", "--batch-size", "32", "--extension-steps", "60")
    done = start(*small, "--windows", "64", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    shares = {}
    for what, cells in re.findall(r"^\| (\w[^|]*) \|(.*)\|$", done.stdout, re.MULTILINE)[1:]:
        shares[what] = [float(cell) for cell in cells.split("|") if cell.strip()]
    short, long, _, extended = shares.values()
    assert list(shares)[-1] == "extended, windows of 256"
    assert (len(short), len(long), len(extended)) == (2, 8, 8), done.stdout
    assert min(short) > 0.9, done.stdout
    assert min(extended) > 0.9, done.stdout
    assert long[-1] < min(extended) - 0.1, done.stdout  # with the positions of short windows
    assert "each sequence on 2 ranks with 128 tokens each" in done.stdout


@pytest.mark.parametrize("facts", ["0", "257"])
def test_a_number_of_facts_that_cannot_be_is_named(facts: str) -> None:
    done = start("--facts", facts)
    assert done.returncode == 2
    assert f"--facts: got {facts}; expected 1 to 256" in done.stderr
