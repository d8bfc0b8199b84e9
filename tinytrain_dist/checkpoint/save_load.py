"""Save and load checkpoints of own training loops: any module with any torch optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinytrain_dist.checkpoint.manifest import read_manifest
from tinytrain_dist.checkpoint.safetensors_io import DTYPE_OF_NAME
from tinytrain_dist.checkpoint.sharded_io import check_same_tensors, read_checkpoint, write_checkpoint
from tinytrain_dist.checkpoint.state import collect_shards, model_tensors
from tinytrain_dist.checkpoint.verify import find_damage
from tinytrain_dist.config.run_folder import TRAINER_STATE_FILE
from tinytrain_dist.errors import CheckpointError


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out_path: str | Path) -> None:
    """Save any module and torch optimizer as a folder at `out_path`, complete or not at all.

    Needs no process group; with one it is a collective and rank 0 writes. An existing path is never replaced.
    Errors: CheckpointError if out_path exists, or for state that cannot be saved; OSError from the disk.
    """
    shards, values = collect_shards(model, optimizer)
    write_checkpoint(Path(out_path), shards, {"step": int(iteration), "optimizer": values})


def load_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, src_path: str | Path) -> int:
    """Load what save_checkpoint (or a training run) wrote and return its iteration.

    Every byte is checked first. The optimizer's settings (learning rate, betas, ...) come back as well.
    Errors: CheckpointError for a damaged folder, or one that does not fit; model and optimizer are unchanged then.
    """
    path = Path(src_path)
    problems = find_damage(path)
    if problems:
        raise CheckpointError("\n".join(problems))
    state: dict[str, Any] = json.loads((path / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    check_same_tensors(path, "model", read_manifest(path).tensors.get("model", {}), model_tensors(model))
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
        shape, dtype = noted["shape"], DTYPE_OF_NAME[noted["dtype"]]
        alike = list(params[of].shape) == shape and len(shape) > 0
        blank = torch.zeros_like(params[of], dtype=dtype) if alike else torch.zeros(shape, dtype=dtype)
        optimizer.state[params[of]][key] = blank
    for name, value in state["optimizer"]["state"].items():
        of, _, key = name.rpartition(".")
        optimizer.state[params[of]][key] = value
