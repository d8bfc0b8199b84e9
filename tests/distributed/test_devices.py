"""Each rank's device: which one it takes, and which devices of several ranks do not fit together."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tinytrain_dist.distributed import devices, torch_internals
from tinytrain_dist.distributed.devices import DeviceReport, find_device_problem, gpu_uuid, select_device
from tinytrain_dist.errors import ConfigError


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the settings that torch's allocator is told; both variables are unset."""
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is restored at the end
        monkeypatch.delenv(name)
    return told


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch, allocator: list[str]) -> list[torch.device]:
    """Return the devices that become torch's current one, on a host with two GPUs."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_rank_takes_the_gpu_of_its_number(current: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_device("cuda", 1, 2, "node") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"device: this host has 2 GPU\(s\), but process 3 of 4 needs one"):
        select_device("cuda", 2, 4, "node")
    assert select_device("cpu", 2, 4, "node") == torch.device("cpu")
    # Slurm's --gpus-per-task shows each process only its own GPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert select_device("cuda", 3, 4, "node") == torch.device("cuda", 0)
    assert current == [torch.device("cuda", 1), torch.device("cuda", 0)]


def test_no_gpu_at_all_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"finds none on node \(this torch is built for CPUs\); set device = cpu or"):
        select_device("cuda", 0, 1, "node")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match=r"finds none on node \(nvidia-smi shows whether the driver works\)"):
        select_device("cuda", 0, 1, "node")


def test_a_run_on_a_gpu_has_expandable_segments(
    current: list[torch.device], allocator: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    select_device("cpu", 0, 1, "node")
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    select_device("cuda", 0, 1, "node")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert allocator == ["expandable_segments:True"]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_allocator_settings_of_the_user_are_kept(
    name: str, allocator: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512")
    torch_internals.use_expandable_segments()
    assert allocator == []
    assert {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")} == {
        name: "max_split_size_mb:512"
    }


def test_a_gpu_without_a_uuid_is_equal_to_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for uuid, expected in (("5c1f-0a", "5c1f-0a"), ("00000000-0000", "")):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, uuid=uuid: SimpleNamespace(uuid=uuid))
        assert gpu_uuid(torch.device("cuda")) == expected
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    assert gpu_uuid(torch.device("cuda")) == gpu_uuid(torch.device("cpu")) == ""


def test_devices_of_ranks_that_do_not_fit_together() -> None:
    hosts = ["a", "a", "b", "b"]
    gpus = [DeviceReport("cuda", uuid) for uuid in ("u0", "u1", "u2", "u3")]
    assert find_device_problem(gpus, hosts) == ""
    assert find_device_problem([DeviceReport("cpu")] * 4, hosts) == ""
    assert find_device_problem([DeviceReport("cuda")] * 4, hosts) == "", "torch does not know their UUIDs"
    shared = [*gpus[:3], DeviceReport("cuda", "u2")]
    assert find_device_problem(shared, hosts).startswith(
        "device: rank 2, 3 on b use the same GPU (u2); start one process for each GPU, and let"
    )
    assert find_device_problem([*gpus[:2], DeviceReport("cpu"), gpus[3]], hosts) == (
        "device: rank 2 (b) computes on cpu, but rank 0 (a) on cuda; check the GPUs of both hosts (nvidia-smi), or set "
        "device = cpu"
    )


def start(fault: str) -> str:
    """On a rank: join a run that is broken by one fact about the GPUs; return the error."""
    from tinytrain_dist.distributed.context import init_distributed

    rank = int(os.environ["RANK"])
    torch.cuda.is_available = lambda: not (fault == "no GPU on rank 1" and rank == 1)
    torch.cuda.device_count = lambda: 1 if fault == "the same GPU" else 2 - rank
    torch.cuda.set_device = lambda _: None
    devices.gpu_uuid = lambda device: "u0" if device.type == "cuda" else ""
    if fault == "too few GPUs":
        torch.cuda.device_count = lambda: 2 if rank == 0 else 0
    try:
        init_distributed("auto")
    except ConfigError as error:
        return error.problems[0]
    return ""


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("the same GPU", "device: rank 0, 1 on "),
        ("too few GPUs", "device: cuda needs a GPU, but torch "),
        ("no GPU on rank 1", "device: rank 1 ("),
    ],
)
def test_every_rank_refuses_devices_that_do_not_fit_together(fault: str, problem: str) -> None:
    first, second = run_ranks(2, start, fault)
    assert first == second
    assert first.startswith(problem)
