"""Write a folder that appears complete or not at all, in one go or with interruptions.

Must not know token files or where their documents come from.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.atomic_files import fsync_folder, read_json_object
from tinytrain_dist.utils.json_files import to_json
from tinytrain_dist.utils.stale_files import describe_leftovers, hold_folder, is_held, owner, remove_leftovers

# Training keeps facts about a token file beside it, as in train.npy.range.json.
_DATA_SET_FILES = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|meta\.json|shards-.*\.range\.json|(train|val)(-\d{5,})?((\.documents|\.mask)?\.npy(\..*)?|\.range\.json)"
)


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
    foreign = [name for name in present if not _DATA_SET_FILES.fullmatch(name)]
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
            _replace(target, new, old, overwrite)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise _failed_write_error(target, error, "no incomplete files were left there") from error
    finally:
        if held is not None:
            os.close(held)


def _replace(target: Path, new: Path, old: Path, overwrite: bool) -> None:
    """Let `new` take the place of `target`. Errors: OSError; then `target` is as it was."""
    fsync_folder(new)
    try:
        if overwrite and target.exists() and any(target.iterdir()):
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        new.rename(target)
        fsync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)


class WorkFolder:
    """What an unfinished `prepare` has done: a plan, which never changes, and its progress, which each commit replaces.

    path: the folder, `.NAME.partial` beside the output. data: the files of the output that exist already.
    """

    def __init__(self, path: Path) -> None:
        """Use the folder `path`."""
        self.path, self.data = path, path / "data"
        self._plan, self._progress = path / "plan.json", path / "progress.json"

    def resume(self, identity: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
        """Return the plan that was saved for the same work, or None after making the folder empty.

        identity: what determines the bytes of the output. Errors: DataError if it differs, unless overwrite is set.
        """
        plan = read_json_object(self._plan)
        if plan.get("identity") == identity and self.data.is_dir():
            return plan
        if plan and self.data.is_dir() and not overwrite:
            raise DataError(
                f"{self.path}: holds the unfinished work of a tinytrain prepare with {_difference(plan, identity)}; "
                "repeat that command to finish it, or pass --overwrite to delete this work and start again"
            )
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.data.mkdir()
        return None

    def save_plan(self, plan: dict[str, Any]) -> None:
        """Keep the plan. From now on the work is kept when it is interrupted."""
        self._save(self._plan, plan)

    @property
    def is_kept(self) -> bool:
        """Whether there is work to continue."""
        return self._plan.exists()

    def progress(self) -> dict[str, Any]:
        """Return the progress that was committed last, or {}."""
        return read_json_object(self._progress)

    def commit(self, progress: dict[str, Any]) -> None:
        """Replace the progress in one step. Before that, all files that it describes must be on disk."""
        self._save(self._progress, progress)

    def _save(self, path: Path, value: dict[str, Any]) -> None:
        new = path.with_name(f"{path.name}.new")
        with new.open("w", encoding="utf-8") as file:
            file.write(to_json(value) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        fsync_folder(self.path)
        fsync_folder(self.data)


def _difference(plan: dict[str, Any], identity: dict[str, Any]) -> str:
    """Return in what the work of a plan differs from other work."""
    before = plan.get("identity", {})
    for name, value in identity.items():
        was = before.get(name)
        if was == value:
            continue
        if name != "files":
            return f"{name} = {was!r} and not {value!r}"
        changed = [now for now, then in zip(value, was or [], strict=False) if now != then]
        return f"other files, or with other content in {changed[0][0]}" if changed else "more or fewer files"
    return "other settings"


@contextmanager
def resumable_folder(target: Path, overwrite: bool) -> Iterator[WorkFolder]:
    """Yield a work folder whose data become `target` if the block succeeds. Otherwise it is kept, if it has a plan.

    Errors: DataError if `target` must not be replaced, if another process works on it, or if the disk is full or fails.
    """
    old = target.with_name(f".{target.name}.old")
    work = WorkFolder(target.with_name(f".{target.name}.partial"))
    kept = f"the work so far is kept in {work.path}; run the same command again to continue it"
    held = None
    try:
        _remove_leftovers(target, old)
        _check_target(target, old, overwrite)
        work.path.mkdir(parents=True, exist_ok=True)
        held = hold_folder(work.path)
        if held is None and is_held(work.path):
            raise DataError(f"--out {target}: another tinytrain prepare is writing it; wait for it, or stop it")
        try:
            yield work
            _replace(target, work.data, old, overwrite)
            shutil.rmtree(work.path, ignore_errors=True)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*([kept] if work.is_kept else [])) from None
        except (DataError, SystemExit):
            if work.is_kept:
                print(kept, file=sys.stderr)
            raise
        finally:
            if work.path.exists() and not work.is_kept:
                shutil.rmtree(work.path, ignore_errors=True)
    except OSError as error:
        what = kept if work.is_kept else "no incomplete files were left there"
        raise _failed_write_error(target, error, what) from error
    finally:
        if held is not None:
            os.close(held)


def _failed_write_error(target: Path, error: OSError, what: str) -> DataError:
    reason = error.strerror or str(error)
    return DataError(
        f"--out {target} cannot be written: {reason}; {what}{_describe_free_space(target)}. Free some space, or give "
        "another folder"
    )


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
