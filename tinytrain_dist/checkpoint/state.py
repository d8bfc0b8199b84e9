"""Collect what is saved of a model and an optimizer: tensors by name, plain values, and this rank's shards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tinytrain_dist.checkpoint.safetensors_io import NAME_OF_DTYPE, TensorSpec, split_into_files
from tinytrain_dist.distributed.shard_transfer import TensorShard, shard_of
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.parallel.wrappers import original_name, unwrap

MAX_FILE_BYTES = 2 * 1024**3


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
    """Return the optimizer's state as tensors named PARAMETER.KEY, and the rest of it as plain values.

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


ShardsByKind = dict[str, list[TensorShard]]  # by kind: "model", "optimizer"


@torch.no_grad()  # otherwise to_local records itself for autograd, which takes longer than all the rest
def collect_shards(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, max_shard_bytes: int = MAX_FILE_BYTES, writers: int = 1
) -> tuple[ShardsByKind, dict[str, Any]]:
    """Return this rank's shards of everything that is saved, without a copy, and the optimizer's plain values.

    Whole files go to `writers` ranks in turn; the sizes must be those given to `write_checkpoint`.
    """
    kinds, values = {"model": model_tensors(model)}, dict[str, Any]()
    if optimizer is not None:
        kinds["optimizer"], values = optimizer_tensors(model, optimizer)
    shards: ShardsByKind = {}
    turn = 0
    for kind, tensors in kinds.items():
        shards[kind] = []
        specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
        for file in split_into_files(specs, max_shard_bytes):
            for spec in file:
                tensor = tensors[spec.name]
                if tensor.dtype not in NAME_OF_DTYPE:
                    raise CheckpointError(
                        f"{spec.name}: is {tensor.dtype}, which cannot be saved; make it real numbers"
                    )
                weight = kind == "optimizer" or isinstance(tensor, nn.Parameter)  # a buffer may hold -inf masks
                shards[kind].append(replace(shard_of(spec.name, tensor, turn % writers), must_be_finite=weight))
            turn += 1
    return shards, values
