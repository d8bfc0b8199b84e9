"""Check which lock is taken over and which is respected, on one rank without process groups."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.reliability import run_lock
from tinytrain_dist.reliability.run_lock import RunLock
from tinytrain_dist.utils import waiting
from tinytrain_dist.utils.processes import process_start_time

ALONE: Any = SimpleNamespace(host="here", is_main=True, broadcast_object=lambda value: value)


def write_lock(folder: Path, **record: Any) -> Path:
    path = folder / "lock.json"
    path.write_text(json.dumps({"host": "here", "pid": os.getppid(), "job": None, **record}))
    return path


def test_a_lock_is_there_until_it_is_released(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path, ALONE)
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert not lock.taken_over()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_live_process_is_respected(tmp_path: Path) -> None:
    write_lock(tmp_path, started=process_start_time(os.getppid()))
    message = rf"process {os.getppid()} on here is already training in this folder; stop it, or"
    with pytest.raises(CheckpointError, match=message):
        RunLock.acquire(tmp_path, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]


def test_a_lock_of_an_earlier_world_of_the_same_run_is_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node was lost or is cut off. Without this, the others would wait for two minutes."""
    alive = {"started": process_start_time(os.getppid()), "session": "a", "round": 3}
    write_lock(tmp_path, host="elsewhere", **alive)
    monkeypatch.setenv("TINYTRAIN_WORLD", '{"session": "a", "round": 4, "ready": 1.0}')
    lock = RunLock.acquire(tmp_path, ALONE)
    assert not lock.taken_over()
    write_lock(tmp_path, host="elsewhere", **{**alive, "round": 5})
    assert lock.taken_over(), "the node that was cut off must not write any more"
    write_lock(tmp_path, **{**alive, "session": "b"})
    with pytest.raises(CheckpointError, match="is already training in this folder"):
        RunLock.acquire(tmp_path, ALONE)


def test_checkpoints_of_one_name_are_saved_by_one_run_only(tmp_path: Path) -> None:
    mine, other, shared = (tmp_path / name for name in ("mine", "other", "shared"))
    for folder in (mine, other, shared):
        folder.mkdir()
    path = write_lock(shared, started=process_start_time(os.getppid()), run=str(other))
    path.rename(shared / "model.lock.json")
    message = rf"shared: process {os.getppid()} on here already saves checkpoints of this name here for the run {other}"
    with pytest.raises(CheckpointError, match=message):
        RunLock.acquire(mine, ALONE, (shared, "model"))
    assert list(mine.iterdir()) == [], "none is taken, or all"
    assert [path.name for path in shared.iterdir()] == ["model.lock.json"]
    lock = RunLock.acquire(mine, ALONE, (shared, "other"))
    taken = [json.loads(path.read_text())["run"] for path in (mine / "lock.json", shared / "other.lock.json")]
    assert taken == [str(mine)] * 2
    lock.release()
    assert list(mine.iterdir()) == []
    assert [path.name for path in shared.iterdir()] == ["model.lock.json"]


def test_a_step_of_the_same_slurm_job_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: os.utime(tmp_path / "model.lock.json"))
    path = write_lock(tmp_path, host="elsewhere", started="1", job="77", run="/other")
    path.rename(tmp_path / "model.lock.json")
    with pytest.raises(CheckpointError, match="on elsewhere already saves"):
        RunLock.acquire(tmp_path, ALONE, (tmp_path, "model"))


def test_a_file_system_without_hard_links_or_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(run_lock.os, "link", refuse)
    lock = RunLock.acquire(tmp_path, ALONE)
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    write_lock(tmp_path, started=process_start_time(os.getppid()))
    with pytest.raises(CheckpointError, match="is already training in this folder"):
        RunLock.acquire(tmp_path, ALONE)
    lock.release()
    with pytest.raises(CheckpointError, match=r"lock\.json: cannot be written \(Not a directory\); free disk space"):
        RunLock.acquire(tmp_path / "lock.json", ALONE)


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_lock(tmp_path, pid=dead.pid, started="1")
    RunLock.acquire(tmp_path, ALONE).release()


def test_a_lock_that_was_taken_over_is_not_removed(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path, ALONE)
    write_lock(tmp_path, host="elsewhere", started="1")
    assert lock.taken_over()
    lock.release()
    assert (tmp_path / "lock.json").exists()


def test_a_lock_of_another_host_becomes_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.5)
    monkeypatch.setattr(waiting, "FIRST_NOTICE_SECONDS", 0.0)
    path = write_lock(tmp_path, host="elsewhere", started="1", pid=17)
    lock = RunLock.acquire(tmp_path, ALONE)
    lock.release()
    said = capsys.readouterr().out
    assert said.startswith(f"waiting for a sign that process 17 on elsewhere, which holds the lock {path}, is alive; ")
    assert said.count("\n") == 1
    assert lock.waited_seconds >= 1.0, "it does not count as training time"


def test_a_process_is_distinguished_from_an_earlier_one_with_its_id() -> None:
    assert process_start_time(os.getpid()) == process_start_time(os.getpid())
    assert process_start_time(os.getpid()) is not None
    assert process_start_time(2**22 + 5) is None
