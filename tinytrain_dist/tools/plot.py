"""Owns curves: `tinytrain plot` draws what runs recorded, `tinytrain schedule` the learning rate that a run will have.

Must not know training: one reads metrics.jsonl, the other calls the schedule of a configuration.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from tinytrain_dist.commandline import parse_command_line
from tinytrain_dist.config import TrainingConfig
from tinytrain_dist.errors import ConfigError, TinytrainError
from tinytrain_dist.schedule import learning_rate

Numbers = NDArray[np.float64]

# Okabe & Ito: told apart with any colour vision, and in print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK, FAINT = "#333333", "#DDDDDD"
CHART_WIDTH, CHART_HEIGHT = 80, 16
SCHEDULE_OPTIONS = """\
usage: tinytrain schedule [CONFIG.toml] [--out FILE.png] [--text] [any setting of training]

  --out FILE.png   draw a picture (needs matplotlib)
  --text           a chart on the terminal, also with --out; without --out there is no other

The settings:
"""


def _figure(**options: Any) -> tuple[Any, Any]:
    """A new matplotlib figure that needs no display. Errors: TinytrainError if matplotlib is not installed."""
    try:
        import matplotlib.ticker
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise TinytrainError(
            "matplotlib: is not installed, and a picture needs it; pip install 'tinytrain_dist[plot]' "
            "(`tinytrain schedule` without --out draws with letters)"
        ) from None
    figure = Figure(figsize=(8, 5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(**options)
    for ax in np.atleast_1d(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(INK)
        ax.grid(axis="y", color=FAINT, linewidth=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(colors=INK, labelsize=9)
        ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    return figure, axes


def _save(figure: Any, out: Path) -> None:
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"out: {out} is not a picture's name; it must end in .png, .svg or .pdf", "the settings")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except OSError as error:
        raise TinytrainError(f"out: {out} cannot be written ({error.strerror}); give another --out") from None
    print(out)


# ---------------------------------------------------------------- plot


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
    figure, (top, bottom) = _figure(nrows=2, sharex=True, height_ratios=(4, 1))
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
    _save(figure, out or runs[0] / "loss.png")
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
        from tinytrain_dist.tools.inspect import open_run, read_records  # imports torch, which `schedule` spares

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
        """The legend: name, and where the curves end."""
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
    """What is left after the first 3 % fills the height: neither the start nor a lone outlier flattens the rest."""
    late = [curve.loss[len(curve.loss) * 3 // 100 :] for curve in curves]
    smooth = [curve.smooth[len(curve.smooth) * 3 // 100 :] for curve in curves]
    shown = np.concatenate([*smooth, *(curve.eval_loss for curve in curves)])
    shown, raw = shown[np.isfinite(shown)], np.concatenate(late)
    if not len(shown):
        return 0.0, 1.0
    low = min(float(shown.min()), float(np.quantile(raw[np.isfinite(raw)], 0.01)))
    margin = 0.06 * (float(shown.max()) - low) or 0.5
    return low - margin, float(shown.max()) + margin


# ---------------------------------------------------------------- schedule


def schedule_main(args: list[str]) -> int:
    """`tinytrain schedule`: the learning rate of every step, as text or as a picture."""
    rest, out, text = _take_own_options(args)
    if {"-h", "--help"} & set(rest):
        print(SCHEDULE_OPTIONS)
    config = parse_command_line(rest, prog="tinytrain schedule")
    if out is not None:
        draw_schedule(config, out)
    if text or out is None:
        encoding = (sys.stdout.encoding or "").lower().replace("-", "")
        print(chart(config, blocks=" ▁▂▃▄▅▆▇█" if encoding.startswith("utf") else " #"))
    return 0


def _take_own_options(args: list[str]) -> tuple[list[str], Path | None, bool]:
    """--out and --text, and the arguments that belong to the configuration."""
    rest: list[str] = []
    out, text = None, False
    waiting = iter(args)
    for word in waiting:
        flag, equals, value = word.partition("=")
        if flag == "--out":
            value = value if equals else next(waiting, "")
            if not value or value.startswith("--"):
                raise ConfigError("out: names no file; say --out FILE.png", "the settings of schedule")
            out = Path(value)
        elif word == "--text":
            text = True
        else:
            rest.append(word)
    return rest, out, text


def landmarks(config: TrainingConfig) -> list[tuple[str, int]]:
    """The steps whose rates say what a schedule is; step n is the n-th update."""
    last, warmup = config.total_steps, config.warmup_steps
    found = [("first", 1)]
    if 1 < warmup < last:
        found.append(("warm-up ends", warmup))
    if config.schedule == "wsd":
        found.append(("decay starts", last - config.decay_steps))
    else:
        found.append(("middle", (last + 1) // 2))
    found.append(("last", last))
    return [(name, step) for name, step in found if 1 <= step <= last]


def _rate(config: TrainingConfig) -> Callable[[int], float]:
    return lambda step: learning_rate(config, step - 1)


def _title(config: TrainingConfig) -> str:
    warmup = f"{config.warmup_steps:,} of warm-up" if config.warmup_steps else "no warm-up"
    return f"learning rate: {config.schedule}, {config.total_steps:,} steps, {warmup}"


def chart(config: TrainingConfig, blocks: str = " ▁▂▃▄▅▆▇█") -> str:
    """The schedule in letters, at most 80 x 16; `blocks`: from an empty cell to a full one."""
    rate, last = _rate(config), config.total_steps
    marks = landmarks(config)
    margin, rows = 10, CHART_HEIGHT - 4 - len(marks)
    columns = min(CHART_WIDTH - margin - 1, last)
    edges = np.linspace(0, last, columns + 1)
    # the largest rate within each column, so that a short warm-up or a peak is never between two columns
    samples = [np.unique(np.linspace(int(a) + 1, max(int(b), int(a) + 1), 16).astype(int)) for a, b in _pairs(edges)]
    heights = np.array([max(rate(int(step)) for step in steps) for steps in samples])
    top, levels = float(heights.max()), len(blocks) - 1
    filled = np.rint(heights / top * rows * levels).astype(int)
    lines = [_title(config)[:CHART_WIDTH], ""]
    for row in reversed(range(rows)):
        label = f"{top:.2e}" if row == rows - 1 else f"{top * (row + 0.5) / rows:.2e}" if row == rows // 2 else ""
        cells = "".join(blocks[int(np.clip(height - row * levels, 0, levels))] for height in filled)
        lines.append(f"{label:>{margin - 1}} |{cells.rstrip()}")
    lines.append(f"{'0':>{margin - 1}} +{'-' * columns}")
    lines.append(
        f"{'step':>{margin - 1}}  1{last:>{max(columns - 1, 0)},}" if columns > 8 else f"{'step':>9}  1 to {last}"
    )
    width = len(f"{last:,}")
    lines += [f"{'step':>{margin - 1}} {step:>{width},}  {rate(step):.3e}  {name}" for name, step in marks]
    return "\n".join(lines)


def _pairs(edges: Numbers) -> list[tuple[float, float]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def draw_schedule(config: TrainingConfig, out: Path) -> None:
    """The schedule as a picture. Errors: TinytrainError if matplotlib is not installed or `out` cannot be written."""
    figure, ax = _figure()
    rate, marks = _rate(config), landmarks(config)
    points = {*np.linspace(1, config.total_steps, 2000).astype(int).tolist(), *(step for _, step in marks)}
    steps = sorted(points)
    ax.plot(steps, [rate(step) for step in steps], color=COLOURS[0], linewidth=1.8)
    ax.plot([step for _, step in marks], [rate(step) for _, step in marks], "o", color=COLOURS[0], clip_on=False)
    values = "   ".join(f"{name} (step {step:,}) {rate(step):.3g}" for name, step in marks)
    ax.set_title(f"{_title(config)}\n", loc="left", fontsize=11, color=INK)
    place: dict[str, Any] = {"xytext": (0, 8), "xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate(values, (0, 1), fontsize=8, color=INK, **place).set_in_layout(False)
    ax.set_ylim(0, 1.05 * max(rate(step) for step in steps))
    ax.set_ylabel("learning rate", color=INK)
    ax.yaxis.set_major_formatter("{x:.2g}")
    ax.set_xlabel("step", color=INK)
    _save(figure, out)


def main(args: list[str]) -> int:
    """`tinytrain plot`."""
    return tyro.cli(plot, prog="tinytrain plot", args=args)
