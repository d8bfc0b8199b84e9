"""Say in a sentence which file or folder this user has no permission to read. Must not know what is in a file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tinytrain_dist.utils.regular_files import open_regular


def check_readable(path: Path) -> None:
    """Open a file for reading, and close it. Errors: OSError."""
    with open_regular(path):
        pass


def permission_problem(error: BaseException) -> str:
    """Return a sentence with the path that must not be read; "" if the error has another cause."""
    if not isinstance(error, OSError) or error.errno != errno.EACCES or not isinstance(error.filename, str | bytes):
        return ""
    path = Path(os.fsdecode(error.filename))
    remedy = "change its mode (chmod), or ask its owner"
    for folder in reversed(path.parents):
        if not os.access(folder, os.X_OK):
            return f"{path}: no permission to read what is in the folder {folder}; {remedy}"
    needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
    if not os.path.lexists(path) or os.access(path, needed):
        return ""  # it could not be written
    return f"{path}: no permission to read this {'folder' if path.is_dir() else 'file'}; {remedy}"
