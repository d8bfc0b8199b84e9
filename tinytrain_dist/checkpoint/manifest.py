"""Write, commit and read the manifest of a folder: the name, size and digest of every file and of every tensor.

Must not know ranks, models or steps. A folder is complete when manifest.json, written last, exists. Nothing is pickled.

The format
----------

A checkpoint is a folder with these files:

* KIND-00001-of-0000N.safetensors, for the kinds "model" and "optimizer": whole tensors, in files of a maximum size
* KIND.safetensors.index.json: the file of each tensor, as Hugging Face writes it
* trainer_state.json: step, configuration and all that is not a tensor
* config.json, and tokenizer files where the data has them: they make the folder a Hugging Face model
* manifest.json: an object with the keys `format`, `files`, `tensors` and `sha256`

`format` is the number of the format, now 3.

`tensors` maps kind -> name of the tensor -> an object with

* `shape` (a list) and `dtype` (the name that safetensors gives it, such as "F32")
* `blake3`: the digest of the bytes of its values
* `finite`: false if NaN and infinity are allowed in it (such as masks in buffers); otherwise the key is missing

`files` maps the name of each file, manifest.json excepted, to an object with `bytes` (its size) and its digest:

* A file of tensors has `kind`, `tensors` (names in file order), `header_bytes`, and `blake3_of_digests`. That is the
  digest of the header followed by the 32-byte digests of its tensors, in file order, so every byte is hashed once.
* Any other file has `blake3`: the digest of its bytes.

`sha256` is the digest of the other keys of the manifest, as JSON with sorted keys. It is sha256 in every format, so
that any version can verify the manifest and name its format.

Older formats, which are still read:

* Format 2 is format 3 with sha256 in place of BLAKE3: the keys are `sha256` and `sha256_of_digests`.
* Format 1 is format 2, but a file of tensors has, like any other file, only `bytes` and the `sha256` of all its bytes.
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
from tinytrain_dist.utils.regular_files import read_text

FORMAT = 3
READABLE_FORMATS = (1, 2, 3)


@dataclass
class Manifest:
    """The contents of a complete folder: `files` by name, `tensors` by kind ("model", "optimizer") and name."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    # names of files that are begun and not yet synced to disk: what a stuck save is waiting for
    files_in_progress: list[str] = field(default_factory=list)
    hashed: str = "blake3"  # the key of its digests, a name in HASH_FUNCTIONS


def write_json_file(folder: Path, name: str, value: Any, manifest: Manifest) -> None:
    """Write one JSON file, sync it to disk, and record it in the manifest."""
    write_file(folder, name, (json.dumps(value, indent=1) + "\n").encode(), manifest)


def write_file(folder: Path, name: str, data: bytes, manifest: Manifest) -> None:
    """Write one small file, sync it to disk, and record it in the manifest. Errors: OSError, also if it exists."""
    manifest.files_in_progress.append(name)
    with open(folder / name, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    manifest.files_in_progress.remove(name)
    manifest.files[name] = {"bytes": len(data), "blake3": blake3(data).hexdigest()}


def commit_folder(aside: Path, final: Path, manifest: Manifest) -> None:
    """Make the folder `aside` appear as `final`, complete: manifest, fsync, one rename, fsync of the parent.

    Errors: CheckpointError if `final` exists already (it is left alone); OSError from the disk.
    """
    body = {"format": FORMAT, "files": dict(manifest.files), "tensors": manifest.tensors}
    write_json_file(aside, MANIFEST_FILE, {**body, "sha256": _manifest_digest(body)}, manifest)
    fsync_folder(aside)
    if final.exists():
        raise CheckpointError(f"{final}: exists already and is not replaced; give another path or delete it")
    aside.rename(final)
    fsync_folder(final.parent)


def _manifest_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a complete folder.

    Errors: CheckpointError if it is missing, unreadable, changed after it was written, or of a newer format.
    """
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(read_text(path))
        body = {key: content[key] for key in ("format", "files", "tensors")}
        intact = content["sha256"] == _manifest_digest(body)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is not a complete checkpoint (no {MANIFEST_FILE}); use another one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another checkpoint") from None
    if not intact:
        raise CheckpointError(f"{path}: was changed after it was written; use another checkpoint")
    if body["format"] not in READABLE_FORMATS:
        raise CheckpointError(f"{path}: has format {body['format']}, but this version reads 1 to 3; use a newer one")
    return Manifest(body["files"], body["tensors"], hashed="blake3" if body["format"] == FORMAT else "sha256")
