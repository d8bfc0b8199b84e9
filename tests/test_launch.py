"""Owns what tinytrain_dist.agent adds to torchrun: signals that save, one sentence at the end, restarts that work."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from distributed_helper import AGENT, launch_training, training_process
from training import Run, settings_for

pytestmark = pytest.mark.multiprocess


def config_file(folder: Path, **overrides: object) -> str:
    settings = settings_for(folder, "run", parallel="ddp", **overrides)
    path = folder / "run.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return str(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_agent_saves_and_ends_well(tmp_path: Path, number: signal.Signals) -> None:
    config = config_file(tmp_path, total_steps=100_000, ckpt_every=100_000, log_every=5)
    with training_process([config], 2, tmp_path, launcher=AGENT) as running:
        running.wait_for_output("step 5/")
        os.kill(running.process.pid, number)
        assert running.wait(60) == 0, running.output()
        assert "Traceback" not in running.output()
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["state"] == "preempted"
    assert Run(tmp_path / "run").checkpoint.name == f"checkpoint-{state['step']:08d}"


def test_killed_rank_ends_the_others_and_is_the_last_word(tmp_path: Path) -> None:
    config = config_file(tmp_path, total_steps=100_000, ckpt_every=100_000, log_every=5)
    with training_process([config], 2, tmp_path, launcher=AGENT) as running:
        running.wait_for_output("step 5/")
        os.kill(running.worker_pids()[1], signal.SIGKILL)
        assert running.wait(60) == 128 + signal.SIGKILL
        last = running.output().rstrip().splitlines()[-1]
    assert last.startswith("error: rank ")
    assert "was killed by SIGKILL, after step " in last


def test_restart_in_place_resumes_from_the_newest_checkpoint(tmp_path: Path) -> None:
    config = config_file(tmp_path, total_steps=60, ckpt_every=5, eval_every=1000, log_every=5)
    with training_process([config], 2, tmp_path, launcher=AGENT, torchrun_args=["--max-restarts=2"]) as running:
        running.wait_for_output("checkpoint-00000005")
        os.kill(running.worker_pids()[0], signal.SIGKILL)
        assert running.wait(120) == 0, running.output()
    assert Run(tmp_path / "run").values("resumed", "text")
    assert json.loads((tmp_path / "run" / "state.json").read_text()) == {"state": "done", "step": 60}


def test_users_mistake_is_said_once_and_last(tmp_path: Path) -> None:
    done = launch_training(["--train-data", "x.npy", "--vocab-size", "9"], 2, tmp_path, launcher=AGENT)
    assert done.returncode == 2
    assert done.stdout.count("x.npy: no such token file") == 1
    assert done.stdout.rstrip().splitlines()[-1].startswith("error: x.npy")
    assert "Traceback" not in done.stdout
