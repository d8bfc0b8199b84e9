"""`tinytrain status`: what it reports of runs that are alive, have ended or died, from their files alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tinytrain_dist.cli import main, status
from tinytrain_dist.cli.status import SILENT_SECONDS, Status, lines_of, read_status
from tinytrain_dist.config.run_folder import RunFolder

NOW = 1_000_000.0


def run_folder(
    folder: Path, state: str = "running", pids: tuple[int, ...] = (), seen: float = NOW, **beat: Any
) -> RunFolder:
    """A run of 100 steps that logged steps 10 and 20 by NOW - 100 and NOW - 50, 4 s each, and saved step 10."""
    (folder / "logs" / "heartbeat").mkdir(parents=True)
    (folder / "config.toml").write_text("[run]\ntotal_steps = 100\n")
    (folder / "state.json").write_text(json.dumps({"state": state, "step": 0}))
    speed = {"tokens_per_second": 512.0, "step_seconds": 4.0}
    records = [
        {"kind": "train", "step": 10, "time": NOW - 100, "loss": 3.0, **speed},
        {"kind": "restarted", "step": 10, "time": NOW - 90, "text": "restarted, because rank 1 was killed"},
        {"kind": "train", "step": 20, "time": NOW - 50, "loss": 2.5, **speed},
        {"kind": "eval", "step": 20, "time": NOW - 49, "loss": 2.75},
    ]
    torn = '{"kind": "train", "step": 30, "ti'
    (folder / "logs" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + torn)
    (folder / "checkpoints" / "checkpoint-00000010").mkdir(parents=True)
    for rank, pid in enumerate(pids):
        path = folder / "logs" / "heartbeat" / f"rank-{rank:05d}.json"
        values = {"rank": rank, "world_size": len(pids), "host": socket.gethostname(), "pid": pid, "step": 25}
        values |= {"phase": "reduction" if rank else "data", "seconds": 7.0, **beat}
        path.write_text(json.dumps(values))
        os.utime(path, (seen, seen))
    run = RunFolder.at(folder)
    assert run is not None
    return run


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_running_run(tmp_path: Path) -> None:
    found = read_status(run_folder(tmp_path, pids=(os.getpid(), os.getpid())), NOW)
    lines = lines_of(found)
    assert (found.state, found.step, found.alive) == ("running", 25, True)
    assert lines["progress"] == "step 25 of 100 (25 %), about 5 min left"
    assert lines["checkpoint"].startswith("checkpoint-00000010, ")
    assert lines["checkpoint"].endswith("15 step(s) ago")
    assert lines["loss"] == "2.5000 at step 20, eval 2.7500 at step 20"
    assert lines["speed"] == "512 tokens/s, 4 s per step"
    assert (lines["restarts"], lines["  step 10"]) == ("1", "restarted, because rank 1 was killed")
    assert lines["waiting"] == f"all wait for rank 0 on {socket.gethostname()} (data after step 25)"


def test_goodput_is_the_share_of_time_in_steps_that_count(tmp_path: Path) -> None:
    found = read_status(run_folder(tmp_path, pids=(os.getpid(),)), NOW)
    assert found.goodput == pytest.approx(10 * 4.0 / 100)
    dead = read_status(run_folder(tmp_path / "dead"), NOW)
    assert dead.goodput == pytest.approx(10 * 4.0 / 51), "a dead run ends at its last heartbeat or record"


@pytest.mark.parametrize(
    ("state", "pids", "age", "expected"),
    [
        ("running", "alive", 0.0, "running"),
        ("preempted", "alive", 0.0, "running"),
        ("running", "alive", SILENT_SECONDS + 1, "dead"),
        ("running", "gone", 0.0, "dead"),
        ("running", "none", 0.0, "dead"),
        ("preempted", "none", 0.0, "preempted"),
        ("done", "none", 0.0, "done"),
        ("failed", "gone", 0.0, "failed"),
    ],
)
def test_the_name_of_the_state(tmp_path: Path, state: str, pids: str, age: float, expected: str) -> None:
    pid = {"alive": (os.getpid(),), "gone": (dead_pid(),), "none": ()}[pids]
    assert read_status(run_folder(tmp_path, state, pid), NOW + age).state == expected


def test_a_failed_run_is_reported_with_its_cause_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path / "failed", "failed", (dead_pid(),))
    (tmp_path / "failed" / "error.json").write_text(json.dumps({"message": "rank 3 on node7: it broke"}))
    assert main.main(["status", str(tmp_path / "failed")]) == 1
    assert "failed: rank 3 on node7: it broke" in capsys.readouterr().out
    run_folder(tmp_path / "dead", "running", (dead_pid(),), time.time())
    assert main.main(["status", str(tmp_path / "dead"), "--watch"]) == 1
    assert "ended without reporting an error" in capsys.readouterr().out
    run_folder(tmp_path / "done", "done")
    assert main.main(["status", str(tmp_path / "done")]) == 0
    assert main.main(["status", str(tmp_path / "nothing")]) == 2


def test_an_empty_folder_of_a_run_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    assert main.main(["status", str(tmp_path)]) == 1
    assert "none yet" in capsys.readouterr().out


def test_watch_looks_until_the_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder(tmp_path, pids=(os.getpid(),), seen=time.time())
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            (tmp_path / "state.json").write_text('{"state": "done", "step": 100}')
            (tmp_path / "logs" / "heartbeat" / "rank-00000.json").unlink()

    monkeypatch.setattr(status.time, "sleep", nap)
    assert main.main(["status", str(tmp_path), "--watch"]) == 0
    assert len(naps) == 2


def test_of_many_ranks_those_that_are_behind_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path, pids=(os.getpid(),) * 40, seen=time.time())
    path = tmp_path / "logs" / "heartbeat" / "rank-00033.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 7, "host": "slow-node"}))
    assert main.main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "all wait for rank 33 on slow-node" in out
    assert out.count("slow-node") == 2, "in the table too"
    assert "and 24 more ranks that are at least as far" in out


def test_it_needs_no_torch() -> None:
    code = "import sys, tinytrain_dist.cli.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_not_known_is_not_printed() -> None:
    nothing = Status("dead", "", 0, 0, None, [], [], None, NOW, False, 0.0)
    said = {name: text for name, text in lines_of(nothing).items() if text}
    assert said == {"state": "dead", "progress": "step 0 of ?", "checkpoint": "none yet"}
