"""Check the storage checks on one rank without process groups; several ranks: multiprocess/test_storage_checks."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.reliability.storage_checks import check_disk_space, check_host_memory, check_shared_storage

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


def test_buffers_that_no_host_has_are_refused() -> None:
    check_host_memory(1, ALONE)
    with pytest.raises(CheckpointError, match=r"ckpt_async: saving in the background needs .* GB of buffers on here"):
        check_host_memory(2**60, ALONE)
