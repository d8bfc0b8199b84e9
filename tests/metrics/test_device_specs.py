"""The table of devices: entries are found by a short name for plans, and by the driver's name for MFU."""

from __future__ import annotations

import pytest

from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.device_specs import DEVICE_SPECS, GIB, find_device_spec, product_type, spec_of_gpu


@pytest.mark.parametrize(
    ("driver_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_a_gpu_is_found_by_the_name_of_its_driver(driver_name: str, name: str) -> None:
    assert spec_of_gpu(driver_name) is DEVICE_SPECS[name]


@pytest.mark.parametrize(
    "driver_name",
    [
        "NVIDIA GeForce GTX 1080",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "AMD Instinct MI300X",
    ],
)
def test_a_gpu_that_is_not_in_the_table_has_no_peak(driver_name: str) -> None:
    assert spec_of_gpu(driver_name) is None


def test_only_float32_products_that_may_differ_in_bits_use_tf32() -> None:
    assert [product_type(*run) for run in (("bf16", True), ("bf16", False), ("fp32", True), ("fp32", False))] == [
        "bf16",
        "bf16",
        "fp32",
        "tf32",
    ]


def test_a_name_that_is_not_in_the_table_gets_the_nearest() -> None:
    assert find_device_spec("H100", 8, "bf16").bf16_flops == 989e12
    with pytest.raises(
        ConfigError, match=r"the command line\n  --device: 'h10' is unknown; the nearest names are .*h100"
    ):
        find_device_spec("h10", 8, "bf16")


def test_the_table_of_devices() -> None:
    for device in DEVICE_SPECS.values():
        assert 20 * GIB < device.memory < 300 * GIB
        assert device.bf16_flops > device.tf32_flops >= device.fp32_flops > 1e13
        assert device.network < device.bandwidth < 1e13
    cpu = find_device_spec("cpu", 2, "fp32")
    assert cpu.memory > GIB / 4
    assert cpu.peak_flops("fp32") == cpu.peak_flops("tf32") > 1e9
