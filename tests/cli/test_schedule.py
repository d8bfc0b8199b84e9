"""`tinytrain schedule`: the chart fits a terminal and shows the rates of the schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tools import Cli, read_picture
from tinytrain_dist import TrainingConfig
from tinytrain_dist.cli.schedule import chart, draw_schedule


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


VARYING: dict[str, Any] = {
    "total_steps": 300,
    "warmup_iters": 10,
    "schedule": "wsd",
    "decay_iters": 100,
    "lr_max": 1.0,
    "lr_min": 0.0,
    "weight_decay": 0.5,
    "weight_decay_schedule": "lr",
    "batch_size": 32,
    "batch_size_warmup": ("0: 8", "100: 16", "200: 32"),
    "context_len": 10,
}


def heights_of(lines: list[str]) -> list[int]:
    bars = [line[11:] for line in lines]
    return [sum(1 for bar in bars if len(bar) > column and bar[column] != " ") for column in range(69)]


def test_what_varies_has_a_chart_of_its_own() -> None:
    lines = chart(TrainingConfig(**VARYING)).splitlines()
    assert max(map(len, lines)) <= 80
    at = lines.index(f"batch size: 3 phases, {10 * (100 * 8 + 100 * 16 + 100 * 32):,} tokens in all steps")
    assert at <= 17
    assert sorted(set(heights_of(lines[at + 2 : at + 6]))) == [1, 2, 4]  # of 4 rows: 8, 16 and 32 sequences
    assert [line.split()[1:3] for line in lines[at + 8 : at + 11]] == [["1", "8"], ["101", "16"], ["201", "32"]]
    at = lines.index("weight decay: proportional to the learning rate")
    assert heights_of(lines[at + 2 : at + 6])[30] == 4
    assert [line.split()[1:3] for line in lines[at + 8 :]] == [["1", "5.000e-02"], ["300", "0.000e+00"]]


def test_what_is_constant_has_no_chart() -> None:
    lines = chart(TrainingConfig(total_steps=300)).splitlines()
    assert len(lines) <= 16
    assert not any("batch size" in line or "weight decay" in line for line in lines)


def test_of_many_phases_the_first_are_listed() -> None:
    phases = tuple(f"{10 * number}: {number + 1}" for number in range(20))
    text = chart(TrainingConfig(total_steps=300, batch_size=20, batch_size_warmup=phases, warmup_iters=0))
    assert text.count("  phase") == 8
    assert text.endswith("and 12 more")


def test_the_point_at_which_a_run_was_branched_is_marked(tmp_path: Path) -> None:
    (tmp_path / "branch.json").write_text('{"run": "/runs/long", "step": 200}')
    text = chart(TrainingConfig(**VARYING, target_dir=str(tmp_path)))
    assert "step 200  1.000e+00  branched from long\n" in text
    assert len(text.partition("\n\nbatch size")[0].splitlines()) <= 16
    (tmp_path / "branch.json").write_text('{"run": 3}')
    assert "branched" not in chart(TrainingConfig(**VARYING, target_dir=str(tmp_path)))


def test_schedule_draws_a_picture(tinytrain: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("cosine", "wsd"):
        assert (
            tinytrain("schedule", f"--out={tmp_path / name}.png", "--schedule", name)[1] == f"{tmp_path / name}.png\n"
        )
    assert read_picture(tmp_path / "cosine.png") != read_picture(tmp_path / "wsd.png")
    (tmp_path / "branch.json").write_text('{"run": "/runs/long", "step": 200}')
    config = TrainingConfig(**VARYING, target_dir=str(tmp_path))
    draw_schedule(config, tmp_path / "all.svg")
    drawing = (tmp_path / "all.svg").read_text()
    for text in ("learning rate", "batch size", "weight decay", "branched from long (step 200)"):
        assert f"<!-- {text}" in drawing or text in drawing, text
