"""Check the trace of some steps: it is readable, has steps and phases by name, and exists only with the setting."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

from tests.helpers.training import settings_for
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import init_distributed, shutdown
from tinytrain_dist.distributed.torch_internals import start_profiler
from tinytrain_dist.metrics.profiler import StepProfiler
from tinytrain_dist.training.trainer import Trainer


def run(folder: Path, **overrides: Any) -> Trainer:
    context = init_distributed("cpu")
    try:
        trainer = Trainer.build(TrainingConfig(**settings_for(folder, "run", **overrides)), context)
        trainer.fit()
        return trainer
    finally:
        shutdown()


def test_a_trace_has_the_steps_and_phases_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, profile="2:3", total_steps=4)
    (path,) = (tmp_path / "run" / "logs" / "profile").iterdir()
    assert path.name == "steps-2-3.pt.trace.json"
    assert f"profile: wrote {path}" in capsys.readouterr().out
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    assert [name for name in names if name.startswith("ProfilerStep#")] == ["ProfilerStep#2", "ProfilerStep#3"]
    for phase in ("data", "forward_backward", "reduction", "optimizer"):
        assert names.count(phase) == 2, phase
    assert "aten::mm" in names


def test_a_run_that_ends_early_still_writes_its_trace(tmp_path: Path) -> None:
    run(tmp_path, profile="3:9", stop_at_step=4)
    (path,) = (tmp_path / "run" / "logs" / "profile").iterdir()
    assert path.name == "steps-3-4.pt.trace.json"


def test_steps_before_a_resume_are_reported_to_have_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, total_steps=4, stop_at_step=3)
    run(tmp_path, profile="2:3", total_steps=4)
    assert "this process ran no step of 2:3" in capsys.readouterr().out
    assert not (tmp_path / "run" / "logs" / "profile").exists()


def test_a_trace_that_cannot_start_is_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: profile) -> None:
        raise RuntimeError("cannot start")

    monkeypatch.setattr(profile, "__enter__", fail)
    profiler = StepProfiler(range(1, 2), tmp_path, torch.device("cpu"), print)
    with pytest.raises(RuntimeError, match="cannot start"):
        profiler.enter("data", 0)
    profiler.close()


def test_the_warning_about_later_cycles_of_a_trace_is_left_out() -> None:
    class WarnsAsTorch211:
        def __enter__(self) -> None:
            warnings.warn("Warning: Profiler clears events at the end of each cycle.", stacklevel=1)

    start_profiler(WarnsAsTorch211())  # warnings are errors in the tests


def test_without_the_setting_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepProfiler, "__init__", None)
    trainer = run(tmp_path, stop_at_step=1)
    assert trainer.phase_timer.follower is None
