"""Collect what is saved of a model and an optimizer: tensors by name, plain values, and this rank's shards.

Works with any module and any torch optimizer. Must not know files or folders, except the maximum size of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tinytrain_dist.checkpoint.safetensors_io import NAME_OF_DTYPE, TensorSpec, split_into_files
from tinytrain_dist.distributed.shard_transfer import TensorShard, shard_of
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.parallel.wrappers import original_name, unwrap

MAX_FILE_BYTES = 2 * 1024**3

ShardsByKind = dict[str, list[TensorShard]]  # by kind: "model", "optimizer"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved buffers by original name. A tensor with two names (tied weights) appears only once.

    Errors: CheckpointError for module state that is not a tensor.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in unwrap(model).state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name}: is of type {type(value).__name__}, but only tensors can be saved; make it a buffer"
            )
        if id(value) not in seen:
            seen.add(id(value))
            tensors[original_name(name)] = value
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's state: its tensors by the name PARAMETER.KEY, and everything else as plain values.

    The plain values are {"state": numbers by PARAMETER.KEY, "param_groups": the settings of each group and the names
    of its parameters}. Errors: CheckpointError if a parameter is not the model's, or if a state is neither a tensor nor
    a number.
    """
    names = {id(param): name for name, param in model_tensors(model).items()}
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        unknown = [param for param in group["params"] if id(param) not in names]
        if unknown:
            raise CheckpointError(
                f"the optimizer holds a parameter of shape {list(unknown[0].shape)} that is not the model's; build it "
                "from the parameters of this model"
            )
        groups.append(_group_settings(group, names))
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


def _group_settings(group: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    """Return a parameter group in a form that JSON can hold. `names`: the name of each parameter, by its id()."""
    settings: dict[str, Any] = {}
    for key, value in group.items():
        if key != "params":
            settings[key] = value.item() if isinstance(value, Tensor) else value
    settings["params"] = [names[id(param)] for param in group["params"]]
    return settings


@torch.no_grad()  # otherwise autograd records each to_local, which takes longer than everything else here
def collect_shards(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    max_shard_bytes: int = MAX_FILE_BYTES,
    writers: int | Sequence[int] = 1,
) -> tuple[ShardsByKind, dict[str, Any]]:
    """Return this rank's shards of everything that is saved, without copying, and the optimizer's plain values.

    Args:
        model: the model, in its wrappers
        optimizer: its optimizer; None to save only the model
        max_shard_bytes: size at which a new file begins; `write_checkpoint` must get the same value
        writers: the ranks that write, or their number (then the lowest ranks); each file is assigned to one of them in
            turn

    Errors: CheckpointError for a type that cannot be saved, and the errors of `model_tensors` and `optimizer_tensors`.
    """
    kinds = {"model": model_tensors(model)}
    values: dict[str, Any] = {}
    if optimizer is not None:
        kinds["optimizer"], values = optimizer_tensors(model, optimizer)
    writing_ranks = range(writers) if isinstance(writers, int) else writers
    shards: ShardsByKind = {}
    file_count = 0  # over all kinds
    for kind, tensors in kinds.items():
        shards[kind] = []
        specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
        for file in split_into_files(specs, max_shard_bytes):
            writer = writing_ranks[file_count % len(writing_ranks)]
            file_count += 1
            for spec in file:
                shards[kind].append(_shard_to_save(kind, spec.name, tensors[spec.name], writer))
    return shards, values


def _shard_to_save(kind: str, name: str, tensor: Tensor, writer: int) -> TensorShard:
    if tensor.dtype not in NAME_OF_DTYPE:
        raise CheckpointError(f"{name}: is {tensor.dtype}, which cannot be saved; convert it to real numbers")
    must_be_finite = kind == "optimizer" or isinstance(tensor, nn.Parameter)  # a buffer may hold masks of -inf
    return replace(shard_of(name, tensor, writer), must_be_finite=must_be_finite)
