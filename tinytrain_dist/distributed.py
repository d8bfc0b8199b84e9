"""Owns the one door to torch.distributed: the launcher's variables, process groups, meshes and every collective.

Must not know models, optimizers or files; the others receive a frozen DistributedContext and ask it.
"""

from __future__ import annotations

import itertools
import math
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinytrain_dist.errors import ConfigError, TinytrainError
from tinytrain_dist.layout import Layout
from tinytrain_dist.meeting import Meeting, adopt_slurm_tasks, meet

Group = dist.ProcessGroup
T = TypeVar("T")
REPLICATE, SHARD = "dp_replicate", "dp_shard"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")  # Linux has them


@dataclass(frozen=True)
class DistributedContext:
    """Who this process is among all. `mesh` and `layout` are set by `with_layout`; a lone process is a world of one.

    `world` is a random word that the ranks of one start share; a restart has another one.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    host: str
    device: torch.device
    world: str = ""
    mesh: DeviceMesh | None = None
    layout: Layout | None = None
    timeout: timedelta | None = None

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints, lists and writes."""
        return self.rank == 0

    @property
    def replica(self) -> int:
        """Index of this rank's replica."""
        return self.rank // self.layout.shard if self.layout else 0

    @property
    def shard(self) -> int:
        """Index of this rank's shard within its replica."""
        return self.rank % self.layout.shard if self.layout else 0

    def with_layout(self, layout: Layout) -> DistributedContext:
        """This context on a (replicate, shard) mesh. A collective: every rank calls it with the same layout."""
        mesh = init_device_mesh(self.device.type, (layout.replicate, layout.shard), mesh_dim_names=(REPLICATE, SHARD))
        if self.timeout is not None:  # torch gives a mesh ten minutes on NCCL, whatever is set elsewhere
            for axis in (REPLICATE, SHARD):
                dist.distributed_c10d._set_pg_timeout(self.timeout, mesh.get_group(axis))
        return replace(self, mesh=mesh, layout=layout)

    def on_cpu(self) -> DistributedContext:
        """The same ranks and groups with tensors on the CPU, made without a word to the others."""
        if self.mesh is None or self.device.type == "cpu":
            return replace(self, device=torch.device("cpu"))
        names = (REPLICATE, SHARD)
        groups = [self.mesh.get_group(name) for name in names]
        mesh = DeviceMesh.from_group(groups, "cpu", self.mesh.mesh, mesh_dim_names=names)
        return replace(self, device=torch.device("cpu"), mesh=mesh)

    def group(self, axis: str | None = None) -> Group | None:
        """The ranks along one axis of the mesh, or with None all of them."""
        assert axis is None or self.mesh is not None, "with_layout comes first"
        return None if axis is None or self.mesh is None else self.mesh.get_group(axis)

    def all_reduce_sum(self, tensor: Tensor, axis: str | None = None) -> Tensor:
        """Sum `tensor` over the ranks of an axis, in place; returns it."""
        dist.all_reduce(tensor, group=self.group(axis))
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Everybody's value, by rank, on every rank."""
        return gather_to_all(value)

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Everybody's numbers, as many from each, by rank, on every rank; over the CPU, and without pickling."""
        everyone = torch.empty(self.world_size * len(values), dtype=torch.float64)
        all_gather(everyone, torch.tensor(values, dtype=torch.float64), None)
        rows: list[list[float]] = everyone.view(self.world_size, -1).tolist()
        return rows

    def broadcast_object(self, value: Any, group: Group | None = None) -> Any:
        """Rank 0's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=group, device=torch.device("cpu"))
        return values[0]

    def swap(self, tensor: Tensor, peer: int) -> Tensor:
        """The peer's tensor for ours; both call it at the same time."""
        theirs = torch.empty_like(tensor)
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, theirs, peer)]
        ):
            work.wait()
        return theirs

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather_objects(None)

    def start_vote(self, flag: bool) -> Vote:
        """Ask all ranks whether any has raised `flag`, on the CPU and in the background; see `Vote`."""
        ballot = torch.tensor([int(flag)], dtype=torch.int32)
        return Vote(ballot, dist.all_reduce(ballot, op=dist.ReduceOp.MAX, async_op=True))

    def agree(self, flag: bool) -> bool:
        """True on every rank if any rank says True; the only way to decide something that binds all."""
        return self.start_vote(flag).result()


@dataclass
class Vote:
    """A question under way to all ranks; `result` waits for the answer, which by the next step is long there."""

    ballot: Tensor
    work: Any

    def result(self) -> bool:
        """True if any rank raised its flag."""
        self.work.wait()
        return bool(self.ballot.item())


class Unsent(TorchDispatchMode):
    """While it is on, collectives move nothing and end at once, so that no rank waits for another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run anything but a collective; of one, hand back its buffers as they are."""
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        place = next(i for i, argument in enumerate(func._schema.arguments) if argument.name == "process_group")
        group = dist.ProcessGroup.unbox(args[place])
        tensors = [leaf for leaf in tree_leaves(args[:place]) if isinstance(leaf, Tensor)]
        self.message(func.__name__, tensors, tuple(dist.get_process_group_ranks(group)))
        from torch._C._distributed_c10d import FakeWork

        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    def message(self, name: str, tensors: list[Tensor], ranks: tuple[int, ...]) -> None:
        """Called with the operation and its buffers in place of sending."""


def pretend(world_size: int, local_world_size: int) -> DistributedContext:
    """Rank 0 of a world that is not there: groups and meshes can be made, nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    return DistributedContext(0, 0, world_size, local_world_size, socket.gethostname(), torch.device("cpu"))


def start(
    device: str = "auto",
    timeout_seconds: float = 1800.0,
    meeting: Meeting | None = None,
    traces: Path | None = None,
) -> DistributedContext:
    """Join the world torchrun (or Slurm's own tasks) describes; alone, make a world of one.

    device: auto takes cuda where there is one. meeting: what `meet` gave, else it is called. traces: where NCCL's
    flight recorder goes when a collective times out.
    Errors: ConfigError if cuda is asked for and there is none, and those of `meet`.
    """
    if traces is not None:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(traces / "nccl_trace_rank_"))
    if HUGE_PAGES.exists():  # torch reads this at its first tensor; a step on two CPU cores takes 5 % less
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    meeting = meeting or meet()
    rank, world_size = meeting.rank, len(meeting.hosts)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"device: this host has {torch.cuda.device_count()} GPU(s), but process {local_rank + 1} of "
            f"{local_world_size} needs one; start fewer processes, or set device = cpu"
        )
    place = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(
        backend,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=place if cuda else None,
        store=meeting.store,
        rank=rank,
        world_size=world_size,
    )
    context = DistributedContext(rank, local_rank, world_size, local_world_size, socket.gethostname(), place)
    context = replace(context, timeout=timedelta(seconds=timeout_seconds))
    # nobody leaves with an error while others still join, and drowns it in theirs
    return replace(context, world=context.gather_objects(secrets.token_hex(8))[0])


def flight_record() -> bytes:
    """The last collectives of this rank as JSON, for when it hangs; b"" where torch does not keep them."""
    from torch._C import _distributed_c10d as c10d

    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # the second one knows gloo too, since torch 2.13
        if hasattr(c10d, name):
            return bytes(getattr(c10d, name)(True, False))
    return b""


def close() -> None:
    """Leave the world."""
    if dist.is_initialized():
        dist.destroy_process_group()


def who() -> tuple[int, int, str]:
    """Rank and number of ranks by the launcher's word, and host; also before and without a process group."""
    adopt_slurm_tasks()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), socket.gethostname()


def is_main() -> bool:
    """Whether this is rank 0, or there are no ranks."""
    return my_rank() == 0


def raise_together(error: Exception | None, group: Group | None = None) -> None:
    """Raise the first failing rank's error on every rank, after each has said how its part went. A collective."""
    for found in gather_to_all(error, group):
        if found is not None:
            raise found


def together(action: Callable[[], T], group: Group | None = None) -> T:
    """Do it on every rank; where a file or a user makes it fail on any of them, raise that on all. A collective."""
    result: list[T] = []
    error: Exception | None = None
    try:
        result.append(action())
    except (TinytrainError, OSError) as caught:
        error = caught
    raise_together(error, group)
    return result[0]


# chunks that are asked for before they are used: one that comes unasked makes gloo's thread spin. Rank 0 took 1.8 s of
# processor time to save 0.7 GB, half of it its own, when none was asked for before; 1.1 s with eight
AHEAD = 8


@dataclass(frozen=True)
class Piece:
    """What this rank has of one tensor: the rows it trains with (`held`), and of these what goes to disk (`local`).

    `ranks` together hold all rows that are saved; a rank that is not among them, a replica, has none in `local`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    held: Tensor
    local: Tensor
    ranks: tuple[int, ...]
    writer: int = 0
    must_be_finite: bool = True


def my_rank() -> int:
    """This process's rank; 0 where there are no ranks."""
    return dist.get_rank() if dist.is_initialized() else 0


def piece_of(name: str, tensor: Tensor, writer: int = 0) -> Piece:
    """The piece of a plain tensor (every rank has it all) or of one sharded over axis 0 (DTensor; the first replica).

    Errors: ValueError for another sharding.
    """
    held, ranks = tensor.detach(), tuple[int, ...]((writer,))
    if isinstance(tensor, DTensor):
        sharding = tensor.placements[-1]
        if not (isinstance(sharding, Shard) and sharding.dim == 0):
            raise ValueError(f"{name}: only tensors sharded over axis 0 can be saved, got {tensor.placements}")
        held, ranks = tensor.to_local().detach(), _first_replica(tensor.device_mesh)
    saved = held if my_rank() in ranks else held.new_empty(0)
    return Piece(name, tuple(tensor.shape), tensor.dtype, held, saved, ranks, writer)


@cache  # a mesh takes 0.1 ms to say who is in it, for each of a model's tensors
def _first_replica(mesh: DeviceMesh) -> tuple[int, ...]:
    """HSDP: it has everything; where each replica has a mesh of its own, only the writer's place matters."""
    ranks = mesh.mesh
    return tuple(range(ranks.shape[-1])) if 0 not in ranks else tuple(ranks.view(-1, ranks.shape[-1])[0].tolist())


def start_sends(pieces: Sequence[Piece], chunk_bytes: int, group: Group | None = None) -> list[tuple[Any, Tensor]]:
    """Offer this rank's rows of all tensors that others write, without waiting; hand the result to `finish_sends`."""
    sends: list[tuple[Any, Tensor]] = []
    for number, piece in enumerate(pieces):
        if my_rank() in piece.ranks and piece.writer != my_rank() and piece.local.numel():
            for part in _parts(piece, chunk_bytes):
                sends.append((dist.isend(part, dst=piece.writer, group=group, tag=number), part))
    return sends


def _parts(piece: Piece, chunk_bytes: int) -> tuple[Tensor, ...]:
    """This rank's rows on the CPU, flat, in chunks; not a copy where they lie there already."""
    flat = piece.local.cpu().contiguous().view(-1)
    return torch.split(flat, chunk_bytes // piece.dtype.itemsize)


def finish_sends(sends: list[tuple[Any, Tensor]]) -> None:
    """Wait until everything offered was taken."""
    for work, _ in sends:
        work.wait()


def gather_pieces(pieces: Sequence[Piece], kept: int, chunk_bytes: int, group: Group | None = None) -> Iterator[Tensor]:
    """All tensors that this rank writes, whole, in order, in flat chunks on the CPU; the others `start_sends` the same.

    What they send goes into kept + AHEAD buffers of chunk_bytes each, so that the writer holds no whole tensor: a chunk
    is good until `kept` others have been given.
    """
    me, ring = my_rank(), itertools.cycle([torch.empty(chunk_bytes, dtype=torch.uint8) for _ in range(kept + AHEAD)])

    def ask() -> Iterator[tuple[Any, Tensor]]:
        for number, piece in enumerate(pieces):
            for index, source in enumerate(piece.ranks if piece.writer == me else ()):
                if source == me:
                    yield from ((None, part) for part in _parts(piece, chunk_bytes))
                    continue
                most, row = -(-piece.shape[0] // len(piece.ranks)), math.prod(piece.shape[1:]) * piece.dtype.itemsize
                left = max(0, min(most, piece.shape[0] - index * most)) * row
                while left:
                    part = next(ring)[: min(left, chunk_bytes)].view(piece.dtype)
                    left -= part.nbytes
                    yield dist.irecv(part, src=source, group=group, tag=number), part

    asked = ask()
    coming = deque(itertools.islice(asked, AHEAD))
    while coming:
        work, part = coming.popleft()
        if work is not None:
            work.wait()
        yield part
        coming.extend(itertools.islice(asked, 1))


def gather_to_all(value: Any, group: Group | None = None) -> list[Any]:
    """Everybody's value, by rank, on every rank; alone, just this one."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def background_group() -> Group | None:
    """A group of all ranks for work beside training, over the CPU; its messages meet nobody else's."""
    # a save may take longer than torch's half an hour, and ends the run only where somebody waits for it
    return dist.new_group(backend="gloo", timeout=timedelta(days=30)) if dist.is_initialized() else None


def group_size(group: Group | None) -> int:
    """Number of ranks in a group."""
    return dist.get_world_size(group)


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Give every rank rank 0's values, in place."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)


def all_to_all(output: Tensor, input: Tensor, group: Group | None, wait: bool = True) -> Any:
    """Part i of `input` goes to rank i of the group, which puts it into part (my index) of its `output`.

    wait=False returns a handle with wait(); the tensors must stay alive until then. So for `all_gather`.
    """
    return dist.all_to_all_single(output, input, group=group, async_op=not wait)


def over_gloo() -> bool:
    """Whether training's own messages go over gloo, whose ring collectives are slow (see `all_gather`)."""
    return dist.get_backend() == "gloo"


class Exchange(dist.Work):
    """Messages under way, as one handle."""

    def __init__(self, works: list[Any]) -> None:
        super().__init__()
        self._works = works

    def wait(self, *_: Any) -> bool:
        """Until all have arrived and left."""
        return all([work.wait() for work in self._works])


def all_gather(output: Tensor, input: Tensor | None, group: Group | None, wait: bool = True) -> Any:
    """Everybody's `input`, by rank, into the parts of `output`; None, over gloo only: the own part is there already.

    Over gloo each rank sends its own to each other one: the same bytes as the ring of gloo's all-gather, which takes
    2.7 times as long (measured, two ranks: 67 ms for 40 MB, and 25).
    """
    if over_gloo():
        me, parts = dist.get_rank(group), output.view(group_size(group), -1)
        others = [rank for rank in range(len(parts)) if rank != me]
        if input is not None:
            parts[me].copy_(input.view(-1))
        receiving = [dist.irecv(parts[rank], group=group, group_src=rank) for rank in others]
        work = Exchange([*receiving, *(dist.isend(parts[me], group=group, group_dst=rank) for rank in others)])
        return work if not wait else work.wait()
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13
    return gather(output, input, group=group, async_op=not wait)


def start_sum(tensor: Tensor, group: Group | None) -> torch.futures.Future[Tensor]:
    """Sum `tensor` over the group in place; the future holds it when that is done."""
    work: Any = dist.all_reduce(tensor, group=group, async_op=True)
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda _: tensor)
    return summed
