"""Check that only what dead processes of this host have left is removed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tinytrain_dist.utils import stale_files as leftovers
from tinytrain_dist.utils.processes import has_ended, process_start_time
from tinytrain_dist.utils.stale_files import (
    describe_leftovers,
    hold_folder,
    owner,
    remove_leftovers,
    scratch_folder,
    temporary_path,
)

OWNERS = ("state.json.{}.tmp", ".my data.new-{}", ".probe-{}-0a", ".probe-{}-0a.tmp", "lock-{}-0a", "lock-stale-{}-0a")
FOLDERS = ("tinytrain-{}-a_b1", "tinytrain-replay-{}-a_b1")
OTHER_FILES = ("state.json", "a.tmp", ".x.new-123", "model-1.2.3", "data.new-a.1.2", "a.tmp.gz")


def make(folder: Path, tag: str) -> set[str]:
    names = {name.format(tag) for name in OWNERS + FOLDERS}
    for name in names:
        if name.startswith("tinytrain-"):
            (folder / name / "inner").mkdir(parents=True)
        else:
            (folder / name).write_text("half")
    return names


def test_what_a_killed_process_left_goes_and_all_else_stays(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pid, started = process.pid, process_start_time(process.pid)
    host = owner().split(".")[0]
    names = make(tmp_path, f"{host}.{pid}.{started}")
    stay = make(tmp_path, f"another-host.{pid}.{started}") | make(tmp_path, owner())
    for name in OTHER_FILES:
        (tmp_path / name).write_text("")
    assert remove_leftovers(tmp_path) == [], "its owner is alive"
    process.kill()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie, as in containers without an init process
    assert has_ended(pid, started)
    removed = remove_leftovers(tmp_path)
    process.communicate()
    assert {path.name for path in removed} == names
    assert {path.name for path in tmp_path.iterdir()} == stay | set(OTHER_FILES)
    assert describe_leftovers(removed).endswith(f"and {len(names) - 3} more")


def test_only_the_leftovers_of_one_file_are_removed_on_request(tmp_path: Path) -> None:
    dead = f"{owner().split('.')[0]}.{2**22 + 5}.1"
    for name in ("a", "b"):
        (tmp_path / f"{name}.{dead}.tmp").write_text("half")
    assert [path.name for path in remove_leftovers(tmp_path, of="a")] == [f"a.{dead}.tmp"]
    assert remove_leftovers(tmp_path / "none") == []


def test_a_folder_that_another_process_holds_stays(tmp_path: Path) -> None:
    folder = tmp_path / f".data.new-{owner().split('.')[0]}.{2**22 + 5}.1"
    folder.mkdir()
    descriptor = hold_folder(folder)
    assert descriptor is not None
    assert remove_leftovers(tmp_path) == []
    os.close(descriptor)
    assert remove_leftovers(tmp_path) == [folder]


def test_names_of_hosts_are_kept_short_and_different(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    for host in ("node-7", "gpu-partition-a-node-0001.cluster", "gpu-partition-a-node-0002.cluster", "ü"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        seen.append(owner().split(".")[0])
        path = temporary_path(tmp_path / "x")
        assert any(pattern.fullmatch(path.name) for pattern in leftovers.PATTERNS)
    assert seen[0] == "node-7"
    assert len(set(seen)) == 4
    assert max(map(len, seen)) <= 20


def test_a_scratch_folder_goes_at_its_end_or_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"tinytrain-{owner().split('.')[0]}.{2**22 + 5}.1-abc"
    left.mkdir()
    with scratch_folder() as first, scratch_folder() as second:
        assert set(tmp_path.iterdir()) == {first, second}
        assert leftovers.is_held(first)
    assert not list(tmp_path.iterdir())
