"""own_model.py: with DDP and with FSDP, a run that was stopped and resumed has the bits of an uninterrupted one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.programs import EXAMPLES, load_example
from tests.helpers.ranks import AGENT, run_ranks

pytestmark = pytest.mark.multiprocess
STEPS = 12


def train(mode: str, folder: Path, *options: str) -> None:
    """Run the example on this rank."""
    sys.argv = ["own_model.py", "--mode", mode, "--steps", str(STEPS), "--folder", str(folder), *options]
    load_example("own_model").main()


def stop_and_resume(mode: str, folder: Path, expected: Path) -> None:
    """Run the example three times on this rank: to its end, up to a step that is no multiple of 10, and on."""
    train(mode, expected)
    train(mode, folder, "--stop-at", "5")
    train(mode, folder)


def files(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_resumed_run_has_the_same_bits(mode: str, tmp_path: Path) -> None:
    run_ranks(2, stop_and_resume, mode, tmp_path / "resumed", tmp_path / "expected")
    names = {run: sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("resumed", "expected")}
    assert names == {
        "resumed": ["step-000005", "step-000010", "step-000012"],
        "expected": ["step-000010", "step-000012"],
    }
    assert files(tmp_path / "resumed" / "step-000012") == files(tmp_path / "expected" / "step-000012")
    assert (
        files(tmp_path / "expected" / "step-000010")["manifest.json"]
        != files(tmp_path / "expected" / "step-000012")["manifest.json"]
    )


def test_it_learns_under_the_launcher(tmp_path: Path) -> None:
    command = [sys.executable, *AGENT, "--standalone", "--nproc_per_node", "2", str(EXAMPLES / "own_model.py")]
    options = ["--mode", "fsdp", "--steps", "20", "--folder", str(tmp_path / "run")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", done.stdout)]
    assert len(losses) == 4, done.stdout
    assert losses[-1] < 1.0 < losses[0]
    assert "done at step 20: " in done.stdout
    assert "Warning" not in done.stderr
