"""Write small files so that a reader sees the old or the new content, never a part.

Must not know what is in a file.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from tinytrain_dist.utils.regular_files import read_text


def write_atomically(path: Path, value: Any) -> None:
    """Write a text, or another value as JSON, to a temporary file beside `path` and rename it. Errors: OSError."""
    text = value if isinstance(value, str) else json.dumps(value) + "\n"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


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
        content = json.loads(read_text(path))
        return content if isinstance(content, dict) else {}
    return {}
