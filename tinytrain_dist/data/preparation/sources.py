"""Find the files of every source: the standard library, files, folders and globs.

Must not know how files are read.
"""

from __future__ import annotations

import glob
import os
import platform
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tinytrain_dist.data.preparation.compressed_files import COMPRESSED_SUFFIXES, unreadable_error
from tinytrain_dist.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
_SKIPPED_STDLIB_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """The files of one source argument.

    name: as in meta.json. files: in reading order. root: folder that file names in a digest are relative to.
    tolerant: bytes that are not UTF-8 are replaced, whatever the settings are.
    """

    name: str
    files: tuple[str, ...]
    root: str = ""
    tolerant: bool = False


def find_sources(arguments: Iterable[str], say: Callable[[str], None]) -> list[Source]:
    """Return a source for each argument: `stdlib`, a file, a folder or a glob. Each file is in one source only.

    say: prints a message. Errors: DataError if an argument gives no file, or if there is no argument.
    """
    sources: list[Source] = []
    seen: set[str] = set()
    for argument in arguments:
        source = _standard_library() if argument == "stdlib" else _find_source(argument, say)
        count = len(source.files)
        new_files: dict[str, str] = {}
        for file in source.files:
            real_path = os.path.realpath(file)
            if real_path not in seen:
                new_files[real_path] = file
        if len(new_files) < count:
            say(f"{argument}: {count - len(new_files)} of {count} files were already given; each is used once")
        seen.update(new_files)
        if new_files:
            sources.append(Source(source.name, tuple(new_files.values()), source.root, source.tolerant))
    if not sources:
        raise DataError("no source was given; give stdlib, files, folders or globs")
    return sources


def _find_source(argument: str, say: Callable[[str], None]) -> Source:
    """Return the files of one argument that is not `stdlib`. Errors: DataError if there are none."""
    path = os.path.expanduser(argument)
    if os.path.isdir(path):
        files = list(_text_files_below(path, say))
        if not files:
            raise DataError(
                f"{argument}: the folder contains no {', '.join(TEXT_SUFFIXES)} file, plain or compressed as "
                f"{', '.join(COMPRESSED_SUFFIXES)}; give other text files by name or by glob"
            )
        return Source(argument, tuple(files), root=path)
    if os.path.lexists(path):
        return Source(argument, (_check_regular_file(path),))
    if not glob.has_magic(path):
        remedy = "URLs are not supported, so download the file" if "://" in path else "check the path"
        raise DataError(f"{argument}: there is no such file or folder; {remedy}")
    files = []
    for match in sorted(glob.glob(path, recursive=True)):
        files += _text_files_below(match, say) if os.path.isdir(match) else [_check_regular_file(match)]
    if not files:
        raise DataError(f"{argument}: no file matches this glob; check the pattern (** also matches subfolders)")
    return Source(argument, tuple(files))


def _check_regular_file(path: str) -> str:
    """Return `path` if it is a regular file. Errors: DataError if it is not."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise unreadable_error(path, error) from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is not a regular file, but text is read twice; write the text to a file first")
    return path


def _text_files_below(folder: str, say: Callable[[str], None]) -> Iterator[str]:
    """Yield the text files below `folder` in sorted order. Hidden files and folders and linked folders are skipped."""
    skipped: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            if text_suffix(name) in TEXT_SUFFIXES:
                yield _check_regular_file(os.path.join(parent, name))
            else:
                skipped[os.path.splitext(name)[1] or name] += 1
    if skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(5))
        kinds += ", ..." if len(skipped) > 5 else ""
        say(f"{folder}: skipped {skipped.total()} files that are not {', '.join(TEXT_SUFFIXES)} ({kinds})")


def _standard_library() -> Source:
    """Return the source files of the running Python, without tests and files that differ between machines."""
    root = sysconfig.get_paths()["stdlib"]
    files: list[str] = []
    for parent, folders, names in os.walk(root):
        kept_folders = [name for name in folders if name not in _SKIPPED_STDLIB_FOLDERS]
        folders[:] = sorted(name for name in kept_folders if not name.startswith("config-"))
        for name in sorted(names):
            path = os.path.join(parent, name)
            machine_specific = name.startswith(("_sysconfigdata", "sitecustomize")) or os.path.islink(path)
            if name.endswith(".py") and not machine_specific:
                files.append(path)
    if not files:
        raise DataError(f"stdlib: this Python has no source files in {root}; give your own text files")
    return Source(f"stdlib (Python {platform.python_version()})", tuple(files), root, tolerant=True)


def text_suffix(name: str) -> str:
    """Return the suffix in lower case, ignoring a compression suffix: `.jsonl` for `a.JSONL.zst`."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED_SUFFIXES else suffix
