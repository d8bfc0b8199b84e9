"""Write small files so that a reader sees either the old or the complete new content.

Must not know what a file contains.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from tinytrain_dist.utils.regular_files import read_text


def write_atomically(path: Path, value: Any) -> None:
    """Replace the file `path` in one step. Errors: OSError.

    A string is written as it is, any other value as one line of JSON. The content first goes to a temporary file in the
    same folder, which is then renamed to `path`.
    """
    text = value if isinstance(value, str) else json.dumps(value) + "\n"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


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
        content = json.loads(read_text(path))
        return content if isinstance(content, dict) else {}
    return {}
