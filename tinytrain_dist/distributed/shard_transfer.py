"""Send tensor shards to the ranks that write them, in chunks, without a whole tensor on any rank."""

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

# chunks that are asked for before they are used: one that comes unasked makes gloo's thread spin. Rank 0 took 1.8 s of
# processor time to save 0.7 GB, half of it its own, when none was asked for before; 1.1 s with eight
RECEIVES_AHEAD = 8


@dataclass(frozen=True)
class TensorShard:
    """What this rank has of one tensor: the rows it trains with, and of these the rows that go to disk.

    `ranks` together hold all rows that are saved; a rank that is not among them, a replica, has none in `rows_to_save`.
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
    """Return the shard of a plain tensor (every rank has it all) or of a DTensor sharded over axis 0.

    Errors: ValueError for another sharding.
    """
    held, ranks = tensor.detach(), tuple[int, ...]((writer,))
    if isinstance(tensor, DTensor):
        sharding = tensor.placements[-1]
        if not (isinstance(sharding, Shard) and sharding.dim == 0):
            raise ValueError(f"{name}: only tensors sharded over axis 0 can be saved, got {tensor.placements}")
        held, ranks = tensor.to_local().detach(), _first_replica_ranks(tensor.device_mesh)
    saved = held if get_rank() in ranks else held.new_empty(0)
    return TensorShard(name, tuple(tensor.shape), tensor.dtype, held, saved, ranks, writer)


@cache  # a mesh takes 0.1 ms to say who is in it, for each of a model's tensors
def _first_replica_ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    """HSDP: it has everything; where each replica has a mesh of its own, only the writer's place matters."""
    ranks = mesh.mesh
    return tuple(range(ranks.shape[-1])) if 0 not in ranks else tuple(ranks.view(-1, ranks.shape[-1])[0].tolist())


def isend_shards(
    shards: Sequence[TensorShard], chunk_bytes: int, group: Group | None = None
) -> list[tuple[Any, Tensor]]:
    """Offer this rank's rows of all tensors that others write, without waiting; hand the result to `finish_sends`."""
    sends: list[tuple[Any, Tensor]] = []
    for number, shard in enumerate(shards):
        if get_rank() in shard.ranks and shard.writer != get_rank() and shard.rows_to_save.numel():
            for part in _chunks(shard, chunk_bytes):
                sends.append((dist.isend(part, dst=shard.writer, group=group, tag=number), part))
    return sends


def _chunks(shard: TensorShard, chunk_bytes: int) -> tuple[Tensor, ...]:
    """Return this rank's rows on the CPU, flat, in chunks; not a copy where they lie there already."""
    flat = shard.rows_to_save.cpu().contiguous().view(-1)
    return torch.split(flat, chunk_bytes // shard.dtype.itemsize)


def wait_for_sends(sends: list[tuple[Any, Tensor]]) -> None:
    """Wait until everything offered was taken."""
    for work, _ in sends:
        work.wait()


def recv_shards(
    shards: Sequence[TensorShard], kept: int, chunk_bytes: int, group: Group | None = None
) -> Iterator[Tensor]:
    """All tensors that this rank writes, whole, in order, in flat chunks on the CPU; the others `start_sends` the same.

    What they send goes into kept + AHEAD buffers of chunk_bytes each, so that the writer holds no whole tensor: a chunk
    is good until `kept` others have been given.
    """
    me, ring = (
        get_rank(),
        itertools.cycle([torch.empty(chunk_bytes, dtype=torch.uint8) for _ in range(kept + RECEIVES_AHEAD)]),
    )

    def ask() -> Iterator[tuple[Any, Tensor]]:
        for number, shard in enumerate(shards):
            for index, source in enumerate(shard.ranks if shard.writer == me else ()):
                if source == me:
                    yield from ((None, part) for part in _chunks(shard, chunk_bytes))
                    continue
                most, row = -(-shard.shape[0] // len(shard.ranks)), math.prod(shard.shape[1:]) * shard.dtype.itemsize
                left = max(0, min(most, shard.shape[0] - index * most)) * row
                while left:
                    part = next(ring)[: min(left, chunk_bytes)].view(shard.dtype)
                    left -= part.nbytes
                    yield dist.irecv(part, src=source, group=group, tag=number), part

    asked = ask()
    coming = deque(itertools.islice(asked, RECEIVES_AHEAD))
    while coming:
        work, part = coming.popleft()
        if work is not None:
            work.wait()
        yield part
        coming.extend(itertools.islice(asked, 1))
