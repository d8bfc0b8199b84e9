"""Owns checkpoints: what of a run is saved, by whom, when one counts as valid, which is loaded and which are kept.

Must not know the loop. Rank 0 alone lists, creates, writes and deletes; everything else asks it. Tensors are whole on
disk, so that any number of ranks in any mode can read them; no rank holds more than its shards and a few chunks.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinytrain_dist import distributed
from tinytrain_dist.config import TrainingConfig
from tinytrain_dist.distributed import Group, Piece, piece_of
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.huggingface import check_fits
from tinytrain_dist.optim import local
from tinytrain_dist.parallel import original_name, shard_range, unwrap
from tinytrain_dist.tensorfiles import (
    CHUNK_BYTES,
    DTYPES,
    RING,
    STATE,
    TYPES,
    Manifest,
    Spec,
    TensorReader,
    commit,
    cut_into_files,
    problems_in,
    read_manifest,
    write_bytes,
    write_index,
    write_json,
    write_tensors,
)

SHARD_BYTES = 2 * 1024**3


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by original name; a tensor with two names (tied weights) comes once.

    Errors: CheckpointError for module state that is not a tensor.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in unwrap(model).state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: is {type(value).__name__}, but only tensors can be saved; make it a buffer")
        if id(value) not in seen:
            seen.add(id(value))
            found[original_name(name)] = value
    return found


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors named PARAMETER.KEY, and the rest of it as plain values.

    Errors: CheckpointError for a parameter that is not the model's or a state that is neither tensor nor number.
    """
    names = {id(param): name for name, param in model_tensors(model).items()}
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    groups = []
    for group in optimizer.param_groups:
        unknown = [param for param in group["params"] if id(param) not in names]
        if unknown:
            raise CheckpointError(f"the optimizer holds a parameter {list(unknown[0].shape)} that is not the model's")
        settings = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        groups.append({**settings, "params": [names[id(param)] for param in group["params"]]})
        for param in group["params"]:
            for key, value in optimizer.state.get(param, {}).items():
                name = f"{names[id(param)]}.{key}"
                if isinstance(value, Tensor):
                    tensors[name] = value
                elif value is None or isinstance(value, int | float | str | bool):
                    values[name] = value
                else:
                    raise CheckpointError(f"{name}: is {type(value).__name__}; only tensors and numbers can be saved")
    return tensors, {"state": values, "param_groups": groups}


Pieces = dict[str, list[Piece]]  # by kind: "model", "optimizer"


@torch.no_grad()  # otherwise to_local records itself for autograd, which takes longer than all the rest
def pieces_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, max_shard_bytes: int = SHARD_BYTES, writers: int = 1
) -> tuple[Pieces, dict[str, Any]]:
    """What this rank has of everything that is saved, without copying it, and the optimizer's plain values.

    Whole files go to `writers` ranks in turn; the sizes must be those given to `write_checkpoint`.
    """
    kinds, values = {"model": model_tensors(model)}, dict[str, Any]()
    if optimizer is not None:
        kinds["optimizer"], values = optimizer_tensors(model, optimizer)
    pieces: Pieces = {}
    turn = 0
    for kind, tensors in kinds.items():
        pieces[kind] = []
        specs = [Spec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
        for file in cut_into_files(specs, max_shard_bytes):
            for spec in file:
                tensor = tensors[spec.name]
                if tensor.dtype not in DTYPES:
                    raise CheckpointError(
                        f"{spec.name}: is {tensor.dtype}, which cannot be saved; make it real numbers"
                    )
                weight = kind == "optimizer" or isinstance(tensor, nn.Parameter)  # a buffer may hold -inf masks
                pieces[kind].append(replace(piece_of(spec.name, tensor, turn % writers), must_be_finite=weight))
            turn += 1
    return pieces, values


def write_checkpoint(
    path: Path,
    pieces: Pieces,
    state: dict[str, Any],
    extra_files: dict[str, bytes] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
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
    aside, main = path.with_name(path.name + ".tmp"), distributed.is_main()
    manifest = Manifest() if manifest is None else manifest
    specs = {k: [Spec(p.name, p.shape, p.dtype, p.must_be_finite) for p in parts] for k, parts in pieces.items()}
    try:
        distributed.together(lambda: permit() if main else None, group)
        distributed.together(lambda: _prepare(path, aside, main), group)
        _write_my_files(aside, pieces, specs, max_shard_bytes, group, manifest)
        everyone = distributed.gather_to_all(manifest, group)

        def complete() -> None:
            if not main:
                return
            manifest.files, manifest.tensors = _merge(everyone, specs)
            for kind in specs:
                write_index(aside, kind, specs[kind], max_shard_bytes, manifest)
            for name, data in (extra_files or {}).items():
                write_bytes(aside, name, data, manifest)
            write_json(aside, STATE, state, manifest)
            permit()
            commit(aside, path, manifest)

        distributed.together(complete, group)
    except (OSError, CheckpointError):
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _prepare(path: Path, aside: Path, main: bool) -> None:
    if main:
        if path.exists():
            raise CheckpointError(f"{path}: exists already and is not replaced; give another path or delete it")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)


def _write_my_files(
    aside: Path, pieces: Pieces, specs: dict[str, list[Spec]], max_bytes: int, group: Group | None, manifest: Manifest
) -> None:
    """Write the files that are this rank's, while offering the others its rows of theirs; note what was written."""
    order, me = list(itertools.chain(*pieces.values())), distributed.my_rank()
    chunks = distributed.gather_pieces(order, RING, CHUNK_BYTES, group)
    sends = distributed.start_sends(order, CHUNK_BYTES, group)

    def write() -> None:
        try:
            _wait_for_folder(aside)
            for kind, parts in pieces.items():
                mine = {spec for spec, piece in zip(specs[kind], parts, strict=True) if piece.writer == me}
                write_tensors(aside, kind, specs[kind], chunks, max_bytes, manifest, mine.__contains__)
        finally:
            # after an error the others still offer: take it, or they wait for ever
            deque(chunks, maxlen=0)
            distributed.finish_sends(sends)

    distributed.together(write, group)


def _wait_for_folder(folder: Path, seconds: float = 60.0) -> None:
    """A shared file system may show a new folder to other hosts late."""
    deadline = time.monotonic() + seconds
    while not folder.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)


def _merge(manifests: list[Manifest], specs: dict[str, list[Spec]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All files and all tensors, in the order of the tensors, whoever wrote them."""
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
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    kinds = {"model": model_tensors(model)}
    if optimizer is not None:
        kinds["optimizer"] = optimizer_tensors(model, optimizer)[0]
    for kind, tensors in kinds.items():
        _check_same(path, kind, manifest.tensors.get(kind, {}), tensors)
    for kind, tensors in kinds.items():
        load_tensors(TensorReader(path, kind), tensors)
    return state


def _check_same(path: Path, kind: str, saved: dict[str, Any], wanted: dict[str, Tensor]) -> None:
    problems = [f"{name}: is missing" for name in wanted if name not in saved]
    problems += [f"{name}: is in the checkpoint, but the {kind} has none" for name in saved if name not in wanted]
    for name in saved.keys() & wanted.keys():
        found = (saved[name]["shape"], saved[name]["dtype"])
        here = (list(wanted[name].shape), DTYPES[wanted[name].dtype])
        if found != here:
            problems.append(f"{name}: is {found[1]} {found[0]} in the checkpoint, but {here[1]} {here[0]} here")
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        shown = "\n  ".join(sorted(problems)[:10] + more)
        raise CheckpointError(f"{path}: does not fit this {kind}; use the configuration it was made with:\n  {shown}")


@torch.no_grad()
def load_tensors(reader: TensorReader, tensors: dict[str, Tensor]) -> None:
    """Read each tensor's rows of this rank from disk into its memory."""
    mine = ((local(tensor), name, shard_range(tensor)[0]) for name, tensor in tensors.items())
    reader.fill(rows for rows in mine if rows[0].numel())


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out_path: str | Path) -> None:
    """Save any module and torch optimizer as a folder at `out_path`, complete or not at all.

    Needs no process group; with one it is a collective and rank 0 writes. An existing path is never replaced.
    Errors: CheckpointError if out_path exists, or for state that cannot be saved; OSError from the disk.
    """
    pieces, values = pieces_of(model, optimizer)
    write_checkpoint(Path(out_path), pieces, {"step": int(iteration), "optimizer": values})


def load_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, src_path: str | Path) -> int:
    """Load what save_checkpoint (or a training run) wrote and return its iteration.

    Every byte is checked first. The optimizer's settings (learning rate, betas, ...) come back as well.
    Errors: CheckpointError for a damaged folder, or one that does not fit; model and optimizer are unchanged then.
    """
    path = Path(src_path)
    problems = problems_in(path)
    if problems:
        raise CheckpointError("\n".join(problems))
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    _check_same(path, "model", read_manifest(path).tensors.get("model", {}), model_tensors(model))
    _materialize_state(model, optimizer, path, state)
    read_checkpoint(path, model, optimizer)
    for group, saved in zip(optimizer.param_groups, state["optimizer"]["param_groups"], strict=True):
        for key, value in saved.items():
            if key != "params":
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    return int(state["step"])


def _materialize_state(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, state: dict[str, Any]) -> None:
    """Give a torch optimizer, which makes its state lazily, the state tensors that the checkpoint has."""
    saved, params = read_manifest(path).tensors.get("optimizer", {}), model_tensors(model)
    names = {id(param): name for name, param in params.items()}
    groups = state.get("optimizer", {}).get("param_groups", [])
    ours = [[names.get(id(param)) for param in group["params"]] for group in optimizer.param_groups]
    if [group["params"] for group in groups] != ours:
        raise CheckpointError(
            f"{path}: its optimizer has {[len(g['params']) for g in groups]} parameters in its groups, this one "
            f"{[len(group) for group in ours]}, or in another order; build it as when the checkpoint was saved"
        )
    odd = [name for name in (*saved, *state["optimizer"]["state"]) if name.rpartition(".")[0] not in params]
    if odd:
        raise CheckpointError(f"{path}: {odd[0]} is state of no parameter here; use the model it was saved with")
    optimizer.state.clear()
    for (of, _, key), noted in ((name.rpartition("."), noted) for name, noted in saved.items()):
        shape, dtype = noted["shape"], TYPES[noted["dtype"]]
        alike = list(params[of].shape) == shape and len(shape) > 0
        blank = torch.zeros_like(params[of], dtype=dtype) if alike else torch.zeros(shape, dtype=dtype)
        optimizer.state[params[of]][key] = blank
    for name, value in state["optimizer"]["state"].items():
        of, _, key = name.rpartition(".")
        optimizer.state[params[of]][key] = value


def init_from_folder(folder: Path, model: nn.Module, config: TrainingConfig) -> None:
    """Set the weights from a Hugging Face folder of safetensors, each rank its own rows.

    Errors: ConfigError for an architecture or sizes that are not the configuration's; CheckpointError for names or
    shapes that do not fit.
    """
    check_fits(config, folder)
    reader, wanted = TensorReader(folder, "model"), model_tensors(model)
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    surplus = [name for name in reader.files if name not in wanted and name not in ignored and "rotary" not in name]
    problems = [f"{name}: is missing" for name in wanted if name not in reader.files]
    problems += [f"{name}: is not a weight of this model" for name in surplus]
    for name in wanted.keys() & reader.files.keys():
        if reader.spec(name)[0] != tuple(wanted[name].shape):
            problems.append(f"{name}: is {list(reader.spec(name)[0])} there, {list(wanted[name].shape)} here")
    if problems:
        raise CheckpointError(f"init_from = {folder}: does not fit:\n  " + "\n  ".join(sorted(problems)[:10]))
    load_tensors(reader, wanted)
