"""`tinytrain schedule`: show what changes from step to step, as text or as a picture.

That is the learning rate, and the batch size and the weight decay if they vary. Must not know training: it calls the
schedules of a configuration.
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
from tinytrain_dist.config.run_folder import BRANCH_FILE
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.optim.lr_schedule import learning_rate, weight_decay_factor
from tinytrain_dist.training.run_length import resolve_epochs
from tinytrain_dist.utils.atomic_files import read_json_object
from tinytrain_dist.utils.json_files import is_whole_number

CHART_WIDTH = 80
CHART_HEIGHT = 16
FURTHER_ROWS = 4  # of the charts below that of the learning rate
MAX_MARKS = 8  # of one chart
LABEL_WIDTH = 9  # of the numbers left of the chart
SAMPLES_PER_COLUMN = 16
NUM_POINTS = 2000  # of a picture
BLOCKS = " ▁▂▃▄▅▆▇█"  # from an empty to a full cell
ASCII_BLOCKS = " #"  # for terminals without UTF-8


@dataclasses.dataclass(frozen=True)
class ScheduleOptions:
    """Show the learning rate of every step of a configuration, as text or as a picture.

    tinytrain schedule [CONFIG.toml] [OPTIONS] [SETTINGS]

    Batch size and weight decay follow if they vary. In place of the file, a run can be named (its target_dir).
    """

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png", help_behavior_hint="")] = None
    """Draw a picture (needs matplotlib)."""
    text: bool = False
    """Print a chart in the terminal. This is the default without --out."""


def main(args: list[str]) -> int:
    """Show the schedules of a configuration, as text or as a picture."""
    options, settings = parse_options(ScheduleOptions, "schedule", args)
    config = resolve_epochs(parse_command_line(settings, prog="tinytrain schedule"))
    if options.out is not None:
        draw_schedule(config, options.out)
    if options.text or options.out is None:
        encoding = (sys.stdout.encoding or "").lower().replace("-", "")
        print(chart(config, BLOCKS if encoding.startswith("utf") else ASCII_BLOCKS))
    return 0


@dataclasses.dataclass(frozen=True)
class Curve:
    """A quantity of every step.

    * `value`: of the n-th update, as a function of n; the schedules count completed steps.
    * `marks`: steps to name, each with its name.
    * `digits`: the format of values beside marks, and of those at the left of a chart.
    """

    name: str
    title: str
    value: Callable[[int], float]
    marks: list[tuple[str, int]]
    digits: tuple[str, str] = (".3e", ".2e")


def curves(config: TrainingConfig) -> list[Curve]:
    """Return the learning rate, and what else varies."""
    sizes, decay = config.batch_sizes, config.weight_decay
    found = [Curve("learning rate", _title(config), lambda step: learning_rate(config, step - 1), landmarks(config))]
    if sizes.varies:
        tokens = sizes.before(config.total_steps) * config.context_len
        marks = [("phase", phase.from_step + 1) for phase in sizes.phases if phase.from_step < config.total_steps]
        title = f"batch size: {len(sizes.phases)} phases, {tokens:,} tokens in all steps"
        found.append(Curve("batch size", title, lambda step: sizes.at(step - 1), marks, (",.0f", ",.0f")))
    if config.weight_decay_schedule != "constant":
        title = "weight decay: proportional to the learning rate"
        ends = [mark for mark in landmarks(config) if mark[0] in ("first", "last")]
        found.append(Curve("weight decay", title, lambda step: decay * weight_decay_factor(config, step - 1), ends))
    return found


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
    marks += [*_branch_point(config), ("last", last)]
    return [(name, step) for name, step in marks if 1 <= step <= last]


def _branch_point(config: TrainingConfig) -> list[tuple[str, int]]:
    """Return the step at which the run of this configuration was branched from another run; [] if it was not."""
    branch = read_json_object(Path(config.target_dir) / BRANCH_FILE)
    step: Any = branch.get("step")
    run = branch.get("run")
    return [(f"branched from {Path(run).name}", step)] if is_whole_number(step) and isinstance(run, str) else []


def _title(config: TrainingConfig) -> str:
    warmup = f"{config.warmup_steps:,} of warm-up" if config.warmup_steps else "no warm-up"
    return f"learning rate: {config.schedule}, {config.total_steps:,} steps, {warmup}"


def chart(config: TrainingConfig, blocks: str = BLOCKS) -> str:
    """Draw the curves with at most 80 characters in a line, the learning rate in at most 16 lines.

    blocks: characters from an empty to a full cell.
    """
    rate, *others = curves(config)
    charts = [_chart(rate, config.total_steps, CHART_HEIGHT - 4 - len(rate.marks), blocks)]
    charts += [_chart(curve, config.total_steps, FURTHER_ROWS, blocks) for curve in others]
    return "\n\n".join(charts)


def _chart(curve: Curve, last_step: int, num_rows: int, blocks: str) -> str:
    """Draw one curve in so many rows, with its marks below."""
    num_columns = min(CHART_WIDTH - LABEL_WIDTH - 2, last_step)
    column_values = _column_values(curve, last_step, num_columns)
    top = float(column_values.max())
    levels = len(blocks) - 1  # of one cell
    heights = np.rint(column_values / (top or 1.0) * num_rows * levels).astype(int)
    digits, label_digits = curve.digits

    lines = [curve.title[:CHART_WIDTH], ""]
    for row in reversed(range(num_rows)):
        label = ""
        if row == num_rows - 1:
            label = f"{top:{label_digits}}"
        elif row == num_rows // 2:
            label = f"{top * (row + 0.5) / num_rows:{label_digits}}"
        cells = "".join(blocks[int(np.clip(height - row * levels, 0, levels))] for height in heights)
        lines.append(f"{label:>{LABEL_WIDTH}} |{cells.rstrip()}")
    lines.append(f"{'0':>{LABEL_WIDTH}} +{'-' * num_columns}")
    axis = f"1{last_step:>{num_columns - 1},}" if num_columns > 8 else f"1 to {last_step}"
    lines.append(f"{'step':>{LABEL_WIDTH}}  {axis}")
    step_width = len(f"{last_step:,}")
    value_width = max(len(f"{curve.value(step):{digits}}") for _, step in curve.marks)
    for name, step in curve.marks[:MAX_MARKS]:
        value = f"{curve.value(step):{digits}}"
        lines.append(f"{'step':>{LABEL_WIDTH}} {step:>{step_width},}  {value:>{value_width}}  {name}"[:CHART_WIDTH])
    if len(curve.marks) > MAX_MARKS:
        lines.append(f"{'':>{LABEL_WIDTH}} and {len(curve.marks) - MAX_MARKS} more")
    return "\n".join(lines)


def _column_values(curve: Curve, last_step: int, num_columns: int) -> Numbers:
    """Return the largest value within each column, so that a short warm-up or a peak never falls between columns."""
    edges = np.linspace(0, last_step, num_columns + 1).tolist()
    column_values = []
    for start, end in itertools.pairwise(edges):
        first = int(start) + 1
        last = max(int(end), first)
        steps = np.unique(np.linspace(first, last, SAMPLES_PER_COLUMN).astype(int))
        column_values.append(max(curve.value(int(step)) for step in steps))
    return np.array(column_values)


def draw_schedule(config: TrainingConfig, out: Path) -> None:
    """Draw the curves below each other. Errors: TinytrainError without matplotlib, or if `out` cannot be written."""
    shown = curves(config)
    figure, axes = new_figure(nrows=len(shown), sharex=True, height_ratios=(2,) + (1,) * (len(shown) - 1))
    axes = np.atleast_1d(axes)
    for number, (ax, curve) in enumerate(zip(axes, shown, strict=True)):
        mark_steps = [step for _, step in curve.marks]
        # with the steps before the marks, so that the line of a phase is not slanted
        steps = {*np.linspace(1, config.total_steps, NUM_POINTS).astype(int).tolist(), *mark_steps}
        steps |= {step - 1 for step in mark_steps if step > 1}
        values = [curve.value(step) for step in sorted(steps)]
        colour = COLOURS[number % len(COLOURS)]
        ax.plot(sorted(steps), values, color=colour, linewidth=1.8)
        ax.plot(mark_steps, [curve.value(step) for step in mark_steps], "o", color=colour, clip_on=False)
        for _, step in _branch_point(config):
            ax.axvline(step, color=INK, linestyle=":", linewidth=1)
        ax.set_ylim(0, 1.05 * max(values) or 1)
        ax.set_ylabel(curve.name, color=INK)
        ax.yaxis.set_major_formatter("{x:.2g}" if curve.name != "batch size" else "{x:,.0f}")
    rate, branched = shown[0], _branch_point(config)
    marks = [mark for mark in rate.marks if mark not in branched]
    marked = "   ".join(f"{name} (step {step:,}) {rate.value(step):.3g}" for name, step in marks)
    for name, step in branched:  # beside its line, because the row of the others has no room
        beside: dict[str, Any] = {"xytext": (-4, 4), "textcoords": "offset points", "ha": "right", "fontsize": 8}
        axes[0].annotate(f"{name} (step {step:,})", (step, 0), color=INK, **beside)
    axes[0].set_title(f"{rate.title}\n", loc="left", fontsize=11, color=INK)
    place: dict[str, Any] = {"xytext": (0, 8), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes[0].annotate(marked, (0, 1), fontsize=8, color=INK, **place).set_in_layout(False)
    axes[-1].set_xlabel("step", color=INK)
    figure.align_ylabels()
    save_figure(figure, out)
