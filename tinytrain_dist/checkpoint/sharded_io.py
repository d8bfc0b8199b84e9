"""Write and read one checkpoint folder with all ranks.

Must not know the loop. Rank 0 alone creates the folder and commits it. Tensors are whole on disk, so that any number of
ranks in any mode can read them. No rank holds more than its shards and a few chunks.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinytrain_dist.checkpoint.manifest import Manifest, commit_folder, read_manifest, write_file, write_json_file
from tinytrain_dist.checkpoint.safetensors_io import (
    CHUNK_BYTES,
    CHUNKS_IN_FLIGHT,
    NAME_OF_DTYPE,
    TensorReader,
    TensorSpec,
    write_index,
    write_tensors,
)
from tinytrain_dist.checkpoint.state import MAX_FILE_BYTES, ShardsByKind, model_tensors, optimizer_tensors
from tinytrain_dist.config.run_folder import TEMPORARY_SUFFIX, TRAINER_STATE_FILE
from tinytrain_dist.distributed import collectives, shard_transfer
from tinytrain_dist.distributed.collectives import Group
from tinytrain_dist.distributed.dtensor import local_tensor, shard_range
from tinytrain_dist.errors import CheckpointError


def write_checkpoint(
    path: Path,
    shards: ShardsByKind,
    state: dict[str, Any],
    extra_files: dict[str, bytes] | None = None,
    max_shard_bytes: int = MAX_FILE_BYTES,
    group: Group | None = None,
    manifest: Manifest | None = None,
    permit: Callable[[], None] = lambda: None,
) -> None:
    """Write one complete checkpoint folder. A collective over `group`: each rank sends its rows to the writers.

    Rank 0 makes the folder, writes what is not a tensor, and commits; before the first and the last of these it asks
    `permit`, whose TrainingError ends it. Errors: on every rank, CheckpointError if `path` exists or a value is not
    finite, or a writer's OSError; then nothing is left behind. `manifest`: an empty one, to see from outside which
    file this rank is at.
    """
    aside, main = path.with_name(path.name + TEMPORARY_SUFFIX), collectives.is_main_rank()
    manifest = Manifest() if manifest is None else manifest
    specs = {k: [TensorSpec(p.name, p.shape, p.dtype, p.must_be_finite) for p in parts] for k, parts in shards.items()}
    try:
        collectives.run_on_all_ranks(lambda: permit() if main else None, group)
        collectives.run_on_all_ranks(lambda: _make_folder(path, aside, main), group)
        _write_my_files(aside, shards, specs, max_shard_bytes, group, manifest)
        everyone = collectives.all_gather_object(manifest, group)

        def complete() -> None:
            if not main:
                return
            manifest.files, manifest.tensors = _merge(everyone, specs)
            for kind in specs:
                write_index(aside, kind, specs[kind], max_shard_bytes, manifest)
            for name, data in (extra_files or {}).items():
                write_file(aside, name, data, manifest)
            write_json_file(aside, TRAINER_STATE_FILE, state, manifest)
            permit()
            commit_folder(aside, path, manifest)

        collectives.run_on_all_ranks(complete, group)
    except (OSError, CheckpointError):
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _make_folder(path: Path, aside: Path, main: bool) -> None:
    if main:
        if path.exists():
            raise CheckpointError(f"{path}: exists already and is not replaced; give another path or delete it")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)


def _write_my_files(
    aside: Path,
    shards: ShardsByKind,
    specs: dict[str, list[TensorSpec]],
    max_bytes: int,
    group: Group | None,
    manifest: Manifest,
) -> None:
    """Write the files that are this rank's, while offering the others its rows of theirs; note what was written."""
    order, me = list(itertools.chain(*shards.values())), collectives.get_rank()
    chunks = shard_transfer.recv_shards(order, CHUNKS_IN_FLIGHT, CHUNK_BYTES, group)
    sends = shard_transfer.isend_shards(order, CHUNK_BYTES, group)

    def write() -> None:
        try:
            _wait_for_folder(aside)
            for kind, parts in shards.items():
                mine = {spec for spec, shard in zip(specs[kind], parts, strict=True) if shard.writer == me}
                write_tensors(aside, kind, specs[kind], chunks, max_bytes, manifest, mine.__contains__)
        finally:
            # after an error the others still offer: take it, or they wait for ever
            deque(chunks, maxlen=0)
            shard_transfer.wait_for_sends(sends)

    collectives.run_on_all_ranks(write, group)


def _wait_for_folder(folder: Path, seconds: float = 60.0) -> None:
    """Wait until the folder is visible: a shared file system may show a new folder to other hosts late."""
    deadline = time.monotonic() + seconds
    while not folder.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)


def _merge(manifests: list[Manifest], specs: dict[str, list[TensorSpec]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All files and all tensors, in the order of the tensors, whichever rank wrote them."""
    files = {name: entry for manifest in manifests for name, entry in manifest.files.items()}
    tensors = {kind: {n: t for m in manifests for n, t in m.tensors.get(kind, {}).items()} for kind in specs}
    ordered = {kind: {spec.name: tensors[kind][spec.name] for spec in specs[kind]} for kind in specs}
    return dict(sorted(files.items())), ordered


def read_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Fill model and optimizer from a folder, each rank its own rows, and return the saved state.

    Optimizer state must exist already (AdamW.materialize). Errors: CheckpointError naming what is missing, surplus, or
    of another shape or type, with both sides; nothing has been changed then.
    """
    manifest = read_manifest(path)
    state: dict[str, Any] = json.loads((path / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    kinds = {"model": model_tensors(model)}
    if optimizer is not None:
        kinds["optimizer"] = optimizer_tensors(model, optimizer)[0]
    for kind, tensors in kinds.items():
        check_same_tensors(path, kind, manifest.tensors.get(kind, {}), tensors)
    for kind, tensors in kinds.items():
        load_tensors(TensorReader(path, kind), tensors)
    return state


def check_same_tensors(path: Path, kind: str, saved: dict[str, Any], wanted: dict[str, Tensor]) -> None:
    """Check that names, shapes and types are the same. Errors: CheckpointError that lists both sides."""
    problems = [f"{name}: is missing" for name in wanted if name not in saved]
    problems += [f"{name}: is in the checkpoint, but the {kind} has none" for name in saved if name not in wanted]
    for name in saved.keys() & wanted.keys():
        found = (saved[name]["shape"], saved[name]["dtype"])
        here = (list(wanted[name].shape), NAME_OF_DTYPE[wanted[name].dtype])
        if found != here:
            problems.append(f"{name}: is {found[1]} {found[0]} in the checkpoint, but {here[1]} {here[0]} here")
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        shown = "\n  ".join(sorted(problems)[:10] + more)
        raise CheckpointError(f"{path}: does not fit this {kind}; use the configuration it was made with:\n  {shown}")


@torch.no_grad()
def load_tensors(reader: TensorReader, tensors: dict[str, Tensor]) -> None:
    """Read each tensor's rows of this rank from disk into its memory."""
    mine = ((local_tensor(tensor), name, shard_range(tensor)[0]) for name, tensor in tensors.items())
    reader.fill(rows for rows in mine if rows[0].numel())
