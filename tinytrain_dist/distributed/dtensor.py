"""Find the part of a tensor that this rank holds.

FSDP's DTensors are sharded over tensor dim 0 along the last axis of their mesh. A plain tensor counts as whole on every
rank. Importing DTensor takes as long as half of torch, so it is left to FSDP, which makes them.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tinytrain_dist.distributed.parallel_dims import shard_rows as shard_rows
from tinytrain_dist.distributed.torch_internals import with_local_part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Return whether a value is a DTensor; does not import DTensor, because without that import there is none."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(value, kind)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, sharing its memory. A plain tensor is returned as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def copy_of(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a tensor, sharded in the same way, whose local part is on `device`.

    A DTensor on another device than its mesh can be saved and loaded, but not computed with.
    """
    local = local_tensor(tensor).detach().to(device, copy=True)
    return with_local_part(tensor, local) if is_dtensor(tensor) else local


def shard_range(tensor: Tensor) -> tuple[int, int]:
    """Return the first row of a parameter on this rank, and the row after the last one. A scalar has one row."""
    if not is_dtensor(tensor) or not tensor.ndim:
        return 0, tensor.shape[0] if tensor.ndim else 1
    return shard_rows(tensor.shape[0], *_shard_count_and_index(tensor.device_mesh))


@functools.cache  # a DeviceMesh lookup costs 0.1 ms, and there are hundreds of tensors
def _shard_count_and_index(mesh: DeviceMesh) -> tuple[int, int]:
    """Return the number of shards and the index of this rank's shard, along the last axis of the mesh."""
    last_axis = mesh.ndim - 1
    return mesh.size(last_axis), mesh.get_local_rank(last_axis)


def tensor_bytes(value: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes, without a copy."""
    array: Any = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
    return memoryview(array)
