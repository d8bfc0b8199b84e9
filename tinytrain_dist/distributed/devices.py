"""Choose this rank's device, and check before there is a process group that the devices of all ranks fit together.

The first collective on GPUs would fail with an error of NCCL, or hang. Must not know collectives.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tinytrain_dist.distributed.rendezvous import Rendezvous
from tinytrain_dist.distributed.torch_internals import use_expandable_segments
from tinytrain_dist.errors import ConfigError, RendezvousError
from tinytrain_dist.utils.text import format_list


@dataclass(frozen=True)
class DeviceReport:
    """What a rank tells the others about its device.

    * `type`: cpu or cuda.
    * `uuid`: of the GPU; "" for a CPU, or if torch does not know it.
    * `problem`: why this rank has no device; "" if it has one.
    """

    type: str
    uuid: str = ""
    problem: str = ""


def claim_device(wanted: str, joined: Rendezvous, seconds: float) -> torch.device:
    """Return this rank's device, and make a GPU torch's current one. All ranks call this, and exchange reports.

    `wanted`: cpu, cuda, or auto (cuda if there is a GPU). `seconds`: how long to wait for the other ranks.
    Errors: ConfigError on every rank if a rank has no GPU, if two ranks share one, or if some ranks compute on GPUs and
    others on CPUs; RendezvousError if a rank does not report.
    """
    world_size = len(joined.hosts)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    device = torch.device("cpu")
    try:
        device = select_device(wanted, local_rank, local_world_size, joined.hosts[joined.rank])
        own = DeviceReport(device.type, gpu_uuid(device))
    except ConfigError as error:
        own = DeviceReport(device.type, problem=error.problems[0])
    received: list[Any] = [asdict(own)]
    if world_size > 1:
        received = joined.exchange("devices", asdict(own), seconds)
    if missing := [rank for rank, report in enumerate(received) if report is None]:
        raise RendezvousError(
            f"{len(missing)} of {world_size} ranks joined, but did not report a device within {seconds:g} s: rank "
            f"{format_list(missing)}; look at their logs"
        )
    if problem := find_device_problem([DeviceReport(**report) for report in received], joined.hosts):
        raise ConfigError(problem)
    return device


def select_device(wanted: str, local_rank: int, local_world_size: int, host: str) -> torch.device:
    """Return this rank's device; make a GPU torch's current one. Errors: ConfigError if there are too few GPUs.

    A rank that sees one GPU takes it, because schedulers can show each process only its own. `find_device_problem`
    detects ranks that see the same one.
    """
    use_cuda = torch.cuda.is_available() if wanted == "auto" else wanted == "cuda"
    if not use_cuda:
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        cause = "nvidia-smi shows whether the driver works" if torch.version.cuda else "this torch is built for CPUs"
        raise ConfigError(
            f"device: cuda needs a GPU, but torch {torch.__version__} finds none on {host} ({cause}); set device = cpu "
            "or auto"
        )
    index = 0 if num_gpus == 1 else local_rank
    if index >= num_gpus:
        raise ConfigError(
            f"device: this host has {num_gpus} GPU(s), but process {local_rank + 1} of {local_world_size} needs one; "
            "start fewer processes, or set device = cpu"
        )
    use_expandable_segments()
    gpu = torch.device("cuda", index)
    torch.cuda.set_device(gpu)
    return gpu


def gpu_uuid(device: torch.device) -> str:
    """Return the UUID of a GPU, the same in all processes; "" for a CPU, or if torch does not know it."""
    if device.type != "cuda":
        return ""
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    return uuid if uuid.strip("0-") else ""


def find_device_problem(reports: list[DeviceReport], hosts: list[str]) -> str:
    """Return a sentence if the devices of all ranks cannot train together, else "". Both lists are by rank."""
    for report in reports:
        if report.problem:
            return report.problem
    for rank, report in enumerate(reports):
        if report.type != reports[0].type:
            return (
                f"device: rank {rank} ({hosts[rank]}) computes on {report.type}, but rank 0 ({hosts[0]}) on "
                f"{reports[0].type}; check the GPUs of both hosts (nvidia-smi), or set device = cpu"
            )
    ranks_of_gpu = defaultdict(list)
    for rank, report in enumerate(reports):
        if report.uuid:
            ranks_of_gpu[report.uuid].append(rank)
    for uuid, ranks in ranks_of_gpu.items():
        if len(ranks) > 1:
            return (
                f"device: rank {format_list(ranks)} on {hosts[ranks[0]]} use the same GPU ({uuid}); start "
                "one process for each GPU, and let a process see all GPUs of its node or one of its own "
                "(CUDA_VISIBLE_DEVICES; Slurm: --gpus-per-task=1)"
            )
    return ""
