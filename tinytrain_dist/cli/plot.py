"""`tinytrain plot`: draw the loss curves that runs recorded.

Must not know training: it reads metrics.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from tinytrain_dist.cli.figures import COLOURS, INK, Numbers, new_figure, save_figure
from tinytrain_dist.errors import ConfigError, TinytrainError


def plot(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path | None = None,
    x: Literal["steps", "tokens"] = "tokens",
) -> int:
    """Draw the loss of one run, or of several over each other, from the plain record (logs/metrics.jsonl).

    Args:
        runs: Runs (their target_dir), or files named like metrics.jsonl.
        out: The picture: .png, .svg or .pdf; None: loss.png in the folder of the run.
        x: What the loss is drawn against.
    """
    if not runs:
        raise ConfigError("runs: none is given; name at least one (its target_dir)", "the settings of plot")
    if out is None and (len(runs) > 1 or runs[0].is_file()):
        raise ConfigError(f"out: not set for {len(runs)} record(s); say --out FILE.png", "the settings of plot")
    curves = [Curve(run, name, x) for run, name in zip(runs, _names(runs), strict=True)]
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
    save_figure(figure, out or runs[0] / "loss.png")
    return 0


def _names(runs: Sequence[Path]) -> list[str]:
    """Folder names, with as much of their parents as tells them apart."""
    paths = [path.resolve().parts for path in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


class Curve:
    """What one run recorded, as arrays over steps or tokens."""

    def __init__(self, place: Path, name: str, x: str) -> None:
        """Errors: TinytrainError if there is no record, or no logged step in it."""
        from tinytrain_dist.config.run_folder import (
            open_run,
            read_records,  # imports torch, which `schedule` spares
        )

        path = place if place.is_file() else open_run(place).records
        records = read_records(path)
        train = [record for record in records if record["kind"] == "train"]
        evals = [record for record in records if record["kind"] == "eval"]
        if not train:
            raise TinytrainError(f"{path}: has no logged step yet; wait for the first (log_every)")
        scale = train[-1]["tokens"] / train[-1]["step"] if x == "tokens" else 1.0
        self.name = name
        self.x, self.loss, self.lr = (_column(train, key) for key in ("step", "loss", "lr"))
        self.eval_x, self.eval_loss = (_column(evals, key) for key in ("step", "loss"))
        self.x, self.eval_x = self.x * scale, self.eval_x * scale
        self.smooth = smoothed(self.loss)

    def label(self) -> str:
        """Return the legend: the name, and where the curves end."""
        text = f"{self.name}: train {self.smooth[-1]:.3f}"
        return text + (f", eval {self.eval_loss[-1]:.3f} (dots)" if len(self.eval_loss) else "")


def _column(records: list[dict[str, Any]], key: str) -> Numbers:
    return np.array([float(record.get(key, math.nan)) for record in records])


def smoothed(values: Numbers) -> Numbers:
    """Mean over a window of 8 % of the points around each; values that are not finite do not count.

    Centred, so that it does not lag. At the start, where the loss falls steeply, the window shrinks on both sides; at
    the end only the side that is missing, so that the last mean is not one noisy value.
    """
    half, index = len(values) // 25, np.arange(len(values))
    low = index - np.minimum(index, half)
    high = np.minimum(index + np.minimum(index, half), len(values) - 1) + 1
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0.0], np.cumsum(good)])
    seen = counts[high] - counts[low]
    means: Numbers = (sums[high] - sums[low]) / np.where(seen > 0, seen, np.nan)
    return means


def _loss_limits(curves: list[Curve]) -> tuple[float, float]:
    """Return limits in which all but the first 3 % fills the height, so that no outlier flattens the rest."""
    late = [curve.loss[len(curve.loss) * 3 // 100 :] for curve in curves]
    smooth = [curve.smooth[len(curve.smooth) * 3 // 100 :] for curve in curves]
    shown = np.concatenate([*smooth, *(curve.eval_loss for curve in curves)])
    shown, raw = shown[np.isfinite(shown)], np.concatenate(late)
    if not len(shown):
        return 0.0, 1.0
    low = min(float(shown.min()), float(np.quantile(raw[np.isfinite(raw)], 0.01)))
    margin = 0.06 * (float(shown.max()) - low) or 0.5
    return low - margin, float(shown.max()) + margin


def main(args: list[str]) -> int:
    """`tinytrain plot`."""
    return tyro.cli(plot, prog="tinytrain plot", args=args)
