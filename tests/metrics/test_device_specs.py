"""The table of devices."""

from __future__ import annotations

from tinytrain_dist.metrics.device_specs import DEVICE_SPECS, GIB, find_device_spec


def test_the_table_of_devices() -> None:
    for device in DEVICE_SPECS.values():
        assert 20 * GIB < device.memory < 200 * GIB
        assert device.bf16_flops > device.fp32_flops > 1e13
    cpu = find_device_spec("cpu", 2, "fp32")
    assert cpu.memory > GIB / 4
    assert cpu.fp32_flops > 1e9
