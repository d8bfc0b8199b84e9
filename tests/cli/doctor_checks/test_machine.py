"""What one machine reports about itself."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest

from tinytrain_dist.cli.doctor_checks import machine
from tinytrain_dist.cli.doctor_checks.report import NOTE, PROBLEM

DEBIAN = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]


def test_limit_of_the_control_group_is_the_smallest_above(tmp_path: Path) -> None:
    job = tmp_path / "memory" / "slurm" / "job_1"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.cgroup_limit_bytes("4:memory:/slurm/job_1\n", tmp_path) is None
    (job / "memory.limit_in_bytes").write_text("5000\n")
    (job.parent / "memory.limit_in_bytes").write_text("4000\n")
    assert machine.cgroup_limit_bytes("4:memory:/slurm/job_1\n3:cpu:/x\n", tmp_path) == 4000
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "memory.max").write_text("max\n")
    assert machine.cgroup_limit_bytes("0::/user\n", tmp_path) is None
    (tmp_path / "user" / "memory.max").write_text("77\n")
    assert machine.cgroup_limit_bytes("0::/user\n", tmp_path) == 77


def test_interface_that_does_not_exist_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    assert any(level == PROBLEM and "no interface ib7" in text for level, text in machine.check_machine())
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0")
    assert not any("NCCL_SOCKET_IFNAME:" in text for _, text in machine.check_machine())


def test_own_name_that_is_the_machine_itself_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: DEBIAN)
    notes = [text for level, text in machine.check_interfaces("node7") if level == NOTE]
    assert notes[0].startswith("name: node7 resolves to 127.0.1.1 here; with several nodes, export GLOO_SOCKET_IFNAME=")


def test_only_a_low_hard_limit_of_open_files_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    for hard, noted in ((2048, True), (65536, False)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (1024, hard))
        notes = [text for level, text in machine.check_limits("node") if level == NOTE]
        assert any(f"allows {hard} open files; many ranks need more" in text for text in notes) == noted
