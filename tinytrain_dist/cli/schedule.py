"""`tinytrain schedule`: show the learning rate of a configuration, as text or as a picture.

Must not know training: it calls the schedule of a configuration.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from tinytrain_dist.cli.arguments import parse_options
from tinytrain_dist.cli.figure_style import COLOURS, INK, Numbers, new_figure, save_figure
from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.optim.lr_schedule import learning_rate
from tinytrain_dist.training.run_length import resolve_epochs

CHART_WIDTH = 80
CHART_HEIGHT = 16
LABEL_WIDTH = 9  # of the numbers left of the chart
SAMPLES_PER_COLUMN = 16
NUM_POINTS = 2000  # of a picture
BLOCKS = " ▁▂▃▄▅▆▇█"  # from an empty to a full cell
ASCII_BLOCKS = " #"  # for terminals without UTF-8


@dataclasses.dataclass(frozen=True)
class ScheduleOptions:
    """Show the learning rate of every step of a configuration, as text or as a picture.

    tinytrain schedule [CONFIG.toml] [OPTIONS] [SETTINGS]
    """

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png", help_behavior_hint="")] = None
    """Draw a picture (needs matplotlib)."""
    text: bool = False
    """Print a chart in the terminal. This is the default without --out."""


def main(args: list[str]) -> int:
    """Show the learning rate of every step, as text or as a picture."""
    options, settings = parse_options(ScheduleOptions, "schedule", args)
    config = resolve_epochs(parse_command_line(settings, prog="tinytrain schedule"))
    if options.out is not None:
        draw_schedule(config, options.out)
    if options.text or options.out is None:
        encoding = (sys.stdout.encoding or "").lower().replace("-", "")
        print(chart(config, BLOCKS if encoding.startswith("utf") else ASCII_BLOCKS))
    return 0


def landmarks(config: TrainingConfig) -> list[tuple[str, int]]:
    """Return the most important steps of a schedule with their names; step n is the n-th update."""
    last = config.total_steps
    warmup = config.warmup_steps
    marks = [("first", 1)]
    if 1 < warmup < last:
        marks.append(("warm-up ends", warmup))
    if config.schedule == "wsd":
        marks.append(("decay starts", last - config.decay_steps))
    else:
        marks.append(("middle", (last + 1) // 2))
    marks.append(("last", last))
    return [(name, step) for name, step in marks if 1 <= step <= last]


def _rate(config: TrainingConfig) -> Callable[[int], float]:
    """Return the rate of the n-th update as a function of n; the schedule counts completed steps."""
    return lambda step: learning_rate(config, step - 1)


def _title(config: TrainingConfig) -> str:
    warmup = f"{config.warmup_steps:,} of warm-up" if config.warmup_steps else "no warm-up"
    return f"learning rate: {config.schedule}, {config.total_steps:,} steps, {warmup}"


def chart(config: TrainingConfig, blocks: str = BLOCKS) -> str:
    """Draw the schedule with at most 80 x 16 characters. blocks: characters from an empty to a full cell."""
    rate = _rate(config)
    last_step = config.total_steps
    marks = landmarks(config)
    num_rows = CHART_HEIGHT - 4 - len(marks)
    num_columns = min(CHART_WIDTH - LABEL_WIDTH - 2, last_step)
    column_rates = _column_rates(config, num_columns)
    top_rate = float(column_rates.max())
    levels = len(blocks) - 1  # of one cell
    heights = np.rint(column_rates / top_rate * num_rows * levels).astype(int)

    lines = [_title(config)[:CHART_WIDTH], ""]
    for row in reversed(range(num_rows)):
        label = ""
        if row == num_rows - 1:
            label = f"{top_rate:.2e}"
        elif row == num_rows // 2:
            label = f"{top_rate * (row + 0.5) / num_rows:.2e}"
        cells = "".join(blocks[int(np.clip(height - row * levels, 0, levels))] for height in heights)
        lines.append(f"{label:>{LABEL_WIDTH}} |{cells.rstrip()}")
    lines.append(f"{'0':>{LABEL_WIDTH}} +{'-' * num_columns}")
    axis = f"1{last_step:>{num_columns - 1},}" if num_columns > 8 else f"1 to {last_step}"
    lines.append(f"{'step':>{LABEL_WIDTH}}  {axis}")
    step_width = len(f"{last_step:,}")
    for name, step in marks:
        lines.append(f"{'step':>{LABEL_WIDTH}} {step:>{step_width},}  {rate(step):.3e}  {name}")
    return "\n".join(lines)


def _column_rates(config: TrainingConfig, num_columns: int) -> Numbers:
    """Return the largest rate within each column, so that a short warm-up or a peak never falls between columns."""
    rate = _rate(config)
    edges = np.linspace(0, config.total_steps, num_columns + 1).tolist()
    column_rates = []
    for start, end in itertools.pairwise(edges):
        first = int(start) + 1
        last = max(int(end), first)
        steps = np.unique(np.linspace(first, last, SAMPLES_PER_COLUMN).astype(int))
        column_rates.append(max(rate(int(step)) for step in steps))
    return np.array(column_rates)


def draw_schedule(config: TrainingConfig, out: Path) -> None:
    """Draw the schedule as a picture. Errors: TinytrainError without matplotlib, or if `out` cannot be written."""
    figure, ax = new_figure()
    rate = _rate(config)
    marks = landmarks(config)
    mark_steps = [step for _, step in marks]
    steps = sorted({*np.linspace(1, config.total_steps, NUM_POINTS).astype(int).tolist(), *mark_steps})
    ax.plot(steps, [rate(step) for step in steps], color=COLOURS[0], linewidth=1.8)
    ax.plot(mark_steps, [rate(step) for step in mark_steps], "o", color=COLOURS[0], clip_on=False)
    values = "   ".join(f"{name} (step {step:,}) {rate(step):.3g}" for name, step in marks)
    ax.set_title(f"{_title(config)}\n", loc="left", fontsize=11, color=INK)
    place: dict[str, Any] = {"xytext": (0, 8), "xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate(values, (0, 1), fontsize=8, color=INK, **place).set_in_layout(False)
    ax.set_ylim(0, 1.05 * max(rate(step) for step in steps))
    ax.set_ylabel("learning rate", color=INK)
    ax.yaxis.set_major_formatter("{x:.2g}")
    ax.set_xlabel("step", color=INK)
    save_figure(figure, out)
