"""Check the memory and the peak speed of the device that a process uses."""

import math
import resource
import sys

import torch

from tinytrain_dist.metrics import device_stats
from tinytrain_dist.metrics.device_stats import free_memory_bytes, peak_flops, peak_memory_bytes, unknown_peak_warnings


def test_memory_is_that_of_this_process():
    one_gib = 1 << 30
    assert 10 << 20 < peak_memory_bytes(torch.device("cpu")) < 64 * one_gib


def test_a_cpu_has_no_peak_and_a_gpu_that_of_its_name(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    assert unknown_peak_warnings(torch.device("cpu")) == []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda")) == 989e12
    assert peak_flops(torch.device("cuda"), "tf32") == 989e12 / 2
    assert peak_flops(torch.device("cuda"), "fp32") == 67e12
    assert unknown_peak_warnings(torch.device("cuda")) == []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce GTX 1080")
    assert peak_flops(torch.device("cuda")) is None
    [warning] = unknown_peak_warnings(torch.device("cuda"))
    assert warning.startswith("mfu: not recorded, because ")
    assert warning.endswith("does not have the peak of this GPU (NVIDIA GeForce GTX 1080)")


def test_a_process_may_use_its_share_of_the_free_memory_of_its_host():
    alone, of_four = (free_memory_bytes(torch.device("cpu"), processes) for processes in (1, 4))
    assert alone == math.inf or 2 * of_four < alone < 8 * of_four


def test_free_memory_that_the_system_does_not_report_is_infinite(monkeypatch):
    monkeypatch.setattr(device_stats, "Path", type("Gone", (), {"__init__": lambda *_: None, "read_text": _not_there}))
    assert free_memory_bytes(torch.device("cpu"), 1) == math.inf


def _not_there(*_, **__):
    raise FileNotFoundError


def test_peak_memory_is_in_bytes_on_every_system(monkeypatch):
    monkeypatch.setattr(resource, "getrusage", lambda _: type("Usage", (), {"ru_maxrss": 5}))
    for platform, expected in (("linux", 5 * 1024), ("darwin", 5)):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_memory_bytes(torch.device("cpu")) == expected
