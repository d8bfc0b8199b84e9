"""Listing, setting aside and deleting checkpoints on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tinytrain_dist.checkpoint.checkpoint_folder import CheckpointFolder
from tinytrain_dist.checkpoint.manifest import Manifest, commit_folder, write_json_file
from tinytrain_dist.checkpoint.retention import RetentionRules


@pytest.fixture
def warnings() -> list[str]:
    return []


def write_checkpoint(path: Path) -> None:
    manifest = Manifest()
    unfinished = path.with_name("unfinished")
    unfinished.mkdir(parents=True)
    write_json_file(unfinished, "trainer_state.json", {"config": {}}, manifest)
    commit_folder(unfinished, path, manifest)


@pytest.fixture
def checkpoints(tmp_path: Path, warnings: list[str]) -> CheckpointFolder:
    folder = CheckpointFolder(tmp_path / "checkpoints", "run", warnings.append)
    for name in ("run-00000002", "run-99999999", "run-100000000", "run-00000004.tmp", "run-00000003.damaged"):
        write_checkpoint(folder.directory / name)
    for name in ("other-00000001", "run-0001", "notes"):
        (folder.directory / name).mkdir()
    return folder


def names(folder: CheckpointFolder) -> list[str]:
    return [path.name for path in folder.committed()]


def test_committed_checkpoints_are_listed_by_step(checkpoints: CheckpointFolder, tmp_path: Path) -> None:
    assert names(checkpoints) == ["run-00000002", "run-99999999", "run-100000000"]
    assert checkpoints.path(99_999_999) == checkpoints.committed()[1]
    assert CheckpointFolder(tmp_path / "missing", "run", pytest.fail).committed() == []


def test_only_half_written_folders_of_this_run_are_removed(checkpoints: CheckpointFolder) -> None:
    for name in ("other-00000004.tmp", "run-a-00000004.tmp", "run-notes.tmp", "run-4.tmp"):
        (checkpoints.directory / name).mkdir()
    before = {path.name for path in checkpoints.directory.iterdir()}
    checkpoints.remove_leftovers()
    assert before - {path.name for path in checkpoints.directory.iterdir()} == {"run-00000004.tmp"}


def test_damaged_checkpoints_get_names_of_their_own(checkpoints: CheckpointFolder, warnings: list[str]) -> None:
    path = checkpoints.path(2)
    (checkpoints.directory / "run-00000002.damaged-3").mkdir()  # the first two were deleted
    for name in ("run-00000002.damaged", "run-00000002.damaged-2", "run-00000002.damaged-4"):
        path.mkdir(exist_ok=True)
        checkpoints.set_aside(path, ["first", "second"])
        assert (checkpoints.directory / name).is_dir()
        assert not path.exists()
        assert warnings.pop() == f"damaged checkpoint, renamed to {name}: first; second"


def test_a_damaged_checkpoint_that_cannot_be_renamed_is_reported(
    checkpoints: CheckpointFolder, warnings: list[str]
) -> None:
    checkpoints.set_aside(checkpoints.path(77), ["it is gone"])
    assert warnings[1:] == [f"{checkpoints.path(77)} could not be renamed (No such file or directory); it is skipped"]


def test_old_checkpoints_are_deleted(checkpoints: CheckpointFolder, warnings: list[str]) -> None:
    checkpoints.delete_old(RetentionRules(keep_last=1, best_step=2))
    assert names(checkpoints) == ["run-00000002", "run-100000000"]
    assert not checkpoints.path(99_999_999).with_name("run-99999999.tmp").exists()
    assert warnings == []


def test_a_checkpoint_that_cannot_be_deleted_is_reported_and_the_others_are_deleted(
    checkpoints: CheckpointFolder, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shutil.rmtree

    def rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "run-00000002.tmp":
            raise OSError(5, "Input/output error")
        plain(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    checkpoints.delete_old(RetentionRules(keep_last=1))
    assert names(checkpoints) == ["run-100000000"], "the first one has lost its final name as well"
    (warning,) = warnings
    assert "run-00000002 could not be deleted" in warning
    assert "Input/output error" in warning


def test_a_checkpoint_whose_settings_cannot_be_read_is_not_deleted(checkpoints: CheckpointFolder) -> None:
    (checkpoints.path(2) / "trainer_state.json").write_text("")
    checkpoints.delete_old(RetentionRules(keep_last=1))
    assert names(checkpoints) == ["run-00000002", "run-100000000"]


def test_damaged_checkpoints_do_not_count_as_kept(checkpoints: CheckpointFolder) -> None:
    rules = RetentionRules(keep_last=2, best_step=99_999_999, sound_step=99_999_999)
    write_checkpoint(checkpoints.path(5))
    for path in (checkpoints.path(99_999_999), checkpoints.path(5)):
        (path / "trainer_state.json").write_text("")
    write_checkpoint(checkpoints.path(1))
    checkpoints.delete_old(rules)
    left = ["run-00000002", "run-00000005", "run-99999999", "run-100000000"]
    assert names(checkpoints) == left, "step 2 is the second newest that is valid"


def test_checkpoints_after_a_step_are_set_aside(checkpoints: CheckpointFolder) -> None:
    assert [path.name for path in checkpoints.set_aside_after(2)] == ["run-99999999.diverged", "run-100000000.diverged"]
    assert names(checkpoints) == ["run-00000002"]
    assert checkpoints.set_aside_after(2) == []
