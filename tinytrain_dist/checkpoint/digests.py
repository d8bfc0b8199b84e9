"""Digests of tensors and of whole states: equal digests mean equal bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from tinytrain_dist.checkpoint.discovery import read_trainer_state
from tinytrain_dist.checkpoint.hashing import HASH_FUNCTIONS
from tinytrain_dist.checkpoint.manifest import read_manifest
from tinytrain_dist.checkpoint.safetensors_io import NAME_OF_DTYPE, TensorReader
from tinytrain_dist.config.run_folder import MANIFEST_FILE, TRAINER_STATE_FILE
from tinytrain_dist.distributed.dtensor import tensor_bytes
from tinytrain_dist.errors import CheckpointError

TITLE_OF_KIND = {"model": "weights", "optimizer": "optimizer"}


def tensor_digest(value: Tensor, hashed: str = "blake3") -> str:
    """BLAKE3 (or another of HASHES) of the bytes of a tensor's values, as the manifest has it."""
    return str(HASH_FUNCTIONS[hashed](tensor_bytes(value.contiguous())).hexdigest())


def tensor_entries(checkpoint: Path, recompute: bool = False) -> dict[str, dict[str, list[Any]]]:
    """Per kind, every tensor (and every plain number of the optimizer's state) as name -> [shape, type, BLAKE3].

    recompute: read the tensors, instead of taking the manifest's word. An older one has no such digests: its tensors
    are read and compared with those it has. Errors: CheckpointError if they do not fit.
    """
    manifest, found = read_manifest(checkpoint), {}
    older = manifest.hashed if manifest.hashed != "blake3" else ""
    for kind in (kind for kind in TITLE_OF_KIND if kind in manifest.tensors):
        entries: dict[str, list[Any]] = {}
        reader = TensorReader(checkpoint, kind) if recompute or older else None
        for name, noted in manifest.tensors[kind].items():
            if reader:
                value = reader.read(name)
                entries[name] = [list(value.shape), NAME_OF_DTYPE[value.dtype], tensor_digest(value)]
                if older and tensor_digest(value, older) != noted[older]:
                    raise CheckpointError(
                        f"{checkpoint}: {name} is not what {MANIFEST_FILE} says; use another checkpoint"
                    )
            else:
                entries[name] = [noted["shape"], noted["dtype"], noted["blake3"]]
        found[kind] = entries
    if "optimizer" in found and (checkpoint / TRAINER_STATE_FILE).is_file():
        values = read_trainer_state(checkpoint).get("optimizer", {}).get("state", {})
        found["optimizer"] |= {name: [[], "value", repr(value)] for name, value in values.items()}
    return found


def state_digest(entries: dict[str, list[Any]]) -> str:
    """One sha256 over all entries in the order of their names: no trace of how they are split over files."""
    lines = [json.dumps([name, *entry], separators=(",", ":")) for name, entry in sorted(entries.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
