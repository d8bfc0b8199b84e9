"""Read regular files only: opening a named pipe waits for a writer, perhaps for ever, and reading a device may not end.

Must not know what is in a file.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
DEAD_LINK = "a link to nothing"


class NotAFileError(OSError):
    """A path is no regular file, and so is not opened."""

    def __str__(self) -> str:
        """Return a sentence without an error number."""
        return f"{self.filename} {self.strerror}"


def kind_of(path: str | Path) -> str:
    """Return what is at a path in words: "a file", "a folder", "a named pipe", ..., or "" if there is nothing.

    A link counts as what it leads to. Errors: OSError if that cannot be found out.
    """
    try:
        return _kind(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return DEAD_LINK if os.path.islink(path) else ""


def check_regular(path: str | Path) -> None:
    """Check that a path is a regular file, or a link to one; for libraries that open it. Errors: OSError."""
    _check_mode(path, os.stat(path).st_mode)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. Errors: OSError, at once for anything else."""
    check_regular(path)  # first, because opening a device may already do something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_mode(path, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a regular file. Errors: OSError."""
    check_regular(path)
    return Path(path).read_bytes()


def read_text(path: str | Path, errors: str = "strict") -> str:
    """Return the text of a regular file in UTF-8. Errors: OSError, UnicodeDecodeError."""
    check_regular(path)
    return Path(path).read_text(encoding="utf-8", errors=errors)


def _check_mode(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotAFileError(errno.EINVAL, f"is {_kind(mode)}, not a regular file", str(path))


def _kind(mode: int) -> str:
    return next((name for is_kind, name in KINDS if is_kind(mode)), "something else")
