"""Save and load checkpoints in a training loop of your own: any module with any torch optimizer.

The folders have the format of a training run's checkpoints, but contain no configuration. Must not know runs: one path
is one checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinytrain_dist.checkpoint.discovery import read_trainer_state
from tinytrain_dist.checkpoint.manifest import read_manifest
from tinytrain_dist.checkpoint.safetensors_io import DTYPE_OF_NAME
from tinytrain_dist.checkpoint.sharded_io import check_same_tensors, read_checkpoint, write_checkpoint
from tinytrain_dist.checkpoint.state_collection import collect_shards, model_tensors
from tinytrain_dist.checkpoint.verify import find_damage
from tinytrain_dist.errors import CheckpointError


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out_path: str | Path) -> None:
    """Save any module and torch optimizer as a folder at `out_path`. The folder is complete or does not exist.

    Needs no process group. With a process group, this is a collective and rank 0 writes. An existing path is never
    replaced. Errors: CheckpointError if out_path exists, or for state that cannot be saved; OSError from the disk.
    """
    shards, values = collect_shards(model, optimizer)
    write_checkpoint(Path(out_path), shards, {"step": int(iteration), "optimizer": values})


def load_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, src_path: str | Path) -> int:
    """Load a checkpoint of save_checkpoint or of a training run, and return its iteration.

    Every byte is checked first. The optimizer's settings (learning rate, betas, ...) are restored as well.
    Errors: CheckpointError for a folder that is damaged or does not fit. Model and optimizer are then unchanged.
    """
    path = Path(src_path)
    problems = find_damage(path)
    if problems:
        raise CheckpointError("\n".join(problems))
    state = read_trainer_state(path)
    saved = read_manifest(path).tensors
    params = model_tensors(model)
    # everything is compared before anything is changed
    check_same_tensors(path, "model", saved.get("model", {}), params)
    _check_same_groups(path, params, optimizer, state)
    _check_state_has_parameters(path, params, saved.get("optimizer", {}), state)
    _make_optimizer_state(params, optimizer, saved.get("optimizer", {}), state)
    read_checkpoint(path, model, optimizer)
    for group, saved_group in zip(optimizer.param_groups, state["optimizer"]["param_groups"], strict=True):
        for key, value in saved_group.items():
            if key != "params":
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value  # JSON has only lists
    return int(state["step"])


def _check_same_groups(
    path: Path, params: dict[str, Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Check that the optimizer has the saved parameters in the same groups and order. Errors: CheckpointError."""
    names = {id(param): name for name, param in params.items()}
    saved = [group["params"] for group in state.get("optimizer", {}).get("param_groups", [])]
    present = [[names.get(id(param)) for param in group["params"]] for group in optimizer.param_groups]
    if saved != present:
        raise CheckpointError(
            f"{path}: the saved optimizer has {[len(group) for group in saved]} parameters in its groups, and this one "
            f"has {[len(group) for group in present]}, or has them in another order; build the optimizer as it was "
            "when the checkpoint was saved"
        )


def _check_state_has_parameters(
    path: Path, params: dict[str, Tensor], saved_tensors: dict[str, Any], state: dict[str, Any]
) -> None:
    """Check that every saved state PARAMETER.KEY belongs to a parameter of the model. Errors: CheckpointError."""
    for name in (*saved_tensors, *state.get("optimizer", {}).get("state", {})):
        if name.rpartition(".")[0] not in params:
            raise CheckpointError(
                f"{path}: {name} belongs to a parameter that this model does not have; use the model it was saved with"
            )


def _make_optimizer_state(
    params: dict[str, Tensor], optimizer: torch.optim.Optimizer, saved_tensors: dict[str, Any], state: dict[str, Any]
) -> None:
    """Give the optimizer every state that the checkpoint has: tensors of zeros, and the saved plain values.

    Torch's optimizers create their state in the first step only, and `read_checkpoint` fills only tensors that exist.
    """
    optimizer.state.clear()
    for name, entry in saved_tensors.items():
        param_name, _, key = name.rpartition(".")
        param = params[param_name]
        shape, dtype = entry["shape"], DTYPE_OF_NAME[entry["dtype"]]
        if shape and list(param.shape) == shape:
            zeros = torch.zeros_like(param, dtype=dtype)  # on the parameter's device, and sharded like it
        else:
            zeros = torch.zeros(shape, dtype=dtype)  # not one value for each weight: for example a step count
        optimizer.state[param][key] = zeros
    for name, value in state.get("optimizer", {}).get("state", {}).items():
        param_name, _, key = name.rpartition(".")
        optimizer.state[params[param_name]][key] = value
