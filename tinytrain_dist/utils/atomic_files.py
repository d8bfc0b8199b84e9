"""Write small files so that no reader ever sees half of one.

Must not know what is in a file.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, value: Any) -> None:
    """Write text (or a value, as JSON) aside and rename it. Errors: OSError from the disk."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(value if isinstance(value, str) else json.dumps(value) + "\n", encoding="utf-8")
    aside.replace(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a small file; an empty dictionary where there is none, or something else."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
