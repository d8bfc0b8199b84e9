"""This process among all ranks: joining and leaving the process group, the device mesh, and collectives on it.

Must not know models, optimizers or files. Other packages receive a frozen DistributedContext and call its methods.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tinytrain_dist.distributed.collectives import Group, all_gather, all_gather_object
from tinytrain_dist.distributed.parallel_dims import ParallelDims
from tinytrain_dist.distributed.rendezvous import Rendezvous, adopt_slurm_variables, rendezvous
from tinytrain_dist.errors import ConfigError

REPLICATE, SHARD = "dp_replicate", "dp_shard"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")  # Linux has them


@dataclass(frozen=True)
class DistributedContext:
    """This process among all ranks. `with_mesh` sets `mesh` and `parallel_dims`; a lone process is a world of one.

    `launch_id` is a random ID shared by all ranks of one launch; it changes on every restart.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    host: str
    device: torch.device
    launch_id: str = ""
    mesh: DeviceMesh | None = None
    parallel_dims: ParallelDims | None = None
    timeout: timedelta | None = None

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints, lists and writes."""
        return self.rank == 0

    @property
    def replica(self) -> int:
        """Index of this rank's replica."""
        return self.rank // self.parallel_dims.shard if self.parallel_dims else 0

    @property
    def shard(self) -> int:
        """Index of this rank's shard within its replica."""
        return self.rank % self.parallel_dims.shard if self.parallel_dims else 0

    def with_mesh(self, dims: ParallelDims) -> DistributedContext:
        """Return this context on a (replicate, shard) mesh. A collective: every rank passes the same dimensions."""
        mesh = init_device_mesh(self.device.type, (dims.replicate, dims.shard), mesh_dim_names=(REPLICATE, SHARD))
        if self.timeout is not None:  # torch gives a mesh ten minutes on NCCL, whatever is set elsewhere
            for axis in (REPLICATE, SHARD):
                dist.distributed_c10d._set_pg_timeout(self.timeout, mesh.get_group(axis))
        return replace(self, mesh=mesh, parallel_dims=dims)

    def on_cpu(self) -> DistributedContext:
        """Return the same ranks and groups with tensors on the CPU. Needs no communication."""
        if self.mesh is None or self.device.type == "cpu":
            return replace(self, device=torch.device("cpu"))
        names = (REPLICATE, SHARD)
        groups = [self.mesh.get_group(name) for name in names]
        mesh = DeviceMesh.from_group(groups, "cpu", self.mesh.mesh, mesh_dim_names=names)
        return replace(self, device=torch.device("cpu"), mesh=mesh)

    def group(self, axis: str | None = None) -> Group | None:
        """Return the group of ranks along one axis of the mesh, or of all ranks (None)."""
        assert axis is None or self.mesh is not None, "with_mesh comes first"
        return None if axis is None or self.mesh is None else self.mesh.get_group(axis)

    def all_reduce_sum(self, tensor: Tensor, axis: str | None = None) -> Tensor:
        """Sum `tensor` over the ranks of an axis, in place; returns it."""
        dist.all_reduce(tensor, group=self.group(axis))
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        """Everybody's value, by rank, on every rank."""
        return all_gather_object(value)

    def all_gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
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

    def exchange(self, tensor: Tensor, peer: int) -> Tensor:
        """Exchange a tensor with a peer, which calls this at the same time; return the peer's tensor."""
        theirs = torch.empty_like(tensor)
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, theirs, peer)]
        ):
            work.wait()
        return theirs

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_gather_object(None)

    def start_vote(self, flag: bool) -> Vote:
        """Ask all ranks whether any has raised `flag`, on the CPU and in the background; see `Vote`."""
        ballot = torch.tensor([int(flag)], dtype=torch.int32)
        return Vote(ballot, dist.all_reduce(ballot, op=dist.ReduceOp.MAX, async_op=True))

    def any_rank(self, flag: bool) -> bool:
        """Return True on every rank if any rank passes True; the only way to decide something that binds all."""
        return self.start_vote(flag).result()


@dataclass
class Vote:
    """A vote of all ranks in progress; `result` blocks, but by the next step the answer has usually arrived."""

    ballot: Tensor
    work: Any

    def result(self) -> bool:
        """Wait for the vote, and return True if any rank raised its flag."""
        self.work.wait()
        return bool(self.ballot.item())


def init_distributed(
    device: str = "auto",
    timeout_seconds: float = 1800.0,
    meeting: Rendezvous | None = None,
    traces: Path | None = None,
) -> DistributedContext:
    """Join the world torchrun (or Slurm's own tasks) describes; alone, make a world of one.

    device: auto takes cuda where there is one. meeting: a rendezvous made before; None: make one. traces: where NCCL's
    flight recorder goes when a collective times out.
    Errors: ConfigError if cuda is asked for and there is none, and those of `rendezvous`.
    """
    if traces is not None:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(traces / "nccl_trace_rank_"))
    if HUGE_PAGES.exists():  # torch reads this at its first tensor; a step on two CPU cores takes 5 % less
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    meeting = meeting or rendezvous()
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
    # synchronize: if one rank failed while others still initialize, their errors would bury its own
    return replace(context, launch_id=context.all_gather_object(secrets.token_hex(8))[0])


def flight_record() -> bytes:
    """Return the last collectives of this rank as JSON, for a run that hangs; b"" where torch does not keep them."""
    from torch._C import _distributed_c10d as c10d

    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # the second one knows gloo too, since torch 2.13
        if hasattr(c10d, name):
            return bytes(getattr(c10d, name)(True, False))
    return b""


def shutdown() -> None:
    """Leave the world."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launcher_rank() -> tuple[int, int, str]:
    """Rank and number of ranks by the launcher's word, and host; also before and without a process group."""
    adopt_slurm_variables()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), socket.gethostname()
