"""Write and read one checkpoint folder with all ranks.

Rank 0 alone creates the folder and commits it. Tensors are whole on disk, so that any number of ranks in any mode can
read them. No rank ever holds more than its shards and a few chunks. Must not know the training loop.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinytrain_dist.checkpoint.discovery import read_trainer_state
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
from tinytrain_dist.checkpoint.state_collection import MAX_FILE_BYTES, ShardsByKind, model_tensors, optimizer_tensors
from tinytrain_dist.config.run_folder import TEMPORARY_SUFFIX, TRAINER_STATE_FILE
from tinytrain_dist.distributed import collectives, shard_transfer
from tinytrain_dist.distributed.collectives import Group
from tinytrain_dist.distributed.dtensor import local_tensor, shard_range
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.optim.weight_average import AVERAGE_KEY
from tinytrain_dist.utils.json_files import spell_nonfinite
from tinytrain_dist.utils.progress import Advance, no_progress


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

    Rank 0 makes the folder, writes everything that is not a tensor, and commits.

    Args:
        path: the folder, which must not exist; until the commit it is named NAME.tmp
        shards: this rank's shards, by kind, as `collect_shards` returns them
        state: the content of trainer_state.json
        extra_files: content of further files, by name; only rank 0's are written
        max_shard_bytes: size at which a new file of tensors begins, as given to `collect_shards`
        group: the process group; None for the default one
        manifest: an empty manifest to fill (None: a new one). While this runs, another thread can read from its
            `files_in_progress` which file this rank is writing.
        permit: called by rank 0 before it makes the folder and before it commits; raises TrainingError to forbid it

    Errors, on every rank:

    * CheckpointError if `path` exists or a value is not finite, and OSError if a writer's disk fails. The incomplete
      folder is then deleted.
    * TrainingError if `permit` raises it. Nothing is changed on disk after that.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    is_main = collectives.is_main_rank()
    manifest = Manifest() if manifest is None else manifest
    specs = {
        kind: [TensorSpec(shard.name, shard.shape, shard.dtype, shard.must_be_finite) for shard in shards_of_kind]
        for kind, shards_of_kind in shards.items()
    }

    def finish_and_commit(manifests: list[Manifest]) -> None:
        manifest.files, manifest.tensors = _merge(manifests, specs)
        for kind in specs:
            write_index(temporary, kind, specs[kind], max_shard_bytes, manifest)
        for name, data in (extra_files or {}).items():
            write_file(temporary, name, data, manifest)
        write_json_file(temporary, TRAINER_STATE_FILE, exact_optimizer_values(state), manifest)
        permit()
        commit_folder(temporary, path, manifest)

    try:
        collectives.run_on_all_ranks(lambda: permit() if is_main else None, group)
        collectives.run_on_all_ranks(lambda: _make_folder(path, temporary) if is_main else None, group)
        _write_own_files(temporary, shards, specs, max_shard_bytes, group, manifest)
        manifests = collectives.all_gather_object(manifest, group)
        collectives.run_on_all_ranks(lambda: finish_and_commit(manifests) if is_main else None, group)
    except (OSError, CheckpointError):
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def exact_optimizer_values(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state with numbers of the optimizer that are not finite as texts: JSON would lose them."""
    return {**state, "optimizer": spell_nonfinite(state["optimizer"])} if "optimizer" in state else state


def _make_folder(path: Path, temporary: Path) -> None:
    if path.exists():
        raise CheckpointError(f"{path}: exists already and is not replaced; give another path or delete it")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_own_files(
    temporary: Path,
    shards: ShardsByKind,
    specs: dict[str, list[TensorSpec]],
    max_bytes: int,
    group: Group | None,
    manifest: Manifest,
) -> None:
    """Write the files that are assigned to this rank, and send this rank's rows of all other files to their writers.

    Records in the manifest what was written.
    """
    rank = collectives.get_rank()
    all_shards = list(itertools.chain(*shards.values()))
    chunks = shard_transfer.recv_shards(all_shards, CHUNKS_IN_FLIGHT, CHUNK_BYTES, group)
    sends = shard_transfer.isend_shards(all_shards, CHUNK_BYTES, group)
    all_specs = itertools.chain(*specs.values())
    manifest.bytes_to_write = sum(
        spec.nbytes for spec, shard in zip(all_specs, all_shards, strict=True) if shard.writer == rank
    )

    def write() -> None:
        try:
            _wait_for_folder(temporary)
            for kind, shards_of_kind in shards.items():
                mine = {spec for spec, shard in zip(specs[kind], shards_of_kind, strict=True) if shard.writer == rank}
                write_tensors(temporary, kind, specs[kind], chunks, max_bytes, manifest, mine.__contains__)
        finally:
            # After an error here, the other ranks still send. Receive everything, or they wait forever.
            deque(chunks, maxlen=0)
            shard_transfer.wait_for_sends(sends)

    collectives.run_on_all_ranks(write, group)


def _wait_for_folder(folder: Path, seconds: float = 60.0) -> None:
    """Wait until the folder is visible. A shared file system may show a new folder to other hosts late."""
    deadline = time.monotonic() + seconds
    while not folder.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)


def _merge(manifests: list[Manifest], specs: dict[str, list[TensorSpec]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge the manifests of all ranks; return the files' entries by name, and the tensors' in the order of `specs`."""
    files: dict[str, Any] = {}
    tensors: dict[str, dict[str, Any]] = {kind: {} for kind in specs}
    for manifest in manifests:
        files |= manifest.files
        for kind in specs:
            tensors[kind] |= manifest.tensors.get(kind, {})
    in_order = {kind: {spec.name: tensors[kind][spec.name] for spec in specs[kind]} for kind in specs}
    return dict(sorted(files.items())), in_order


def read_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, advance: Advance = no_progress
) -> dict[str, Any]:
    """Load a folder into model and optimizer, each rank its own rows, and return the saved trainer_state.json.

    optimizer: its state must exist already (Optimizer.materialize); None to load only the model. advance: called with
    the numbers of bytes that this rank has read. If only one of the two has a moving average of the weights, the saved
    one is left out, or the present one begins with the loaded weights.

    Errors: CheckpointError naming the tensors that are missing, surplus, or of another shape or type, with the saved
    and the present shape and type. Nothing has been changed then.
    """
    manifest = read_manifest(path)
    state = read_trainer_state(path)
    kinds = {"model": model_tensors(model)}
    if optimizer is not None:
        kinds["optimizer"] = optimizer_tensors(model, optimizer)[0]
    saved = {kind: manifest.tensors.get(kind, {}) for kind in kinds}
    begins_average = _drop_single_average(saved.get("optimizer", {}), kinds.get("optimizer", {}))
    for kind, tensors in kinds.items():
        check_same_tensors(path, kind, saved[kind], tensors)
    for kind, tensors in kinds.items():
        load_tensors(TensorReader(path, kind), tensors, advance)
    for name, average in begins_average.items():
        local_tensor(average).copy_(local_tensor(kinds["model"][name.removesuffix(f".{AVERAGE_KEY}")]).detach())
    return state


def _drop_single_average(saved: dict[str, Any], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the moving average of the weights from both if one has none; return what was removed from `wanted`."""
    names = [{name for name in names if name.endswith(f".{AVERAGE_KEY}")} for names in (saved, wanted)]
    if all(names):
        return {}
    for name in names[0]:
        saved.pop(name)
    return {name: wanted.pop(name) for name in names[1]}


def bytes_to_read(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return how many bytes `read_checkpoint` reads on this rank."""
    tensors = [*model_tensors(model).values(), *optimizer_tensors(model, optimizer)[0].values()]
    return sum(local_tensor(tensor).nbytes for tensor in tensors)


def check_same_tensors(path: Path, kind: str, saved: dict[str, Any], wanted: dict[str, Tensor]) -> None:
    """Check that names, shapes and types are the same.

    `saved`: the manifest's entries, by name. `wanted`: the tensors to fill. Errors: CheckpointError that lists the
    first ten differences, with the saved and the present shape and type.
    """
    problems = [f"{name}: is missing" for name in wanted if name not in saved]
    problems += [
        f"{name}: is in the checkpoint, but the {kind} has no such tensor" for name in saved if name not in wanted
    ]
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
def load_tensors(reader: TensorReader, tensors: dict[str, Tensor], advance: Advance = no_progress) -> None:
    """Read this rank's rows of each tensor from disk into the tensor. advance: called with numbers of bytes read."""
    wanted: list[tuple[Tensor, str, int]] = []
    for name, tensor in tensors.items():
        rows = local_tensor(tensor)
        if rows.numel():
            wanted.append((rows, name, shard_range(tensor)[0]))
    reader.fill(wanted, advance)
