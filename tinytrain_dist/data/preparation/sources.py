"""Find the files of every source: the standard library, files, folders and globs, here or at a URL.

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
from tinytrain_dist.data.preparation.dataset_folders import dataset_files
from tinytrain_dist.data.preparation.remote_errors import shown
from tinytrain_dist.data.preparation.remote_files import find_remote
from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.text import is_url

FOLDER_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet", ".arrow")
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

    def name_of(self, path: str) -> str:
        """Return the name of a file in a digest of several files."""
        if is_url(path):
            return shown(path)
        return os.path.relpath(path, self.root) if self.root else path


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
            real_path = file if is_url(file) else os.path.realpath(file)
            if real_path not in seen:
                new_files[real_path] = file
        if len(new_files) < count:
            say(f"{source.name}: {count - len(new_files)} of {count} files were already given; each is used once")
        seen.update(new_files)
        if new_files:
            sources.append(Source(source.name, tuple(new_files.values()), source.root, source.tolerant))
    if not sources:
        raise DataError("no source was given; give stdlib, files, folders or globs")
    return sources


def _find_source(argument: str, say: Callable[[str], None]) -> Source:
    """Return the files of one argument that is not `stdlib`. Errors: DataError if there are none."""
    if is_url(argument):
        return _remote_source(argument)
    path = os.path.expanduser(argument)
    if os.path.isdir(path):
        if (listed := dataset_files(path)) is not None:
            return Source(argument, tuple(map(_check_regular_file, listed)), root=path)
        files = list(_text_files_below(path, say))
        if not files:
            raise DataError(
                f"{argument}: the folder contains no {', '.join(FOLDER_SUFFIXES)} file, plain or compressed as "
                f"{', '.join(COMPRESSED_SUFFIXES)}; give other text files by name or by glob"
            )
        return Source(argument, tuple(files), root=path)
    if os.path.lexists(path):
        return Source(argument, (_check_regular_file(path),))
    if not glob.has_magic(path):
        raise DataError(f"{argument}: there is no such file or folder; check the path")
    files = []
    for match in sorted(glob.glob(path, recursive=True)):
        files += _text_files_below(match, say) if os.path.isdir(match) else [_check_regular_file(match)]
    if not files:
        raise DataError(f"{argument}: no file matches this glob; check the pattern (** also matches subfolders)")
    return Source(argument, tuple(files))


def _remote_source(url: str) -> Source:
    """Return the files that a URL names. Errors: DataError if there are none, or if they cannot be reached."""
    found = find_remote(url, lambda name: text_suffix(name) in FOLDER_SUFFIXES)
    if found is None:
        raise DataError(
            f"{shown(url)}: no file matches, or the folder contains no {', '.join(FOLDER_SUFFIXES)} file, plain or "
            f"compressed as {', '.join(COMPRESSED_SUFFIXES)}; check the URL, or name other files by a glob"
        )
    is_folder = found != [url] and "*" not in url
    listed = dataset_files(url) if is_folder else None
    return Source(shown(url), tuple(found if listed is None else listed))


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
        listed = dataset_files(parent) if "state.json" in names else None
        if listed is not None:
            yield from map(_check_regular_file, listed)  # other Arrow files there are caches of `datasets`
            names = [name for name in names if not name.endswith((".arrow", ".json"))]
        for name in sorted(name for name in names if not name.startswith(".")):
            if text_suffix(name) in FOLDER_SUFFIXES:
                yield _check_regular_file(os.path.join(parent, name))
            else:
                skipped[os.path.splitext(name)[1] or name] += 1
    if skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(5))
        kinds += ", ..." if len(skipped) > 5 else ""
        say(f"{folder}: skipped {skipped.total()} files that are not {', '.join(FOLDER_SUFFIXES)} ({kinds})")


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
    stem, suffix = os.path.splitext(shown(name).lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED_SUFFIXES else suffix
