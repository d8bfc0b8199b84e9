"""Write and read manifest.json, and commit a folder so that it appears complete or not at all.

A folder is complete when manifest.json, written last, lists every file and every tensor with size and digest. Format 3:

- a tensor has the BLAKE3 of its bytes
- a file of tensors has the BLAKE3 over its header and, in the order of the file, its tensors' digests (32 bytes each),
  so that every byte is hashed once
- any other file has the BLAKE3 of its bytes

Formats 1 and 2 are still read: they had sha256, format 1 also of whole files of tensors. The manifest's own digest is
sha256 in all formats, so that every version can say which format it has found.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from tinytrain_dist.config.run_folder import MANIFEST_FILE
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.atomic_files import fsync_folder


@dataclass
class Manifest:
    """What a complete folder holds: `files` by name, `tensors` by kind ("model", "optimizer") and name."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    under_way: list[str] = field(default_factory=list)  # files begun and not on the disk yet: what a stuck save is at
    hashed: str = "blake3"  # with which of HASHES


def write_json_file(folder: Path, name: str, value: Any, manifest: Manifest) -> None:
    """Write one JSON file, brought to the disk, and note it."""
    write_file(folder, name, (json.dumps(value, indent=1) + "\n").encode(), manifest)


def write_file(folder: Path, name: str, data: bytes, manifest: Manifest) -> None:
    """Write one small file, brought to the disk, and note it."""
    manifest.under_way.append(name)
    with open(folder / name, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    manifest.under_way.remove(name)
    manifest.files[name] = {"bytes": len(data), "blake3": blake3(data).hexdigest()}


def commit_folder(aside: Path, final: Path, manifest: Manifest) -> None:
    """Make the folder `aside` appear as `final`, complete: manifest, fsync, one rename, fsync of the parent.

    Errors: CheckpointError if `final` exists already (it is left alone); OSError from the disk.
    """
    body = {"format": 3, "files": dict(manifest.files), "tensors": manifest.tensors}
    write_json_file(aside, MANIFEST_FILE, {**body, "sha256": _manifest_digest(body)}, manifest)
    fsync_folder(aside)
    if final.exists():
        raise CheckpointError(f"{final}: exists already and is not replaced; give another path or delete it")
    aside.rename(final)
    fsync_folder(final.parent)


def _manifest_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a complete folder. Errors: CheckpointError if it is missing or was changed."""
    path = folder / MANIFEST_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        body = {key: found[key] for key in ("format", "files", "tensors")}
        intact = found["sha256"] == _manifest_digest(body)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is not a complete checkpoint (no {MANIFEST_FILE}); use another one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another checkpoint") from None
    if not intact:
        raise CheckpointError(f"{path}: was changed after it was written; use another checkpoint")
    if body["format"] not in (1, 2, 3):
        raise CheckpointError(f"{path}: has format {body['format']}, but this version reads 1 to 3; use a newer one")
    return Manifest(body["files"], body["tensors"], hashed="blake3" if body["format"] == 3 else "sha256")
