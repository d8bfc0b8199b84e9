"""`tinytrain schedule`: show the learning rate that a configuration will have, as text or as a picture.

Must not know training: it calls the schedule of a configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinytrain_dist.cli.figures import COLOURS, INK, Numbers, new_figure, save_figure
from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.optim.lr_schedule import learning_rate

CHART_WIDTH, CHART_HEIGHT = 80, 16
SCHEDULE_OPTIONS = """\
usage: tinytrain schedule [CONFIG.toml] [--out FILE.png] [--text] [any setting of training]

  --out FILE.png   draw a picture (needs matplotlib)
  --text           a chart on the terminal, also with --out; without --out there is no other

The settings:
"""


def main(args: list[str]) -> int:
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
    """Return the steps whose rates characterize a schedule; step n is the n-th update."""
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
    """Draw the schedule in characters, at most 80 x 16; `blocks`: from an empty cell to a full one."""
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
    """Draw the schedule as a picture. Errors: TinytrainError without matplotlib, or if `out` cannot be written."""
    figure, ax = new_figure()
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
    save_figure(figure, out)
