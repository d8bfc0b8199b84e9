"""`tinytrain plot`: draw the loss curves that runs recorded.

Must not know training: it reads metrics.jsonl.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.cli.figure_style import COLOURS, INK, Numbers, new_figure, save_figure
from tinytrain_dist.config.run_folder import distinct_names, open_run, read_records
from tinytrain_dist.errors import ConfigError, TinytrainError


def plot(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path | None = None,
    x: Literal["steps", "tokens"] = "tokens",
) -> int:
    """Draw the loss curves of one or several runs in one picture, from their logs/metrics.jsonl.

    Args:
        runs: Runs (their target_dir), or files such as metrics.jsonl.
        out: The picture to write: .png, .svg or .pdf (None: loss.png in the folder of the run).
        x: The horizontal axis.
    """
    if not runs:
        raise ConfigError("runs: no run is given; give at least one (its target_dir)", "the settings of plot")
    if out is None and (len(runs) > 1 or runs[0].is_file()):
        raise ConfigError(f"out: not set for {len(runs)} run(s) or file(s); add --out FILE.png", "the settings of plot")
    curves = [read_curve(run, name, x) for run, name in zip(runs, distinct_names(runs), strict=True)]
    draw_curves(curves, x, out or runs[0] / "loss.png")
    return 0


def draw_curves(curves: list[Curve], x: str, out: Path) -> None:
    """Draw losses above learning rates. Errors: TinytrainError without matplotlib, or if `out` cannot be written."""
    figure, (top, bottom) = new_figure(nrows=2, sharex=True, height_ratios=(4, 1))
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        top.plot(curve.x, curve.loss, color=colour, alpha=0.25, linewidth=0.8)
        top.plot(curve.x, curve.smooth, color=colour, linewidth=1.8, label=curve.label())
        top.plot(curve.eval_x, curve.eval_loss, "o:", color=colour, markersize=5, markeredgecolor="white", linewidth=1)
        bottom.plot(curve.x, curve.lr, color=colour, linewidth=1.4)
    top.set_ylabel("loss (nats per token)", color=INK)
    top.set_ylim(*_loss_limits(curves))
    bottom.set_ylabel("learning rate", color=INK)
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_xlabel(x, color=INK)
    top.legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.align_ylabels()
    save_figure(figure, out)


@dataclass(frozen=True)
class Curve:
    """The records of one run, as arrays over steps or tokens. Evaluations have arrays of their own."""

    name: str
    x: Numbers
    loss: Numbers
    lr: Numbers
    eval_x: Numbers
    eval_loss: Numbers

    @cached_property
    def smooth(self) -> Numbers:
        """The smoothed loss."""
        return smoothed(self.loss)

    def label(self) -> str:
        """Return the text of the legend: the name, and the last values of the curves."""
        text = f"{self.name}: train {self.smooth[-1]:.3f}"
        return text + (f", eval {self.eval_loss[-1]:.3f} (dots)" if len(self.eval_loss) else "")


def read_curve(place: Path, name: str, x: str) -> Curve:
    """Read the records of a run, or of a file of records. x: "steps" or "tokens".

    Errors: TinytrainError if there is no record, or no logged step in it.
    """
    path = place if place.is_file() else open_run(place).records
    records = read_records(path)
    train = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    if not train:
        raise TinytrainError(f"{path}: has no logged step yet; wait for the first (log_every)")
    counted = {r["step"]: r["tokens"] for r in train if r["step"] and "tokens" in r} if x == "tokens" else {}

    def positions(of_records: list[dict[str, Any]]) -> Numbers:
        steps = _column(of_records, "step")
        return _tokens_at(steps, counted) if counted else steps

    return Curve(
        name=name,
        x=positions(train),
        loss=_column(train, "loss"),
        lr=_column(train, "lr"),
        eval_x=positions(evaluations),
        eval_loss=_column(evaluations, "loss"),
    )


def _tokens_at(steps: Numbers, counted: dict[int, float]) -> Numbers:
    """Return the tokens of steps: those of the logged steps around them, in proportion.

    counted: the tokens of logged steps. The steps after the last one are as large as those before it.
    """
    known = sorted({0: 0.0, **counted}.items())
    (before, tokens_before), (last, tokens_last) = known[-2:]
    end = max([last + 1, *steps.tolist()])
    known.append((end, tokens_last + (end - last) * (tokens_last - tokens_before) / (last - before)))
    tokens: Numbers = np.interp(steps, [step for step, _ in known], [number for _, number in known])
    return tokens


def _column(records: list[dict[str, Any]], key: str) -> Numbers:
    return np.array([float(record.get(key, math.nan)) for record in records])


def smoothed(values: Numbers) -> Numbers:
    """Return for each point the mean over a window of 8 % of all points, without non-finite values.

    The window is centred on its point, so that the curve does not lag. At the start, where the loss falls steeply, it
    shrinks on both sides. At the end, only the side with missing points is cut, so that the last mean is not one noisy
    value.
    """
    half_width = len(values) // 25
    index = np.arange(len(values))
    left = np.minimum(index, half_width)  # number of points to the left, and to the right
    low = index - left
    high = np.minimum(index + left, len(values) - 1) + 1
    # means by differences of cumulative sums
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0.0], np.cumsum(finite)])
    count = counts[high] - counts[low]
    means: Numbers = (sums[high] - sums[low]) / np.where(count > 0, count, np.nan)
    return means


def _loss_limits(curves: list[Curve]) -> tuple[float, float]:
    """Return the limits of the loss axis, chosen without the first 3 % of each curve and without outliers."""
    starts = [len(curve.loss) * 3 // 100 for curve in curves]
    losses = np.concatenate([curve.loss[start:] for curve, start in zip(curves, starts, strict=True)])
    smooth = [curve.smooth[start:] for curve, start in zip(curves, starts, strict=True)]
    shown = np.concatenate([*smooth, *(curve.eval_loss for curve in curves)])
    shown = shown[np.isfinite(shown)]
    if not len(shown):
        return 0.0, 1.0
    high = float(shown.max())
    low = min(float(shown.min()), float(np.quantile(losses[np.isfinite(losses)], 0.01)))
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def main(args: list[str]) -> int:
    """Run `tinytrain plot`."""
    return call_verb(plot, "plot", args)
