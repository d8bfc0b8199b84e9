"""How many cores and GPUs a run may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinytrain_dist.launch import machine


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(machine, "CPU_LIMIT", limit)
    assert machine.usable_cores() == cores, "without the file"
    for text, expected in (("max 100000", cores), ("150000 100000", 1), ("1000 100000", 1), ("99900000 100000", cores)):
        limit.write_text(text)
        assert machine.usable_cores() == expected


def test_gpus_are_counted_as_cuda_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.visible_gpus() == 0, "without nvidia-smi"
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'GPU 0: H100'\necho '  MIG 1g.10gb Device 0'\necho 'GPU 1: H100'\n")
    command.chmod(0o755)
    assert machine.visible_gpus() == 2
    for visible, count in (("", 0), ("1", 1), ("0,1", 2), ("0,-1,1", 1), ("7", 0), ("GPU-8932f937,GPU-1", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert machine.visible_gpus() == count, visible
    command.write_text("#!/bin/sh\nexit 9\n")
    assert machine.visible_gpus() == 0, "a driver that does not work"
