"""Owns that a run which hangs ends within its limits, and says who everyone waits for; and the heartbeats it reads."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import AGENT, REPOSITORY, training_process
from tests.helpers.training import config_file
from tinytrain_dist.reliability.watchdog import describe_waiting, read_heartbeats

ENDLESS = {"total_steps": 100_000, "ckpt_every": 100_000, "eval_every": 100_000, "log_every": 5}
HANGING = f"""
import os, sys, threading
sys.path.insert(0, {str(REPOSITORY)!r})
from tinytrain_dist.reliability import stop_requests
stop_requests.install_signal_handlers()
from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.launch import worker
read, calls = TokenDataset.read, []
def read_or_hang(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 9:
        threading.Event().wait()
    return read(*arguments)
TokenDataset.read = read_or_hang
sys.exit(worker.main(sys.argv[1:]))
"""


def beat(rank: int, step: int = 5, phase: str = "reduction", seen: float = 100.0) -> dict[str, Any]:
    return {"rank": rank, "host": f"node{rank}", "world_size": 3, "step": step, "phase": phase, "seen": seen}


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ([beat(0), beat(1, phase="data"), beat(2)], "all wait for rank 1 on node1 (data after step 5)"),
        ([beat(0), beat(1), beat(2, step=4, phase="optimizer")], "all wait for rank 2 on node2 (optimizer"),
        (
            [beat(0, 6, "data"), beat(1, 6, "reading"), beat(2, 6, "checkpoint")],
            "all wait for rank 1 on node1 (reading",
        ),
        ([beat(0), beat(1, seen=9.0), beat(2)], "heartbeat of rank 1 on node1 (reduction after step 5): no sign"),
        ([beat(0), beat(2)], "rank(s) 1 of 3 never gave a sign of life"),
        ([beat(0), beat(1), beat(2)], "all 3 rank(s) are in reduction after step 5"),
    ],
)
def test_who_is_waited_for(beats: list[dict[str, Any]], expected: str) -> None:
    assert expected in describe_waiting(beats, 3, since=50.0)


def test_torn_heartbeats_and_those_of_a_larger_run_before_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "heartbeat"
    folder.mkdir(parents=True)
    for rank in (0, 1, 7):
        (folder / f"rank-{rank:05d}.json").write_text(json.dumps(beat(rank)))
    (folder / "rank-00002.json").write_text('{"rank": 2, "pha')
    assert [found["rank"] for found in read_heartbeats(tmp_path)] == [0, 1]
    assert read_heartbeats(tmp_path / "gone") == []


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
    assert "all wait for a heartbeat of rank 1 on" in last
    assert last.startswith("error: rank 0 on ")
    assert json.loads((tmp_path / "run" / "error.json").read_text())["message"] in last


@pytest.mark.multiprocess
@pytest.mark.parametrize("end", ["limit", "signal"])
def test_a_rank_that_waits_to_join_ends_at_its_limit_or_at_a_signal(tmp_path: Path, end: str) -> None:
    """The main thread sits in native code all the time: nobody else joins."""
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
        "from tinytrain_dist.launch.worker import main\n"
        "main(sys.argv[1:])\n"
    )
    heartbeat = tmp_path / "run" / "logs" / "heartbeat" / "rank-00000.json"
    with training_process([config], 1, tmp_path, launcher=AGENT, script=script) as running:
        if end == "limit":
            assert running.wait(120) == 1
            assert "rank(s) 1 of 2 never gave a sign of life" in running.output()
            assert "join" in (tmp_path / "run" / "logs" / "stacks" / "rank-00000.txt").read_text()
            return
        deadline = time.monotonic() + 120
        while not heartbeat.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.wait(60) == 0, running.output()
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "preempted"
