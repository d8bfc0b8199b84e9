"""The settings whose default depends on the device: what they become on GPUs and on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.parallel.device_defaults import resolve_device_defaults
from tinytrain_dist.training import determinism

AMPERE, VOLTA = (8, 0), (7, 0)


class Ranks(DistributedContext):
    """The context of rank 0 of several ranks; `others` are the host and the older GPU of each other rank."""

    others: tuple[tuple[str, str], ...] = ()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks."""
        return [value, *self.others]


def ranks_on(device: str, *others: tuple[str, str]) -> DistributedContext:
    context = Ranks(0, 0, 1 + len(others), 1 + len(others), "node1", torch.device(device))
    object.__setattr__(context, "others", others)
    return context


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Give every CUDA device this compute capability."""

    def set_capability(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: f"GPU {capability}")

    return set_capability


@pytest.fixture
def float32_products() -> Iterator[Callable[[], str]]:
    """Return the present precision of float32 products, and restore it at the end."""
    before = torch.get_float32_matmul_precision()
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_on_a_cpu_a_run_computes_in_float32_and_in_one_pass() -> None:
    config, note = resolve_device_defaults(TrainingConfig(), ranks_on("cpu"))
    assert (config.precision, config.micro_batch_size, note) == ("fp32", None, "")
    explicit = TrainingConfig(precision="fp32")
    assert config.resolved() == explicit.resolved(), "a checkpoint of the one is a checkpoint of the other"
    assert resolve_device_defaults(replace(explicit, precision="bf16"), ranks_on("cpu"))[0].precision == "bf16"


def test_on_a_gpu_a_run_computes_in_bf16_with_what_fits(gpu: Callable[[tuple[int, int]], None]) -> None:
    gpu(AMPERE)
    config, note = resolve_device_defaults(TrainingConfig(), ranks_on("cuda:0", ("node1", "")))
    assert (config.precision, config.micro_batch_size) == ("bf16", "auto")
    assert note == "precision = auto: bf16"
    given = TrainingConfig(precision="fp32", micro_batch_size=4, batch_size=8)
    config, note = resolve_device_defaults(given, ranks_on("cuda:0"))
    assert config == given
    assert note == "precision = fp32; matrix products are computed in TF32"
    _, note = resolve_device_defaults(replace(given, reproducible=True), ranks_on("cuda:0"))
    assert note == "precision = fp32; matrix products are computed in float32, because reproducible = true"


def test_one_older_gpu_makes_all_ranks_compute_in_float32(gpu: Callable[[tuple[int, int]], None]) -> None:
    gpu(AMPERE)
    context = ranks_on("cuda:0", ("node1", ""), ("node2", "Tesla V100"))
    config, note = resolve_device_defaults(TrainingConfig(), context)
    assert (config.precision, note) == ("fp32", "precision = auto: fp32")
    refusal = r"precision: bf16 needs GPUs of .* 8\.0 .*, but rank 2 \(node2\) has Tesla V100; set precision = fp32 or"
    with pytest.raises(ConfigError, match=refusal):
        resolve_device_defaults(TrainingConfig(precision="bf16"), context)
    gpu(VOLTA)
    with pytest.raises(ConfigError, match=r"rank 0 \(node1\) has GPU \(7, 0\)"):
        resolve_device_defaults(TrainingConfig(precision="bf16"), ranks_on("cuda:0"))


def test_fp8_needs_a_gpu_with_float8_units(gpu: Callable[[tuple[int, int]], None]) -> None:
    fp8 = TrainingConfig(precision="fp8")
    gpu((8, 9))
    config, note = resolve_device_defaults(fp8, ranks_on("cuda:0"))
    assert (config.precision, note) == ("fp8", "precision = fp8")
    gpu(AMPERE)
    with pytest.raises(ConfigError, match=r"fp8 needs GPUs of .* 8\.9 .* has GPU \(8, 0\); set precision = bf16 or"):
        resolve_device_defaults(fp8, ranks_on("cuda:0"))
    assert resolve_device_defaults(fp8, ranks_on("cpu"))[0] == fp8, "torch's kernel for CPUs is slow, but works"


def test_float32_products_use_tf32_on_a_gpu_unless_reproducible(float32_products: Callable[[], str]) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    determinism.choose_float32_products(TrainingConfig(precision="fp32"), gpu)
    assert float32_products() == "high"
    exact = TrainingConfig(precision="fp32", micro_batch_size=4, reproducible=True)
    determinism.choose_float32_products(exact, cpu)
    assert float32_products() == "high", "a CPU run leaves it alone"
    determinism.choose_float32_products(exact, gpu)
    assert float32_products() == "highest"


def test_threads_take_turns_sooner_in_a_run_on_a_gpu() -> None:
    before = sys.getswitchinterval()
    try:
        determinism.switch_threads_sooner(torch.device("cpu"))
        assert sys.getswitchinterval() == before
        determinism.switch_threads_sooner(torch.device("cuda"))
        assert sys.getswitchinterval() == pytest.approx(5e-4)
    finally:
        sys.setswitchinterval(before)
