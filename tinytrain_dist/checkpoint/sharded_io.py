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
from tinytrain_dist.utils.regular_files import read_text


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

    Rank 0 makes the folder, writes what is not a tensor, and commits.

    Args:
        path: the folder, which must not exist; it is written beside as NAME.tmp
        shards: what this rank has of the tensors, by kind, as `collect_shards` returns it
        state: the content of trainer_state.json
        extra_files: content of further files, by name; only rank 0's are written
        max_shard_bytes: size at which a new file of tensors begins, as given to `collect_shards`
        group: the process group; None for the default one
        manifest: an empty one, which tells from outside which file this rank is writing
        permit: called by rank 0 before it makes the folder and before it commits; raises TrainingError to forbid it

    Errors, on every rank, after which nothing is left behind: CheckpointError if `path` exists or a value is not
    finite; a writer's OSError. After a TrainingError of `permit` nothing is touched any more.
    """
    aside = path.with_name(path.name + TEMPORARY_SUFFIX)
    main = collectives.is_main_rank()
    manifest = Manifest() if manifest is None else manifest
    specs = {
        kind: [TensorSpec(shard.name, shard.shape, shard.dtype, shard.must_be_finite) for shard in shards_of_kind]
        for kind, shards_of_kind in shards.items()
    }

    def complete(manifests: list[Manifest]) -> None:
        manifest.files, manifest.tensors = _merge(manifests, specs)
        for kind in specs:
            write_index(aside, kind, specs[kind], max_shard_bytes, manifest)
        for name, data in (extra_files or {}).items():
            write_file(aside, name, data, manifest)
        write_json_file(aside, TRAINER_STATE_FILE, state, manifest)
        permit()
        commit_folder(aside, path, manifest)

    try:
        collectives.run_on_all_ranks(lambda: permit() if main else None, group)
        collectives.run_on_all_ranks(lambda: _make_folder(path, aside) if main else None, group)
        _write_my_files(aside, shards, specs, max_shard_bytes, group, manifest)
        manifests = collectives.all_gather_object(manifest, group)
        collectives.run_on_all_ranks(lambda: complete(manifests) if main else None, group)
    except (OSError, CheckpointError):
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _make_folder(path: Path, aside: Path) -> None:
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
    """Write this rank's files, and send the other writers this rank's rows of theirs; record what was written."""
    rank = collectives.get_rank()
    all_shards = list(itertools.chain(*shards.values()))
    chunks = shard_transfer.recv_shards(all_shards, CHUNKS_IN_FLIGHT, CHUNK_BYTES, group)
    sends = shard_transfer.isend_shards(all_shards, CHUNK_BYTES, group)

    def write() -> None:
        try:
            _wait_for_folder(aside)
            for kind, shards_of_kind in shards.items():
                mine = {spec for spec, shard in zip(specs[kind], shards_of_kind, strict=True) if shard.writer == rank}
                write_tensors(aside, kind, specs[kind], chunks, max_bytes, manifest, mine.__contains__)
        finally:
            # After an error the other ranks still send: receive everything, or they wait forever.
            deque(chunks, maxlen=0)
            shard_transfer.wait_for_sends(sends)

    collectives.run_on_all_ranks(write, group)


def _wait_for_folder(folder: Path, seconds: float = 60.0) -> None:
    """Wait until the folder is visible: a shared file system may show a new folder to other hosts late."""
    deadline = time.monotonic() + seconds
    while not folder.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)


def _merge(manifests: list[Manifest], specs: dict[str, list[TensorSpec]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries of all files by name, and of all tensors in the order of `specs`, from all ranks."""
    files: dict[str, Any] = {}
    tensors: dict[str, dict[str, Any]] = {kind: {} for kind in specs}
    for manifest in manifests:
        files |= manifest.files
        for kind in specs:
            tensors[kind] |= manifest.tensors.get(kind, {})
    in_order = {kind: {spec.name: tensors[kind][spec.name] for spec in specs[kind]} for kind in specs}
    return dict(sorted(files.items())), in_order


def read_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Fill model and optimizer from a folder, each rank its own rows, and return the saved trainer_state.json.

    The optimizer's state must exist already (AdamW.materialize). optimizer: None to load only the model. Errors:
    CheckpointError naming what is missing, surplus, or of another shape or type, with both sides; nothing has been
    changed then.
    """
    manifest = read_manifest(path)
    state: dict[str, Any] = json.loads(read_text(path / TRAINER_STATE_FILE))
    kinds = {"model": model_tensors(model)}
    if optimizer is not None:
        kinds["optimizer"] = optimizer_tensors(model, optimizer)[0]
    for kind, tensors in kinds.items():
        check_same_tensors(path, kind, manifest.tensors.get(kind, {}), tensors)
    for kind, tensors in kinds.items():
        load_tensors(TensorReader(path, kind), tensors)
    return state


def check_same_tensors(path: Path, kind: str, saved: dict[str, Any], wanted: dict[str, Tensor]) -> None:
    """Check that names, shapes and types are the same.

    `saved`: entries of the manifest by name; `wanted`: the tensors to fill. Errors: CheckpointError that lists the
    first ten differences with both sides.
    """
    problems = [f"{name}: is missing" for name in wanted if name not in saved]
    problems += [f"{name}: is in the checkpoint, but the {kind} has none" for name in saved if name not in wanted]
    for name in saved.keys() & wanted.keys():
        saved_shape, saved_dtype = saved[name]["shape"], saved[name]["dtype"]
        shape, dtype = list(wanted[name].shape), NAME_OF_DTYPE[wanted[name].dtype]
        if (saved_shape, saved_dtype) != (shape, dtype):
            problems.append(f"{name}: is {saved_dtype} {saved_shape} in the checkpoint, but {dtype} {shape} here")
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        shown = "\n  ".join(sorted(problems)[:10] + more)
        raise CheckpointError(f"{path}: does not fit this {kind}; use the configuration it was made with:\n  {shown}")


@torch.no_grad()
def load_tensors(reader: TensorReader, tensors: dict[str, Tensor]) -> None:
    """Read this rank's rows of each tensor from disk into its memory."""
    wanted: list[tuple[Tensor, str, int]] = []
    for name, tensor in tensors.items():
        rows = local_tensor(tensor)
        if rows.numel():
            wanted.append((rows, name, shard_range(tensor)[0]))
    reader.fill(wanted)
