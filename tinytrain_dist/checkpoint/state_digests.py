"""Compute digests of tensors and of whole states: equal digests mean equal bits.

Digests do not depend on how tensors are divided into files, or were divided over ranks. Commands that compare
checkpoints use this module; saving and verifying use `file_digests.py`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from tinytrain_dist.checkpoint.discovery import read_trainer_state
from tinytrain_dist.checkpoint.file_digests import HASH_FUNCTIONS
from tinytrain_dist.checkpoint.manifest import Manifest, read_manifest
from tinytrain_dist.checkpoint.safetensors_io import NAME_OF_DTYPE, TensorReader
from tinytrain_dist.config.run_folder import MANIFEST_FILE, TRAINER_STATE_FILE
from tinytrain_dist.distributed.dtensor import tensor_bytes
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.progress import Advance, no_progress

Entries = dict[str, list[Any]]  # name -> [shape, type, BLAKE3], or for a plain number [[], "value", repr]

TITLE_OF_KIND = {"model": "weights", "optimizer": "optimizer"}


def tensor_digest(value: Tensor, hashed: str = "blake3") -> str:
    """Return the digest of the bytes of a tensor's values, as a manifest records it.

    `value`: a tensor on the CPU. `hashed`: the hash function, a name in HASH_FUNCTIONS.
    """
    return str(HASH_FUNCTIONS[hashed](tensor_bytes(value.contiguous())).hexdigest())


def tensor_entries(checkpoint: Path, recompute: bool = False, advance: Advance = no_progress) -> dict[str, Entries]:
    """Return, for each kind, the entries of all tensors and of all plain numbers of the optimizer's state.

    recompute: read the tensors, instead of copying their digests from the manifest. A manifest of format 1 or 2 has
    sha256 digests, so its tensors are always read, and compared with these digests. Errors: CheckpointError if a tensor
    differs from its sha256 digest. advance: called with the numbers of bytes that were read.
    """
    manifest = read_manifest(checkpoint)
    read_tensors = recompute or manifest.hashed != "blake3"
    by_kind: dict[str, Entries] = {}
    for kind in TITLE_OF_KIND:
        if kind in manifest.tensors:
            if read_tensors:
                by_kind[kind] = _computed_entries(checkpoint, kind, manifest, advance)
            else:
                by_kind[kind] = _recorded_entries(kind, manifest)
    if "optimizer" in by_kind and (checkpoint / TRAINER_STATE_FILE).is_file():
        values = read_trainer_state(checkpoint).get("optimizer", {}).get("state", {})
        by_kind["optimizer"] |= {name: [[], "value", repr(value)] for name, value in values.items()}
    return by_kind


def _recorded_entries(kind: str, manifest: Manifest) -> Entries:
    return {
        name: [recorded["shape"], recorded["dtype"], recorded["blake3"]]
        for name, recorded in manifest.tensors[kind].items()
    }


def _computed_entries(checkpoint: Path, kind: str, manifest: Manifest, advance: Advance) -> Entries:
    reader = TensorReader(checkpoint, kind)
    entries: Entries = {}
    for name, recorded in manifest.tensors[kind].items():
        value = reader.read(name, advance=advance)
        entries[name] = [list(value.shape), NAME_OF_DTYPE[value.dtype], tensor_digest(value)]
        older_format = manifest.hashed != "blake3"
        if older_format and tensor_digest(value, manifest.hashed) != recorded[manifest.hashed]:
            raise CheckpointError(f"{checkpoint}: {name} is not what {MANIFEST_FILE} says; use another checkpoint")
    return entries


def state_digest(entries: Entries) -> str:
    """Return one sha256 over all entries, in the order of their names."""
    lines = [json.dumps([name, *entry], separators=(",", ":")) for name, entry in sorted(entries.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
