"""Write small files so that a reader sees the old or the new content, never a part.

Must not know what is in a file.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from tinytrain_dist.utils.json_files import read_json_dict, to_json
from tinytrain_dist.utils.leftovers import remove_leftovers, temporary_path

_written: set[Path] = set()  # by this process


def write_atomically(path: Path, value: Any) -> None:
    """Write a text, or another value as JSON, to a temporary file beside `path` and rename it.

    The first time, also remove the temporary files for `path` that killed processes have left. Errors: OSError.
    """
    text = value if isinstance(value, str) else to_json(value) + "\n"
    if path not in _written:
        _written.add(path)
        remove_leftovers(path.parent, of=path.name)
    temporary = temporary_path(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:  # such as a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def fsync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, so that a rename in it survives a power loss. Errors: OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file; {} if there is no such file, or something else in it."""
    with contextlib.suppress(OSError, ValueError):
        return read_json_dict(path)
    return {}
