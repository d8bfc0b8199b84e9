"""Plain facts about sharded tensors: the local part, its rows, its bytes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this rank, sharing memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_rows(rows: int, shards: int, index: int) -> tuple[int, int]:
    """First and last + 1 row of shard `index`: chunks of ceil(rows / shards), the last ones short or empty."""
    chunk = -(-rows // shards)
    return min(rows, index * chunk), min(rows, (index + 1) * chunk)


def shard_range(tensor: Tensor) -> tuple[int, int]:
    """First and last + 1 row of a parameter that lie on this rank."""
    if not isinstance(tensor, DTensor) or not tensor.ndim:
        return 0, tensor.shape[0] if tensor.ndim else 1
    return shard_rows(tensor.shape[0], *_shard_count_and_index(tensor.device_mesh))


@functools.cache  # a mesh takes 0.1 ms to say it, which counts for hundreds of tensors
def _shard_count_and_index(mesh: DeviceMesh) -> tuple[int, int]:
    """How many shards there are, and which this rank has: FSDP shards over the last axis."""
    return mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)


def tensor_bytes(value: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    array: Any = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
    return memoryview(array)
