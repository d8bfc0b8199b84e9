"""Check the storage checks on one rank without process groups; several ranks: multiprocess/test_storage_checks."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import CheckpointError, TrainingError
from tinytrain_dist.reliability.storage_checks import (
    check_disk_space,
    check_host_memory,
    check_run_files,
    check_shared_storage,
)

ALONE: Any = SimpleNamespace(
    host="here", is_main=True, broadcast_object=lambda value: value, all_gather_object=lambda value: [value]
)


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    check_shared_storage(tmp_path / "new" / "folder", ALONE)
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/folder: cannot be written on here \(.+\); set another target_dir"):
        check_shared_storage(tmp_path / "file" / "folder", ALONE)


@pytest.mark.parametrize(("existing", "fits"), [(0, False), (2, True), (3, True)])
def test_checkpoints_that_exist_need_no_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: int, fits: bool
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1_500_000))
    if fits:
        check_disk_space(tmp_path, 1_000_000, wanted=3, existing=existing, context=ALONE)
        return
    with pytest.raises(
        CheckpointError, match=r"1\.500 MB is free, but 3\.000 MB more is needed for keep_last \+ 1 = 3"
    ):
        check_disk_space(tmp_path, 1_000_000, wanted=3, existing=existing, context=ALONE)


@pytest.mark.parametrize(
    ("existing", "free", "advice"),
    [(0, 1_500_000, "make room"), (0, 2_500_000, "set keep_last = 1"), (4, 1_500_000, "set keep_last = 4")],
)
def test_a_lower_keep_last_is_advised_if_it_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: int, free: int, advice: str
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free))
    with pytest.raises(CheckpointError) as caught:
        check_disk_space(tmp_path, 1_000_000, wanted=10, existing=existing, context=ALONE)
    assert str(caught.value).endswith(advice)
    if keep_last := advice.partition("keep_last = ")[2]:
        check_disk_space(tmp_path, 1_000_000, wanted=int(keep_last) + 1, existing=existing, context=ALONE)
        with pytest.raises(CheckpointError):
            check_disk_space(tmp_path, 1_000_000, wanted=int(keep_last) + 2, existing=existing, context=ALONE)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_file(path: Path) -> None:
    path.write_text("")


def make_dead_link(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


FOLDER, FILE, PIPE, LINK = (make_folder, "a folder"), (make_file, "a file"), (os.mkfifo, "a named pipe"), make_dead_link


@pytest.mark.parametrize(
    ("name", "obstacle"),
    [
        *((name, FOLDER) for name in ("config.toml", "environment.json", "state.json", "error.json", "stop")),
        *((name, how) for name in ("lock.json", "logs/metrics.jsonl") for how in (FOLDER, PIPE)),
        *((name, how) for name in ("logs/metrics.replaced.jsonl",) for how in (FOLDER, PIPE)),
        ("logs/ending.json", FOLDER),
        *(("logs", how) for how in (FILE, PIPE, (LINK, "a link to nothing"))),
    ],
)
def test_what_is_in_the_way_of_a_file_of_the_run_is_named(tmp_path: Path, name: str, obstacle: Any) -> None:
    make, kind = obstacle
    config = TrainingConfig(target_dir=str(tmp_path / "run"))
    check_run_files(config, ALONE)
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    check_run_files(config, ALONE)
    make(path)
    with pytest.raises(CheckpointError) as caught:
        check_run_files(config, ALONE)
    needed = "a folder" if name == "logs" else "a file"
    text = f"{path}: is {kind}, but the run needs {needed} there; move it away, or set another target_dir"
    assert str(caught.value) == text
    path.rename(tmp_path / "away")
    check_run_files(config, ALONE)


def test_logs_elsewhere_are_named_with_their_setting(tmp_path: Path) -> None:
    (tmp_path / "logs" / "mine.jsonl").mkdir(parents=True)
    places = {"target_dir": str(tmp_path / "run"), "log_dir": str(tmp_path / "logs")}
    check_run_files(TrainingConfig(**places), ALONE)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"mine\.jsonl: is a folder, .* set another log_dir"):
        check_run_files(TrainingConfig(**places, log_save_prefix="mine"), ALONE)  # type: ignore[arg-type]


def test_what_a_run_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("config.toml", "state.json", "lock.json", "stop", "logs/metrics.jsonl"):
        make_file(tmp_path / name)
    check_run_files(TrainingConfig(target_dir=str(tmp_path)), ALONE)


def test_buffers_that_no_host_has_are_refused() -> None:
    check_host_memory(1, ALONE)
    with pytest.raises(CheckpointError, match=r"ckpt_async: saving in the background needs .* GB of buffers on here"):
        check_host_memory(2**60, ALONE)
    check_host_memory(1, ALONE, "activation_offload")
    with pytest.raises(TrainingError, match=r"activation_offload: keeping inputs of blocks on the host needs .* GB of"):
        check_host_memory(2**60, ALONE, "activation_offload")
