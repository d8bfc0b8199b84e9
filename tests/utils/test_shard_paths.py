"""Which token files an entry of train_data names: a file, a folder, a glob, or Megatron's prefix."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinytrain_dist.utils.shard_paths import NoTokenFilesError, data_folders, shard_paths

BESIDE = (
    "a.mask.npy",
    "a.documents.npy",
    "a.npy.range.json",
    "b.idx",
    "token_bytes.npy",
    "meta.json",
    ".c.npy",
    "x.txt",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.bin", "a.npy", "a-2.npy", *BESIDE):
        (tmp_path / name).touch()
    (tmp_path / "sub.npy").mkdir()
    (tmp_path / "sub.npy" / "c.npy").touch()
    return tmp_path


def test_a_folder_and_a_glob_name_token_files_in_order_and_nothing_beside_them(folder: Path) -> None:
    assert shard_paths(str(folder)) == [f"{folder}/{name}" for name in ("a-2.npy", "a.npy", "b.bin")]
    assert shard_paths(f"{folder}/a*") == [f"{folder}/{name}" for name in ("a-2.npy", "a.npy")]
    assert shard_paths(f"{folder}/**/c.npy") == [f"{folder}/sub.npy/c.npy"]


def test_a_path_names_itself_and_a_prefix_its_bin_file(folder: Path) -> None:
    assert shard_paths(f"{folder}/none.npy") == [f"{folder}/none.npy"]
    assert shard_paths(f"{folder}/b") == [f"{folder}/b.bin"]
    (folder / "[x].npy").touch()
    assert shard_paths(f"{folder}/[x].npy") == [f"{folder}/[x].npy"]  # a file before a glob


def test_no_match_is_an_error(folder: Path) -> None:
    with pytest.raises(NoTokenFilesError, match=r"z\*\.npy: no file fits the glob; correct it"):
        shard_paths(f"{folder}/z*.npy")
    (folder / "empty").mkdir()
    with pytest.raises(NoTokenFilesError, match=r"empty: the folder has no \.npy or \.bin file"):
        shard_paths(str(folder / "empty"))


def test_a_folder_with_training_and_evaluation_files_is_refused(tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).touch()
    with pytest.raises(NoTokenFilesError, match=r"name those that are meant, for example .*/train\*\.bin"):
        shard_paths(str(tmp_path))
    assert shard_paths(f"{tmp_path}/train*") == [f"{tmp_path}/train.bin"]


def test_folders_of_all_files_are_named_once(folder: Path) -> None:
    assert data_folders([str(folder), f"{folder}/**/c.npy", "x.npy"]) == [folder, folder / "sub.npy", Path()]
