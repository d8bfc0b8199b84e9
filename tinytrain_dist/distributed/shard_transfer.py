"""Move the shards of tensors to the ranks that write them to disk, in chunks.

Every rank calls `isend_shards` for what other ranks write, then `recv_shards` for what it writes itself, then
`wait_for_sends`, with the same list of shards in the same order. Must not know files.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tinytrain_dist.distributed.collectives import Group, get_rank

# How many chunks a writer requests before it uses them: a message that nobody has requested makes gloo's thread spin.
# measured (2-core x86 VM, 2026-11-25): processor time of rank 0 to save 0.7 GB, half of it its own: none requested
# ahead 1.8 s, eight 1.1 s
RECEIVES_AHEAD = 8


@dataclass(frozen=True)
class TensorShard:
    """What this rank has of one tensor: the rows it trains with, and of these the rows that it sends or writes.

    * `name`, `shape`, `dtype`: of the whole tensor.
    * `local_rows`: the rows on this rank, on its device.
    * `rows_to_save`: the same rows, or empty if this rank is not in `ranks`, as in all replicas but one.
    * `ranks`: the ranks that together hold all rows that are saved, in the order of rows.
    * `writer`: the rank that writes the tensor to disk.
    * `must_be_finite`: whether a value that is not finite must stop the save.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    local_rows: Tensor
    rows_to_save: Tensor
    ranks: tuple[int, ...]
    writer: int = 0
    must_be_finite: bool = True


def shard_of(name: str, tensor: Tensor, writer: int = 0) -> TensorShard:
    """Return this rank's shard of a tensor. Needs no communication.

    A plain tensor is whole on every rank, and its writer saves its own. A DTensor must be sharded over dim 0 along the
    last mesh axis; the first replica saves it. Errors: ValueError for another sharding.
    """
    local_rows = tensor.detach()
    ranks: tuple[int, ...] = (writer,)
    if isinstance(tensor, DTensor):
        sharding = tensor.placements[-1]
        if not (isinstance(sharding, Shard) and sharding.dim == 0):
            raise ValueError(f"{name}: only tensors sharded over dim 0 can be saved, got {tensor.placements}")
        local_rows = tensor.to_local().detach()
        ranks = _first_replica_ranks(tensor.device_mesh)
    rows_to_save = local_rows if get_rank() in ranks else local_rows.new_empty(0)
    return TensorShard(name, tuple(tensor.shape), tensor.dtype, local_rows, rows_to_save, ranks, writer)


@cache  # a DeviceMesh lookup costs 0.1 ms, and there are hundreds of tensors
def _first_replica_ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    """Return the ranks of the first replica.

    With a mesh over all ranks that is its first row. In a mesh of one replica's own ranks without rank 0, the numbers
    do not matter except the order, so 0 .. n - 1 are returned: this replica saves nothing, or is asked by its index.
    """
    ranks = mesh.mesh
    return tuple(range(ranks.shape[-1])) if 0 not in ranks else tuple(ranks.view(-1, ranks.shape[-1])[0].tolist())


def isend_shards(
    shards: Sequence[TensorShard], chunk_bytes: int, group: Group | None = None
) -> list[tuple[Any, Tensor]]:
    """Start sending this rank's rows of all tensors that other ranks write; hand the result to `wait_for_sends`.

    Every rank of the group calls it; does not block. The result holds the handles, and the memory they send from.
    """
    sends: list[tuple[Any, Tensor]] = []
    for tag, shard in enumerate(shards):
        if get_rank() in shard.ranks and shard.writer != get_rank() and shard.rows_to_save.numel():
            for chunk in _chunks(shard, chunk_bytes):
                sends.append((dist.isend(chunk, dst=shard.writer, group=group, tag=tag), chunk))
    return sends


def wait_for_sends(sends: list[tuple[Any, Tensor]]) -> None:
    """Block until the writers have received everything that `isend_shards` sends."""
    for work, _ in sends:
        work.wait()


def recv_shards(
    shards: Sequence[TensorShard],
    kept: int,
    chunk_bytes: int,
    group: Group | None = None,
) -> Iterator[Tensor]:
    """Yield all tensors that this rank writes, whole and in order, as flat chunks on the CPU of `chunk_bytes` at most.

    The other ranks of the group call `isend_shards` with the same shards. Blocks until the next chunk is here.
    Received chunks share `kept` + RECEIVES_AHEAD buffers, so that a writer holds no whole tensor of another rank: a
    chunk may be used until `kept` further ones have been yielded.
    """
    requests = _request_chunks(shards, kept, chunk_bytes, group)
    requested = deque(itertools.islice(requests, RECEIVES_AHEAD))
    while requested:
        work, chunk = requested.popleft()
        if work is not None:
            work.wait()
        yield chunk
        requested.extend(itertools.islice(requests, 1))


def _request_chunks(
    shards: Sequence[TensorShard], kept: int, chunk_bytes: int, group: Group | None
) -> Iterator[tuple[Any, Tensor]]:
    """Yield (handle, chunk) in the order of rows, starting each receive when it is asked for.

    The handle is None for this rank's own rows, which are there already.
    """
    rank = get_rank()
    buffers = [torch.empty(chunk_bytes, dtype=torch.uint8) for _ in range(kept + RECEIVES_AHEAD)]
    next_buffer = itertools.cycle(buffers)
    for tag, shard in enumerate(shards):
        if shard.writer != rank:
            continue
        for index, source in enumerate(shard.ranks):
            if source == rank:
                yield from ((None, chunk) for chunk in _chunks(shard, chunk_bytes))
                continue
            bytes_left = _bytes_of_shard(shard, index)
            while bytes_left:
                chunk = next(next_buffer)[: min(bytes_left, chunk_bytes)].view(shard.dtype)
                bytes_left -= chunk.nbytes
                yield dist.irecv(chunk, src=source, group=group, tag=tag), chunk


def _bytes_of_shard(shard: TensorShard, index: int) -> int:
    """Return how many bytes the rank `shard.ranks[index]` holds: ceil(rows / ranks) rows, fewer or none at the end."""
    rows_per_rank = -(-shard.shape[0] // len(shard.ranks))
    rows = max(0, min(rows_per_rank, shard.shape[0] - index * rows_per_rank))
    return rows * math.prod(shard.shape[1:]) * shard.dtype.itemsize


def _chunks(shard: TensorShard, chunk_bytes: int) -> tuple[Tensor, ...]:
    """Return this rank's rows on the CPU, flat, in chunks; views of its memory where they lie there already."""
    flat = shard.rows_to_save.cpu().contiguous().view(-1)
    return torch.split(flat, chunk_bytes // shard.dtype.itemsize)
