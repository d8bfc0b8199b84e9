"""Owns the one door to torch.distributed: the launcher's variables, process groups, meshes and every collective.

Must not know models, optimizers or files; the others receive a frozen DistributedContext and ask it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tinytrain_dist.errors import ConfigError, TinytrainError
from tinytrain_dist.layout import Layout

Group = dist.ProcessGroup
T = TypeVar("T")
REPLICATE, SHARD = "dp_replicate", "dp_shard"


@dataclass(frozen=True)
class DistributedContext:
    """Who this process is among all. `mesh` and `layout` are set by `with_layout`; a lone process is a world of one."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    host: str
    device: torch.device
    mesh: DeviceMesh | None = None
    layout: Layout | None = None

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
        return replace(self, mesh=mesh, layout=layout)

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

    def broadcast_object(self, value: Any, group: Group | None = None) -> Any:
        """Rank 0's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=group, device=torch.device("cpu"))
        return values[0]

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


def start(device: str = "auto", timeout_seconds: float = 1800.0) -> DistributedContext:
    """Join the world torchrun (or Slurm's own tasks) describes; alone, make a world of one.

    device: auto takes cuda where there is one. Errors: ConfigError if cuda is asked for and there is none.
    """
    _adopt_slurm_tasks()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
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
    timeout = timedelta(seconds=timeout_seconds)
    lone: dict[str, Any] = {}
    if "RANK" not in os.environ:
        lone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=timeout, device_id=place if cuda else None, **lone)
    context = DistributedContext(rank, local_rank, world_size, local_world_size, socket.gethostname(), place)
    context.barrier()  # nobody leaves with an error while others still join, and drowns it in theirs
    return context


def _adopt_slurm_tasks() -> None:
    """Take Slurm's names for rank and world where its tasks are the processes (`srun --ntasks-per-node=N`)."""
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or "MASTER_ADDR" not in env:
        return
    env.update(
        RANK=env["SLURM_PROCID"],
        WORLD_SIZE=env["SLURM_NTASKS"],
        LOCAL_RANK=env["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=env["SLURM_TASKS_PER_NODE"].split("(")[0].split(",")[0],
    )


def close() -> None:
    """Leave the world."""
    if dist.is_initialized():
        dist.destroy_process_group()


def who() -> tuple[int, str]:
    """Rank by the launcher's word, and host; also before and without a process group."""
    return int(os.environ.get("RANK", 0)), socket.gethostname()


def tell_launcher(message: str) -> bool:
    """Leave the reason of this rank's end in the file its agent gave it; whether tinytrain_dist.agent prints it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return False
    extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    except OSError:
        return False
    return "TINYTRAIN_AGENT" in os.environ


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


@dataclass(frozen=True)
class Piece:
    """What this rank has of one tensor on disk: its rows, the ranks that together hold all of them, and who writes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    local: Tensor
    ranks: tuple[int, ...]
    writer: int = 0
    must_be_finite: bool = True


def my_rank() -> int:
    """This process's rank; 0 where there are no ranks."""
    return dist.get_rank() if dist.is_initialized() else 0


def piece_of(name: str, tensor: Tensor, writer: int = 0) -> Piece:
    """The piece of a plain tensor (every rank has it all) or of one sharded over axis 0 (DTensor; the first replica).

    Ranks whose rows are not needed have an empty piece. Errors: ValueError for another sharding.
    """
    shape, dtype, me = tuple(tensor.shape), tensor.dtype, my_rank()
    if not isinstance(tensor, DTensor):
        mine = tensor.detach()
        return Piece(name, shape, dtype, mine if me == writer else mine.new_empty(0), (writer,), writer)
    sharding = tensor.placements[-1]
    if not (isinstance(sharding, Shard) and sharding.dim == 0):
        raise ValueError(f"{name}: only tensors sharded over axis 0 can be saved, got {tensor.placements}")
    mesh = tensor.device_mesh.mesh
    # HSDP: the first replica has everything; where each replica has a mesh of its own, only the writer's place matters
    first = tuple(range(mesh.shape[-1])) if 0 not in mesh else tuple(mesh.view(-1, mesh.shape[-1])[0].tolist())
    mine = tensor.to_local().detach()
    return Piece(name, shape, dtype, mine if me in first else mine.new_empty(0), first, writer)


def start_sends(pieces: Sequence[Piece], group: Group | None = None) -> list[tuple[Any, Tensor]]:
    """Offer this rank's rows of all tensors that others write, without waiting; hand the result to `finish_sends`."""
    sends: list[tuple[Any, Tensor]] = []
    for number, piece in enumerate(pieces):
        if my_rank() in piece.ranks and piece.writer != my_rank() and piece.local.numel():
            rows = piece.local.cpu().contiguous()
            sends.append((dist.isend(rows, dst=piece.writer, group=group, tag=number), rows))
    return sends


def finish_sends(sends: list[tuple[Any, Tensor]]) -> None:
    """Wait until everything offered was taken."""
    for work, _ in sends:
        work.wait()


def gather_piece(piece: Piece, number: int, group: Group | None = None) -> Tensor:
    """The whole tensor, on the CPU, for its writer; `number` is its place in the list given to `start_sends`.

    Nobody but the writer holds more than it had.
    """
    me = my_rank()
    if piece.ranks == (me,):
        return piece.local.cpu()
    whole = torch.empty(piece.shape, dtype=piece.dtype)
    for source, rows in zip(piece.ranks, whole.split(-(-piece.shape[0] // len(piece.ranks))), strict=False):
        if source == me:
            rows.copy_(piece.local)
        else:
            dist.recv(rows, src=source, group=group, tag=number)
    return whole


def gather_to_all(value: Any, group: Group | None = None) -> list[Any]:
    """Everybody's value, by rank, on every rank; alone, just this one."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def background_group() -> Group | None:
    """A group of all ranks for work beside training, over the CPU; its messages meet nobody else's."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


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


def all_gather(output: Tensor, input: Tensor, group: Group | None, wait: bool = True) -> Any:
    """Everybody's `input`, by rank, into the parts of `output`."""
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13
    return gather(output, input, group=group, async_op=not wait)


def start_sum(tensor: Tensor, group: Group | None) -> torch.futures.Future[Tensor]:
    """Sum `tensor` over the group in place; the future holds it when that is done."""
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future
