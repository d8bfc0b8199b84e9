"""Write a folder that appears complete or not at all.

Must not know token files or where their documents come from.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.atomic_files import fsync_folder
from tinytrain_dist.utils.stale_files import describe_leftovers, hold_folder, owner, remove_leftovers

_DATA_SET_FILES = {"train.npy", "val.npy", "tokenizer.json", "tokenizer_config.json", "meta.json"}


def _check_target(target: Path, old: Path, overwrite: bool) -> None:
    """Raise DataError if `target` must not be replaced. Before that, restore it if an earlier run was killed."""
    if old.exists() and not target.exists():
        old.rename(target)  # an earlier run was killed between the two renames of `new_folder`
    if not target.exists():
        return
    if not target.is_dir():
        raise DataError(f"--out {target} is a file; give a folder to write to")
    present = {entry.name for entry in target.iterdir()}
    if present and not overwrite:
        raise DataError(f"--out {target} already exists; pass --overwrite to replace it, or give another folder")
    # Training keeps facts about a token file beside it, as in train.npy.range.json.
    foreign = [name for name in present - _DATA_SET_FILES if not name.startswith(("train.npy.", "val.npy."))]
    if foreign:
        raise DataError(
            f"--out {target} contains {min(foreign)!r}, which tinytrain prepare did not write and which would be "
            "deleted with the folder; move it away, or give another folder"
        )


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside `target` that replaces it if the block succeeds, and is deleted otherwise.

    An existing `target` is renamed first and deleted last, so that a complete data set is on disk at any time.
    Errors: DataError if `target` must not be replaced, or if the disk is full or fails.
    """
    old = target.with_name(f".{target.name}.old")
    new = target.with_name(f".{target.name}.new-{owner()}")
    held = None
    try:
        _remove_leftovers(target, old)
        _check_target(target, old, overwrite)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        held = hold_folder(new)
        try:
            yield new
            fsync_folder(new)
            if overwrite and target.exists() and any(target.iterdir()):
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
            new.rename(target)
            fsync_folder(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"--out {target} cannot be written: {reason}; no incomplete files were left there"
            f"{_describe_free_space(target)}. Free some space, or give another folder"
        ) from error
    finally:
        if held is not None:
            os.close(held)


def _remove_leftovers(target: Path, old: Path) -> None:
    """Remove and name what killed processes have left beside `target`; name what only a user can judge."""
    removed = remove_leftovers(target.parent)
    if old.exists() and target.exists():  # a process was killed after the new data set had taken the place of the old
        shutil.rmtree(old, ignore_errors=True)
        removed.append(old)
    if removed:
        print(describe_leftovers(removed), file=sys.stderr)
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.new-*")):
        print(
            f"{path}: left alone; another `tinytrain prepare` is writing it, or has died on another host or with an "
            "older version; delete it if none runs",
            file=sys.stderr,
        )


def _describe_free_space(target: Path) -> str:
    existing_parent = next((parent for parent in target.parents if parent.exists()), None)
    if existing_parent is None:
        return ""
    return f" ({shutil.disk_usage(existing_parent).free / 1e6:,.0f} MB are free now)"
