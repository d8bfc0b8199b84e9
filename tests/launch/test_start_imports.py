"""Check what ranks import until they end, and that the parts of a start add up. Each rank is a real process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.run_log import records
from tests.helpers.training import config_file, write_tokens
from tinytrain_dist.metrics.phase_timer import EARLIER_PHASES, START_PHASES
from tinytrain_dist.reliability.start_times import earlier_seconds

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).resolve().parents[2]
# What takes long to import and is for runs that compile, shard or draw, or for other programs.
UNNEEDED = set(
    """torch._dynamo torch._inductor torch.distributed.fsdp torch.distributed.tensor torch.distributed.checkpoint sympy
    tyro typeguard rich matplotlib transformers tokenizers wandb mlflow pandas triton""".split()
)
RANK = """
import os, sys
end = os._exit  # with which a rank ends
def list_modules_and_end(code):
    with open(f"modules-{os.environ['RANK']}", "w") as file:
        file.write("\\n".join(sys.modules))
    end(code)
os._exit = list_modules_and_end
from tinytrain_dist.train import main
main()
"""


def test_an_eager_ddp_run_imports_neither_compiler_nor_fsdp_and_its_start_adds_up(tmp_path: Path) -> None:
    settings = write_tokens(tmp_path) | {"target_dir": str(tmp_path / "run"), "device": "cpu", "compile": False}
    config = config_file(tmp_path, **settings, parallel="ddp", total_steps=2, trackers=["tensorboard"])
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    began = time.monotonic()
    done = subprocess.run(
        [*torchrun, "rank.py", config],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr

    for rank in (0, 1):
        modules = set((tmp_path / f"modules-{rank}").read_text(encoding="utf-8").split())
        assert {"torch", "tinytrain_dist.training.trainer"} <= modules
        assert modules & UNNEEDED == set(), "import it in the function that needs it"
        assert ("tensorboard" in modules) == (rank == 0)

    (record,) = [r for r in records(tmp_path / "run" / "logs" / "metrics.jsonl") if r["kind"] == "first_step"]
    parts = record["start_seconds"]
    assert record["step"] == 1
    assert list(parts) == [*EARLIER_PHASES, *START_PHASES, "first_step"]
    assert all(parts[name] > 0 for name in ("launch", "imports", "join", "build", "first_step"))
    assert 0 < sum(parts.values()) <= seconds + 0.1, "a process's start time is known to 10 ms"
    assert f"step 1: {record['text']}\n" in done.stdout
    assert f"first step after {sum(parts.values()):.1f} s: launch {parts['launch']:.1f}, " in record["text"]


def test_a_restart_in_place_does_not_count_the_life_of_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINYTRAIN_AGENT", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert list(earlier_seconds()) == ["imports"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert list(earlier_seconds()) == ["launch", "imports"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert list(earlier_seconds()) == ["imports"]
    note = tmp_path / "run"
    monkeypatch.setenv("TINYTRAIN_AGENT", str(note))
    assert list(earlier_seconds()) == ["launch", "imports"]
    note.write_text("the ranks of this agent have joined before", encoding="utf-8")
    assert list(earlier_seconds()) == ["imports"]
