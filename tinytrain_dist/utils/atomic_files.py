"""Write small files so that a reader sees either the old or the complete new content.

Must not know what a file contains.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from tinytrain_dist.utils.json_files import read_json_dict, to_json
from tinytrain_dist.utils.stale_files import remove_leftovers, temporary_path

_written: set[Path] = set()  # by this process


def write_atomically(path: Path, value: Any) -> None:
    """Replace the file `path` in one step. Errors: OSError.

    A string is written as it is, any other value as one line of JSON. The content first goes to a temporary file in the
    same folder, which is then renamed to `path`. The first time, temporary files for `path` that killed processes have
    left are removed.
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
    """Flush the entries of a folder to disk, so that a rename in it survives a power loss. Errors: OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file, or {} if the file cannot be read or contains anything else."""
    with contextlib.suppress(OSError, ValueError):
        return read_json_dict(path)
    return {}
