"""`tinytrain schedule`: the chart fits a terminal and shows the rates of the schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tools import Cli, read_picture
from tinytrain_dist import TrainingConfig
from tinytrain_dist.cli.schedule import chart


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("blocks", [" ▁▂▃▄▅▆▇█", " #"])
@pytest.mark.parametrize("steps", [1, 2, 3, 69, 300, 1_000_000])
def test_the_chart_fits_a_terminal(schedule: Any, blocks: str, steps: int) -> None:
    config = TrainingConfig(total_steps=steps, schedule=schedule, warmup_iters=steps // 5)
    lines = chart(config, blocks).splitlines()
    assert len(lines) <= 16
    assert max(map(len, lines)) <= 80
    assert ("".join(lines).isascii()) == (blocks == " #")


def test_the_chart_shows_the_rates_of_the_schedule() -> None:
    config = TrainingConfig(total_steps=1000, warmup_iters=100, lr_max=1.0, lr_min=0.2)
    lines = chart(config).splitlines()
    assert [line.split()[1:3] for line in lines[-4:]] == [
        ["1", "1.000e-02"], ["100", "1.000e+00"], ["500", f"{0.6 + 0.4 * math.cos(math.pi * 4 / 9):.3e}"],
        ["1,000", "2.000e-01"],
    ]  # fmt: skip
    bars = [line[11:] for line in lines[2:10]]
    heights = [sum(1 for bar in bars if len(bar) > column and bar[column] != " ") for column in range(69)]
    top = heights.index(max(heights))
    assert top == 6  # 100 of 1,000 steps, in 69 columns
    assert heights[: top + 1] == sorted(heights[: top + 1])
    assert heights[top:] == sorted(heights[top:], reverse=True)
    assert heights[-1] == 2  # a fifth of eight rows, rounded up


def test_schedule_takes_settings_from_file_and_command_line(tinytrain: Cli, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[run]\ntotal_steps = 200\n[optimizer]\nlr_max = 0.5\n")
    code, out, _ = tinytrain("schedule", tmp_path / "run.toml", "--lr-max", 0.25, "--text")
    assert code == 0
    assert "200 steps, 2 of warm-up" in out
    assert "2.500e-01  warm-up ends" in out
    code, _, err = tinytrain("schedule", tmp_path / "run.toml", "--lr-maxx", 1, "--warmup-iters", -1)
    assert code == 2
    assert "did you mean lr_max?" in err
    code, _, err = tinytrain("schedule", "--out")
    assert code == 2
    assert "--out: needs a value" in err


def test_schedule_draws_a_picture(tinytrain: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("cosine", "wsd"):
        assert (
            tinytrain("schedule", f"--out={tmp_path / name}.png", "--schedule", name)[1] == f"{tmp_path / name}.png\n"
        )
    assert read_picture(tmp_path / "cosine.png") != read_picture(tmp_path / "wsd.png")
