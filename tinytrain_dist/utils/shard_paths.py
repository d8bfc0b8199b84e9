"""Find the token files that one entry of train_data or val_data names: a file, a folder, or a glob.

Must not know what is in a token file.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

TOKEN_FILE_ENDINGS = (".npy", ".bin")  # of the files that a folder contributes
# Files beside token files that are never token files themselves.
SIDE_FILE_ENDINGS = (".mask.npy", ".documents.npy", ".range.json", ".idx", ".tmp")
TABLES = ("token_bytes.npy", "meta.json", "tokenizer.json", "tokenizer_config.json")


class NoTokenFilesError(OSError):
    """An entry of train_data or val_data names no token file, or files that must not be mixed."""


def shard_paths(entry: str) -> list[str]:
    """Return the token files of one entry, sorted by name; a path that is no folder and no glob names itself.

    PREFIX also stands for PREFIX.bin if that and PREFIX.idx exist, as in Megatron's settings.
    Errors: NoTokenFilesError.
    """
    if os.path.isdir(entry):
        found = [item.path for item in os.scandir(entry) if item.name.endswith(TOKEN_FILE_ENDINGS) and _is_shard(item)]
        _check_one_split(entry, found)
        what = f"the folder has no {' or '.join(TOKEN_FILE_ENDINGS)} file"
    elif glob.has_magic(entry) and not os.path.exists(entry):
        matches = glob.glob(entry, recursive=True)
        found = [path for path in matches if _has_shard_name(os.path.basename(path)) and not os.path.isdir(path)]
        what = "no file fits the glob"
    elif not os.path.exists(entry) and os.path.exists(f"{entry}.bin") and os.path.exists(f"{entry}.idx"):
        return [f"{entry}.bin"]
    else:
        return [entry]
    if not found:
        raise NoTokenFilesError(
            f"{entry}: {what}; correct it, or make token files with `tinytrain prepare` (masks, document starts and "
            "indexes do not count)"
        )
    return sorted(found)


def data_folders(entries: Iterable[str]) -> list[Path]:
    """Return the folders of all token files of these entries, each once, in order. Errors: NoTokenFilesError."""
    folders = (os.path.dirname(path) for entry in entries for path in shard_paths(entry))
    return [Path(folder) for folder in dict.fromkeys(folders)]


def _is_shard(item: os.DirEntry[str]) -> bool:
    return _has_shard_name(item.name) and not item.is_dir()


def _has_shard_name(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(SIDE_FILE_ENDINGS) and name not in TABLES


def _check_one_split(folder: str, paths: list[str]) -> None:
    """Refuse a folder that holds both training and evaluation files, as `tinytrain prepare` and nanoGPT write it."""
    names = sorted(os.path.basename(path) for path in paths)
    of_train, of_val = ([name for name in names if name.startswith(split)] for split in ("train", "val"))
    if of_train and of_val:
        raise NoTokenFilesError(
            f"{folder}: the folder holds files to train on and to evaluate on ({of_train[0]}, {of_val[0]}); name "
            f"those that are meant, for example {os.path.join(folder, 'train*' + os.path.splitext(of_train[0])[1])}"
        )
