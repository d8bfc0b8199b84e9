"""How much memory a control group leaves."""

from __future__ import annotations

from pathlib import Path

from tinytrain_dist.reliability.host_memory import free_host_bytes


def test_a_control_group_leaves_its_limit_less_what_is_used_and_not_cached(tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "memory.max").write_text("10000\n")
    (job / "memory.current").write_text("7000\n")
    (job / "memory.stat").write_text("active_file 5\ninactive_file 2000\n")
    assert free_host_bytes("0::/job\n", tmp_path) == 5000
    (job / "memory.max").write_text("max\n")
    assert free_host_bytes("0::/job\n", tmp_path) > 10_000
    first = tmp_path / "memory" / "job"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("4000\n")
    (first / "memory.usage_in_bytes").write_text("9000\n")
    assert free_host_bytes("3:memory:/job\n", tmp_path) == 0
