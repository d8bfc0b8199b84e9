"""`tinytrain plot`: curves show the recorded values, and smoothing does not shift them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tools import Cli, read_picture
from tests.helpers.training import TINY
from tinytrain_dist.cli import plot
from tinytrain_dist.config import run_folder


@pytest.mark.parametrize("x", ["steps", "tokens"])
def test_plot_draws_a_run(tinytrain: Cli, run: Path, x: str) -> None:
    pytest.importorskip("matplotlib")
    assert tinytrain("plot", run, "--x", x) == (0, f"{run / 'loss.png'}\n", "")
    read_picture(run / "loss.png")
    per_step = TINY["batch_size"] * TINY["context_len"] if x == "tokens" else 1
    curve = plot.read_curve(run, "run", x)
    assert curve.x.tolist() == [step * per_step for step in range(1, 7)]
    assert curve.eval_x.tolist() == [3 * per_step, 6 * per_step]
    records = run_folder.read_records(run / "logs" / "metrics.jsonl")
    assert curve.loss.tolist() == [r["loss"] for r in records if r["kind"] == "train"]
    assert curve.eval_loss.tolist() == [r["loss"] for r in records if r["kind"] == "eval"]


def test_several_runs_need_a_name_for_the_picture(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = folder / "one", folder / "other"
    code, _, err = tinytrain("plot", *runs)
    assert code == 2
    assert "out: not set for 2" in err
    assert tinytrain("plot", *runs, "--out", tmp_path / "new" / "both.svg")[0] == 0
    text = (tmp_path / "new" / "both.svg").read_text()
    assert "one: train" in text
    assert "other: train" in text
    assert tinytrain("plot", runs[0], "--out", tmp_path / "one.jpg")[0] == 2
    assert tinytrain("plot")[0] == 2


def test_runs_in_folders_of_one_name_get_different_labels() -> None:
    assert run_folder.distinct_names([Path("a/run"), Path("b/run")]) == ["a/run", "b/run"]
    assert run_folder.distinct_names([Path("a/one"), Path("b/two")]) == ["one", "two"]
    assert run_folder.distinct_names([Path("a/run"), Path("a/run")])[0].endswith("run")


def test_losses_that_are_not_finite_are_left_out(tinytrain: Cli, run: Path) -> None:
    pytest.importorskip("matplotlib")
    path = run / "logs" / "metrics.jsonl"
    path.write_text(re.sub(r'("step": [24],.*?"loss": )[\d.]+', r"\1NaN", path.read_text()) + '{"kind": "tr')
    assert np.isnan(plot.read_curve(run, "run", "steps").loss).sum() >= 2
    assert tinytrain("plot", run)[0] == 0


def test_smoothing_neither_lags_nor_invents() -> None:
    line = np.linspace(9.0, 3.0, 200)
    assert np.allclose(plot.smoothed(line)[:190], line[:190])
    assert plot.smoothed(line)[0] == line[0]
    noise = np.random.default_rng(0).normal(size=2000)
    assert plot.smoothed(noise)[100:].std() < noise.std() / 5
    holes = np.where(np.arange(200) % 7 == 3, np.nan, 1.0)
    assert np.allclose(plot.smoothed(holes)[3:], 1.0)
    assert np.isnan(plot.smoothed(np.full(5, np.nan))).all()


def test_a_run_that_logged_nothing_is_an_error(tinytrain: Cli, run: Path) -> None:
    pytest.importorskip("matplotlib")
    (run / "logs" / "metrics.jsonl").write_text("")
    assert "has no logged step yet" in tinytrain("plot", run)[2]
    (run / "logs" / "metrics.jsonl").unlink()
    assert "no records of a run" in tinytrain("plot", run)[2]


def test_a_run_without_evaluations_is_drawn_over_its_tokens(tinytrain: Cli, run: Path) -> None:
    path = run / "logs" / "metrics.jsonl"
    records = path.read_text().splitlines()
    path.write_text("\n".join(record for record in records if '"kind": "eval"' not in record) + "\n")
    code, _, err = tinytrain("plot", run, "--x", "tokens", "--out", run / "loss.png")
    assert code == 0, err
