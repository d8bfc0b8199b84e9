"""A run that hangs ends within its limits, and its error names the rank that the others wait for."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.helpers.ranks import AGENT, REPOSITORY, training_process
from tests.helpers.training import config_file

ENDLESS = {"total_steps": 100_000, "ckpt_every": 100_000, "eval_every": 100_000, "log_every": 5}


HANGING = f"""
import os, sys, threading
sys.path.insert(0, {str(REPOSITORY)!r})
from tinytrain_dist.reliability import stop_requests
stop_requests.install_signal_handlers()
from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.launch import rank_program
read, calls = TokenDataset.read, []
def read_or_hang(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 9:
        threading.Event().wait()
    return read(*arguments)
TokenDataset.read = read_or_hang
sys.exit(rank_program.main(sys.argv[1:]))
"""


@pytest.mark.multiprocess
def test_a_rank_that_hangs_is_named_and_every_rank_leaves_its_stacks(tmp_path: Path) -> None:
    config = config_file(tmp_path, **ENDLESS, step_limit=10)
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    with training_process([config], 2, tmp_path, launcher=AGENT, script=script) as running:
        assert running.wait(120) == 1, running.output()
        last = running.output().rstrip().splitlines()[-1]
    cause = json.loads((tmp_path / "run" / "error.json").read_text())
    assert last == f"error: {cause['message']}"
    assert f"all wait for rank 1 on {socket.gethostname()} (data after step " in last
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "failed"
    stacks = tmp_path / "run" / "logs" / "stacks"
    assert "in read_or_hang" in (stacks / "rank-00001.txt").read_text()
    assert "in forward_backward" in (stacks / "rank-00000.txt").read_text()


@pytest.mark.multiprocess
def test_a_stopped_process_is_named_by_the_others(tmp_path: Path) -> None:
    config = config_file(tmp_path, **ENDLESS, step_limit=10)
    with training_process([config], 2, tmp_path, launcher=AGENT) as running:
        running.wait_for_output("step 5/")
        pid = json.loads((tmp_path / "run" / "logs" / "heartbeat" / "rank-00001.json").read_text())["pid"]
        os.kill(pid, signal.SIGSTOP)
        assert running.wait(120) == 1, running.output()
        last = running.output().rstrip().splitlines()[-1]
    assert "all wait for rank 1 on" in last
    assert ": no heartbeat since then; stacks are in" in last
    assert " for 10 s (step_limit); " in last
    assert last.startswith("error: rank 0 on ")
    assert json.loads((tmp_path / "run" / "error.json").read_text())["message"] in last


@pytest.mark.multiprocess
@pytest.mark.parametrize("end", ["limit", "signal"])
def test_a_rank_that_waits_to_join_ends_at_its_limit_or_at_a_signal(tmp_path: Path, end: str) -> None:
    """The main thread is blocked in native code, because no other rank joins."""
    config = config_file(tmp_path, start_limit=2 if end == "limit" else 600)
    script = tmp_path / "alone.py"
    script.write_text(
        "import os, socket, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "with socket.socket() as free:\n"
        "    free.bind(('127.0.0.1', 0))\n"
        "    port = free.getsockname()[1]\n"
        "os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2', LOCAL_WORLD_SIZE='1', MASTER_ADDR='127.0.0.1')\n"
        "os.environ.update(MASTER_PORT=str(port), TINYTRAIN_ATTEMPT='7')\n"
        "[os.environ.pop(name) for name in list(os.environ) if name.startswith('TORCHELASTIC')]\n"
        "from tinytrain_dist.reliability import stop_requests\n"
        "stop_requests.install_signal_handlers()\n"
        "from tinytrain_dist.launch.rank_program import main\n"
        "main(sys.argv[1:])\n"
    )
    heartbeat = tmp_path / "run" / "logs" / "heartbeat" / "rank-00000.json"
    with training_process([config], 1, tmp_path, launcher=AGENT, script=script) as running:
        if end == "limit":
            assert running.wait(120) == 1
            assert "rank(s) 1 of 2 never wrote a heartbeat" in running.output()
            assert "join" in (tmp_path / "run" / "logs" / "stacks" / "rank-00000.txt").read_text()
            return
        deadline = time.monotonic() + 120
        while not heartbeat.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.wait(60) == 0, running.output()
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "preempted"
