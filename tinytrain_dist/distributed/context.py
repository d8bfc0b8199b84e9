"""Join the ranks of a launch, and describe this process's place among them.

`init_distributed` is called once and returns a frozen `DistributedContext`. Other packages receive it and call
its methods. `parallel_dims` defines the terms replica, shard and axis. Must not know models, optimizers or files.
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
from tinytrain_dist.distributed.devices import claim_device
from tinytrain_dist.distributed.parallel_dims import ParallelDims
from tinytrain_dist.distributed.rendezvous import (
    RENDEZVOUS_SECONDS,
    Rendezvous,
    adopt_slurm_variables,
    rendezvous,
)
from tinytrain_dist.distributed.torch_internals import enable_flight_recorder, set_group_timeout
from tinytrain_dist.distributed.torch_internals import flight_record as flight_record

REPLICATE, SHARD = "dp_replicate", "dp_shard"  # the axes of the mesh on which weights are divided
DATA, CONTEXT = "dp", "cp"  # the axes of the mesh on which sequences are divided
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")  # exists if this Linux supports huge pages


@dataclass(frozen=True)
class DistributedContext:
    """This process's place among all ranks; a lone process is rank 0 of 1.

    * `rank`, `world_size`: index of this process and number of processes, over all nodes.
    * `local_rank`, `local_world_size`: the same on this node.
    * `host`: name of this node.
    * `device`: where this rank computes: cpu, or cuda with the index `local_rank` (0 if it sees only one GPU).
    * `launch_id`: random ID shared by all ranks of one launch; it changes on every restart.
    * `mesh`: the ranks as a grid (replicas, shards) of copies of the weights; None before `with_mesh`.
    * `sequence_mesh`: the ranks as a grid (data-parallel ranks, cp); None before `with_mesh`, and if cp is 1.
    * `parallel_dims`: the sizes of all axes, the mode's name and why it was chosen; None before `with_mesh`.
    * `timeout`: time after which a collective fails; None for torch's defaults.
    * `simulated_type`: of simulated ranks, the type of their devices, cpu or cuda; otherwise "".
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    host: str
    device: torch.device
    launch_id: str = ""
    mesh: DeviceMesh | None = None
    sequence_mesh: DeviceMesh | None = None
    parallel_dims: ParallelDims | None = None
    timeout: timedelta | None = None
    simulated_type: str = ""

    @property
    def target_type(self) -> str:
        """Return the type of the devices that the run is for: the simulated ones, or this rank's own."""
        return self.simulated_type or self.device.type

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which does what only one rank may do, such as printing."""
        return self.rank == 0

    @property
    def weight_replicas(self) -> int:
        """Return how many copies of the weights there are."""
        return self.parallel_dims.weight_replicas if self.parallel_dims else 1

    @property
    def weight_shards(self) -> int:
        """Return into how many shards a copy of the weights is divided."""
        return self.parallel_dims.weight_shards if self.parallel_dims else 1

    @property
    def replica(self) -> int:
        """Return the index of this rank's copy of the weights, 0 .. weight_replicas - 1."""
        return self.rank // self.weight_shards if self.parallel_dims else 0

    @property
    def shard(self) -> int:
        """Return the index of this rank's shard of the weights, 0 .. weight_shards - 1."""
        return self.rank % self.weight_shards if self.parallel_dims else 0

    @property
    def data_coordinates(self) -> tuple[int, int, int]:
        """Return the place of this rank on the axes dp_replicate, dp_shard and cp, which decide what it computes."""
        dims = self.parallel_dims
        if dims is None:
            return 0, 0, 0
        data_rank, cp_index = divmod(self.rank, dims.cp)
        return data_rank // dims.shard, data_rank % dims.shard, cp_index

    def with_mesh(self, dims: ParallelDims) -> DistributedContext:
        """Return this context on the mesh of `dims`. A collective: every rank passes equal `dims`."""
        mesh = self._new_mesh((dims.weight_replicas, dims.weight_shards), (REPLICATE, SHARD))
        sequence_mesh = None
        if dims.cp > 1:
            sequence_mesh = self._new_mesh((dims.replicate * dims.shard, dims.cp), (DATA, CONTEXT))
        return replace(self, mesh=mesh, sequence_mesh=sequence_mesh, parallel_dims=dims)

    def _new_mesh(self, sizes: tuple[int, int], axes: tuple[str, str]) -> DeviceMesh:
        mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=axes)
        if self.timeout is not None:
            # on NCCL, torch gives a mesh's groups a timeout of ten minutes, whatever init_process_group was given
            for axis in axes:
                set_group_timeout(mesh.get_group(axis), self.timeout)
        return mesh

    def on_cpu(self) -> DistributedContext:
        """Return this context with the CPU as its device, and the same ranks and groups. Needs no communication."""
        if self.mesh is None or self.device.type == "cpu":
            return replace(self, device=torch.device("cpu"))
        mesh, sequence_mesh = _mesh_on_cpu(self.mesh), self.sequence_mesh and _mesh_on_cpu(self.sequence_mesh)
        return replace(self, device=torch.device("cpu"), mesh=mesh, sequence_mesh=sequence_mesh)

    def group(self, axis: str | None = None) -> Group | None:
        """Return the process group of this rank along one axis of a mesh (None: all ranks)."""
        if axis is None:
            return None
        mesh = self.mesh if axis in (REPLICATE, SHARD) else self.sequence_mesh
        assert mesh is not None, "call with_mesh first"
        return mesh.get_group(axis)

    def all_reduce_sum(self, tensor: Tensor, axis: str | None = None) -> Tensor:
        """Sum `tensor` over the ranks of an axis (None: all ranks), in place, and return it.

        A collective, with tensors of the same shape on every rank. Blocks for a tensor on the CPU; on a GPU the sum is
        only enqueued.
        """
        dist.all_reduce(tensor, group=self.group(axis))
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank. A collective; blocks until every rank has called it."""
        return all_gather_object(value)

    def all_gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Return the numbers of all ranks as float64: one row for each rank.

        A collective, with equally many numbers on every rank; blocks until every rank has called it. It sends a tensor
        on the CPU, and pickles nothing.
        """
        gathered = torch.empty(self.world_size * len(values), dtype=torch.float64)
        all_gather(gathered, torch.tensor(values, dtype=torch.float64), None)
        rows: list[list[float]] = gathered.view(self.world_size, -1).tolist()
        return rows

    def all_gather_uneven_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Return the numbers of all ranks as `all_gather_numbers` does, of which each rank may have another number."""
        lengths = [int(length) for (length,) in self.all_gather_numbers([len(values)])]
        padding = [0.0] * (max(lengths) - len(values))
        rows = self.all_gather_numbers([*values, *padding])
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def broadcast_object(self, value: Any, group: Group | None = None) -> Any:
        """Return rank 0's value on every rank; the values of other ranks are ignored.

        A collective of `group` (None: all ranks); blocks until rank 0's value has arrived. The value is pickled.
        """
        values = [value]
        dist.broadcast_object_list(values, src=0, group=group, device=torch.device("cpu"))
        return values[0]

    def exchange(self, tensor: Tensor, peer: int) -> Tensor:
        """Send `tensor` to the rank `peer`, and return the tensor of the same shape and dtype that `peer` sends.

        Both ranks call it at the same time; blocks until both messages have arrived.
        """
        received = torch.empty_like(tensor)
        messages = [dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, received, peer)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        return received

    def barrier(self) -> None:
        """Block until every rank has called this."""
        self.all_gather_object(None)

    def start_vote(self, flag: bool, *others: bool) -> Vote:
        """Start a vote on whether `flag` is True on any rank. A collective; does not block, see `Vote`.

        The vote runs on the CPU in the background, so that no rank waits for its device. others: further questions that
        this vote decides with the same message; as many on every rank.
        """
        ballot = torch.tensor([int(flag), *map(int, others)], dtype=torch.int32)
        return Vote(ballot, dist.all_reduce(ballot, op=dist.ReduceOp.MAX, async_op=True))

    def start_sum(self, number: int) -> Sum:
        """Start to sum a whole number over all ranks, on the device. A collective; does not block, see `Sum`."""
        # filled on the device, because copying a number from the host makes a step wait for the device
        total = torch.full((), number, dtype=torch.int64, device=self.device)
        return Sum(total, dist.all_reduce(total, async_op=True))

    def any_rank(self, flag: bool) -> bool:
        """Return True on every rank if any rank passes True. A collective; blocks until every rank has called it.

        Use only this and `start_vote` for a decision that all ranks must share.
        """
        return self.start_vote(flag).result()


def _mesh_on_cpu(mesh: DeviceMesh) -> DeviceMesh:
    """Return a mesh for tensors on the CPU with the groups of another one."""
    axes = mesh.mesh_dim_names
    assert axes is not None, "_new_mesh names them"
    groups = [mesh.get_group(axis) for axis in axes]
    return DeviceMesh.from_group(groups, "cpu", mesh.mesh, mesh_dim_names=axes)


@dataclass
class Vote:
    """A vote that `DistributedContext.start_vote` has started.

    * `ballot`: int32 [n]. It holds this rank's flags, and after the vote the maxima over all ranks.
    * `work`: the handle of the all-reduce.
    """

    ballot: Tensor
    work: Any

    def result(self) -> bool:
        """Return whether the flag is True on any rank. Blocks; by the next step the answer has usually arrived."""
        return self.results()[0]

    def results(self) -> list[bool]:
        """Return for each flag whether it is True on any rank. Blocks as `result` does."""
        self.work.wait()
        return [bool(flag) for flag in self.ballot.tolist()]


@dataclass
class Sum:
    """A sum that `DistributedContext.start_sum` has started.

    * `total`: int64 scalar on the device. It holds this rank's number, and afterwards the sum over all ranks.
    * `work`: the handle of the all-reduce.
    """

    total: Tensor
    work: Any

    def result(self) -> Tensor:
        """Return the sum. Blocks on a CPU; on a GPU only what is enqueued afterwards waits for it."""
        self.work.wait()
        return self.total


def init_distributed(
    device: str = "auto",
    timeout_seconds: float = 1800.0,
    existing_rendezvous: Rendezvous | None = None,
    traces: Path | None = None,
) -> DistributedContext:
    """Join the other ranks that torchrun or Slurm has started; without a launcher, become rank 0 of 1. A collective.

    * `device`: cpu, cuda, or auto (cuda if there is a GPU).
    * `timeout_seconds`: time after which a collective fails.
    * `existing_rendezvous`: what `rendezvous` returned, if it has been called already.
    * `traces`: folder to which NCCL's flight recorder writes when a collective times out.

    Errors: the errors of `rendezvous` and `claim_device`.
    """
    if traces is not None:
        enable_flight_recorder(traces)
    _use_huge_pages()
    joined = existing_rendezvous or rendezvous()
    world_size = len(joined.hosts)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    own_device = claim_device(device, joined, min(timeout_seconds, RENDEZVOUS_SECONDS))
    timeout = timedelta(seconds=timeout_seconds)
    _init_process_group(joined, own_device, timeout)
    context = DistributedContext(
        rank=joined.rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        host=socket.gethostname(),
        device=own_device,
        timeout=timeout,
    )
    # Synchronize: if this rank failed while others are still initializing, their errors would bury its own.
    launch_id = context.all_gather_object(secrets.token_hex(8))[0]
    return replace(context, launch_id=launch_id)


def _use_huge_pages() -> None:
    """Make torch allocate CPU memory in huge pages. Torch reads the variable when it allocates its first tensor."""
    # measured (2-core x86 VM, 2026-11-25): a step on two CPU cores takes 5 % less time
    if HUGE_PAGES.exists():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _init_process_group(joined: Rendezvous, device: torch.device, timeout: timedelta) -> None:
    """Make the group of all ranks: gloo for tensors on the CPU, NCCL for tensors on a GPU."""
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=timeout,
        device_id=device if on_gpu else None,
        store=joined.store,
        rank=joined.rank,
        world_size=len(joined.hosts),
    )


def shutdown() -> None:
    """Destroy all process groups, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launcher_rank() -> tuple[int, int, str]:
    """Return the rank and the number of ranks that the launcher has set, and the host. Needs no process group."""
    adopt_slurm_variables()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), socket.gethostname()


def join_id() -> str:
    """Return an ID of this start that ranks on several nodes share before they have joined; "" on a single node.

    A later start may have the same ID, if its port is fixed.
    """
    env = os.environ
    names = ("TORCHELASTIC_RUN_ID", "TINYTRAIN_ATTEMPT", "MASTER_ADDR", "MASTER_PORT")
    on_several_nodes = "MASTER_PORT" in env and env.get("LOCAL_WORLD_SIZE") != env.get("WORLD_SIZE")
    return " ".join(["join", *(env.get(name, "-") for name in names)]) if on_several_nodes else ""
