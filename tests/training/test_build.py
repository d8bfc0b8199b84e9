"""Building a run: problems are found before anything is changed, and the start is logged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for
from tinytrain_dist.config.schema import TrainingConfig


def build_error(settings: dict[str, Any], different_slots: bool = False) -> str:
    """On a rank: build a run and return its error."""
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.training import build

    if different_slots:
        real = build._check_ranks

        def check(train_step: Any, data: Any, step: int) -> None:
            share = replace(train_step.share(step), slots=(0, 1, 2, 3))
            train_step.share = lambda _: share
            real(train_step, data, step)

        build._check_ranks = check
    try:
        build.build_trainer(TrainingConfig(**settings), init_distributed("cpu"))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.multiprocess
def test_more_writers_than_ranks_are_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", parallel="ddp", ckpt_writers=3)
    errors = run_ranks(2, build_error, settings)
    assert errors[0] == errors[1]
    assert "ckpt_writers: 3 is more than the 2 ranks of this run" in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.multiprocess
def test_ranks_that_draw_the_same_slots_do_not_start(tmp_path: Path) -> None:
    errors = run_ranks(2, build_error, settings_for(tmp_path, "run", parallel="ddp"), True)
    assert errors[0] == errors[1]
    assert "ranks draw slots [0, 0, 1, 1" in errors[0]


@pytest.mark.multiprocess
def test_a_resumed_run_logs_the_checkpoint_and_the_changed_settings(tmp_path: Path) -> None:
    run_ranks(1, fit, settings_for(tmp_path, "run", stop_at_step=3, precision="fp32"))
    run_ranks(1, fit, settings_for(tmp_path, "run", log_every=2))
    resumed = [record for record in Run(tmp_path / "run").records if record["kind"] == "resumed"]
    assert [record["step"] for record in resumed] == [3]
    assert "checkpoint-00000003" in resumed[0]["text"]
    assert "log_every: 1 -> 2" in resumed[0]["text"]
    assert "precision" not in resumed[0]["text"], "on a CPU, precision = auto is the saved fp32"
    assert 'precision = "fp32"' in (tmp_path / "run" / "config.toml").read_text()


def fit_with_defaults_of_a_gpu(settings: dict[str, Any]) -> list[str]:
    """On a rank: train on the CPU with the defaults of a GPU; return the types whose peak was asked for."""
    from tinytrain_dist.metrics import step_metrics
    from tinytrain_dist.parallel.device_defaults import set_device_defaults
    from tinytrain_dist.training import build

    asked: list[str] = []

    def peak_flops(device: object, product_type: str) -> float:
        asked.append(product_type)
        return 1e12

    step_metrics.peak_flops = peak_flops
    build.resolve_device_defaults = lambda config, _: (set_device_defaults(config, on_gpu=True, in_bf16=True), "noted")
    fit(settings)
    return asked


@pytest.mark.multiprocess
def test_a_run_uses_the_defaults_of_its_device(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", total_steps=2)
    del settings["micro_batch_size"]
    [asked] = run_ranks(1, fit_with_defaults_of_a_gpu, settings)
    assert set(asked) == {"bf16"}
    resolved = (tmp_path / "run" / "config.toml").read_text()
    assert 'precision = "bf16"' in resolved
    assert "micro_batch_size = 8" in resolved, "the largest that fits"
    assert any("mfu" in record for record in Run(tmp_path / "run").records)
