"""Write, commit and read the manifest of a folder, which lists every file and tensor with size and digest.

Must not know ranks, models or steps. A folder is complete when manifest.json, written last, exists. Nothing is pickled.

The format
----------

A checkpoint is a folder with these files:

* KIND-00001-of-0000N.safetensors, for the kinds "model" and "optimizer": whole tensors, in files of a maximum size
* KIND.safetensors.index.json: which file each tensor is in, in Hugging Face's format
* trainer_state.json: step, configuration and everything else that is not a tensor
* config.json, and tokenizer files if the data has them: they make the folder a Hugging Face model
* manifest.json: an object with the keys `format`, `files`, `tensors` and `sha256`

`format` is the number of the format, now 3.

`tensors` maps kind -> name of the tensor -> an object with

* `shape` (a list) and `dtype` (the name that safetensors gives it, such as "F32")
* `blake3`: the digest of the bytes of its values
* `finite`: false if the tensor may contain NaN and infinity (such as a buffer with a mask); otherwise the key is absent

`files` maps the name of each file, manifest.json excepted, to an object with `bytes` (its size) and its digest:

* A file of tensors has `kind`, `tensors` (names in file order), `header_bytes`, and `blake3_of_digests`. The last is
  the digest of the header followed by the 32-byte digests of its tensors, in file order, so every byte is hashed once.
* Any other file has `blake3`: the digest of its bytes.

`sha256` is the digest of the other keys of the manifest, as JSON with sorted keys. Every format uses sha256 here, so
that any version of this package can verify the manifest and name its format.

Older formats, which are still read:

* Format 2 is format 3 with sha256 instead of BLAKE3: the keys are `sha256` and `sha256_of_digests`.
* Format 1 is format 2, but a file of tensors has, like any other file, only `bytes` and the `sha256` of all its bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from tinytrain_dist.config.run_folder import MANIFEST_FILE
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.atomic_files import fsync_folder
from tinytrain_dist.utils.json_files import is_file_name, is_whole_number, read_json_dict, to_json
from tinytrain_dist.utils.permissions import permission_problem

FORMAT = 3
READABLE_FORMATS = (1, 2, 3)


@dataclass
class Manifest:
    """The contents of a complete folder: `files` by name, `tensors` by kind ("model", "optimizer") and name."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    # names of the files that are started but not yet synced to disk, to show what a stuck save waits for
    files_in_progress: list[str] = field(default_factory=list)
    # of the tensors that this rank writes, to show how far a save is
    bytes_to_write: int = 0
    bytes_written: int = 0
    hashed: str = "blake3"  # hash function of its digests, and their key; a name in HASH_FUNCTIONS


def write_json_file(folder: Path, name: str, value: Any, manifest: Manifest) -> None:
    """Write one JSON file, sync it to disk, and record it in the manifest."""
    write_file(folder, name, (to_json(value, indent=1) + "\n").encode(), manifest)


def write_file(folder: Path, name: str, data: bytes, manifest: Manifest) -> None:
    """Write one small file, sync it to disk, and record it in the manifest.

    Errors: OSError from the disk, or if the file exists already.
    """
    manifest.files_in_progress.append(name)
    with open(folder / name, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    manifest.files_in_progress.remove(name)
    manifest.files[name] = {"bytes": len(data), "blake3": blake3(data).hexdigest()}


def commit_folder(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest into the folder `temporary`, and rename the folder to `final`.

    Everything is synced to disk before and after the rename, so that `final` is never incomplete.
    Errors: CheckpointError if `final` exists already (it is left alone); OSError from the disk.
    """
    body = {"format": FORMAT, "files": dict(manifest.files), "tensors": manifest.tensors}
    write_json_file(temporary, MANIFEST_FILE, {**body, "sha256": _manifest_digest(body)}, manifest)
    fsync_folder(temporary)
    if final.exists():
        raise CheckpointError(f"{final}: exists already and is not replaced; give another path or delete it")
    temporary.rename(final)
    fsync_folder(final.parent)


def _manifest_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a complete folder.

    Errors: CheckpointError if it is missing, unreadable, changed after it was written, or of a newer format.
    """
    path = folder / MANIFEST_FILE
    try:
        content = read_json_dict(path)
        body = {key: content[key] for key in ("format", "files", "tensors")}
        intact = content["sha256"] == _manifest_digest(body)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is not a complete checkpoint (no {MANIFEST_FILE}); use another one") from None
    except KeyError as error:
        raise CheckpointError(f"{path}: cannot be read (it has no key {error}); use another checkpoint") from None
    except (OSError, ValueError) as error:
        problem = f"{path}: cannot be read ({error}); use another checkpoint"
        raise CheckpointError(permission_problem(error) or problem) from None
    if not intact:
        raise CheckpointError(f"{path}: was changed after it was written; use another checkpoint")
    if body["format"] not in READABLE_FORMATS:
        found = body["format"]
        raise CheckpointError(f"{path}: has format {found}, but this version reads 1 to 3; use a newer version")
    hashed = "blake3" if body["format"] == FORMAT else "sha256"
    if problem := _structure_problem(body["files"], body["tensors"], hashed):
        raise CheckpointError(f"{path}: {problem}; use another checkpoint")
    return Manifest(body["files"], body["tensors"], hashed=hashed)


def file_bytes(folder: Path) -> int:
    """Return the size of all files of a folder by its manifest; 0 if the manifest cannot be read."""
    try:
        return sum(file["bytes"] for file in read_manifest(folder).files.values())
    except CheckpointError:
        return 0


def _structure_problem(files: Any, tensors: Any, hashed: str) -> str:
    """Return what in the manifest does not have the form that the docstring of this module describes; "" if all has."""
    if not (_is_dict_of_dicts(files) and _is_dict_of_dicts(tensors) and all(map(_is_dict_of_dicts, tensors.values()))):
        return "its files and tensors are not objects of objects"
    for kind, entries in tensors.items():
        for name, entry in entries.items():
            shape = entry.get("shape")
            if not (isinstance(shape, list) and all(map(is_whole_number, shape))):
                return f"the shape of {kind} {name} is not a list of whole numbers"
            if not (isinstance(entry.get("dtype"), str) and _is_digest(entry.get(hashed))):
                return f"{kind} {name} has no dtype or no {hashed}"
    for name, entry in files.items():
        if not is_file_name(name):
            return f"{name!r} is not the name of a file"
        if not is_whole_number(entry.get("bytes")):
            return f"the entry of {name} has no size"
        if _is_digest(entry.get(hashed)):
            continue
        names, known = entry.get("tensors"), tensors.get(str(entry.get("kind")), {})
        if not (isinstance(names, list) and all(isinstance(tensor, str) and tensor in known for tensor in names)):
            return f"the entry of {name} lists no tensors, or unknown ones"
        if not (is_whole_number(entry.get("header_bytes")) and _is_digest(entry.get(f"{hashed}_of_digests"))):
            return f"the entry of {name} has no digest"
    return ""


def _is_dict_of_dicts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def quick_problems(folder: Path) -> list[str]:
    """Return what is wrong with a checkpoint, judging by its manifest and file sizes alone; empty if nothing is."""
    try:
        files = read_manifest(folder).files
    except CheckpointError as error:
        return [str(error)]
    problems: list[str] = []
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            problems.append(f"{path}: {found}, but {entry['bytes']:,} bytes were written")
    return problems


def is_damaged(folder: Path) -> bool:
    """Return whether `quick_problems` finds something."""
    return bool(quick_problems(folder))
