"""Draw the curves of several runs as SVG, for a reader without JavaScript; script.js draws the same with other axes.

Must not know how the numbers were read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinytrain_dist.cli.report_page.curves import Curve, smoothed
from tinytrain_dist.cli.report_page.markup import escaped, number_text
from tinytrain_dist.cli.report_page.run_data import RunData

WIDTH, HEIGHT = 560, 280  # of a chart, in the units of its view box
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 36  # margins
START_SHARE = 0.03  # of a loss curve; it falls so steeply there that the rest would look flat
MAX_DOTS = 40  # a curve with so few points is drawn with dots
ROW_HEIGHT = 28  # of a kind of events
NUM_COLOURS, NUM_DASHES = 7, 4  # in style.css


@dataclass(frozen=True)
class Chart:
    """A chart with one curve of each run."""

    name: str  # of the curve in RunData.curves
    title: str
    unit: str
    from_zero: bool = True  # whether the vertical axis begins at 0
    smooth: bool = False


CHARTS = (
    Chart("loss", "Train loss", "nats per token", from_zero=False, smooth=True),
    Chart("eval_loss", "Eval loss", "nats per token", from_zero=False),
    Chart("lr", "Learning rate", ""),
    Chart("grad_norm", "Gradient norm before clipping", "", smooth=True),
    Chart("tokens_per_second", "Throughput", "tokens per second", smooth=True),
    Chart("mfu", "MFU", "share of the peak FLOP/s", smooth=True),
    Chart("memory_gib", "Peak memory of a rank", "GiB"),
)


@dataclass(frozen=True)
class Axes:
    """The limits of a chart, and where a point is in it."""

    x_high: float
    y_low: float
    y_high: float

    def x(self, x: float) -> float:
        """Return the horizontal place of a point."""
        return LEFT + (WIDTH - LEFT - RIGHT) * x / self.x_high

    def y(self, y: float) -> float:
        """Return the vertical place. Values far outside of the axis stay at finite places."""
        share = (y - self.y_low) / (self.y_high - self.y_low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - max(-2.0, min(3.0, share)))


def style_of(number: int) -> str:
    """Return the classes of a run: its colour, and its dashes if there are more runs than colours."""
    return f"c{number % NUM_COLOURS} d{number // NUM_COLOURS % NUM_DASHES}"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from low to high."""
    rough = (high - low) / count
    if not 0 < rough < math.inf:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, first + 3 * count) if index * step <= high + 1e-9 * abs(high)]


def draw(chart: Chart, runs: Sequence[RunData]) -> str:
    """Return the chart as SVG over steps, with linear axes; "" if no run has a value."""
    curves = [(number, run.curves[chart.name]) for number, run in enumerate(runs)]
    axes = _axes(chart, [curve for _, curve in curves])
    if axes is None:
        return ""
    lines = [_draw_curve(chart, curve, number, axes) for number, curve in curves]
    marks = _event_marks(runs, axes) if chart.name == "loss" else ""
    return _frame(f"chart-{chart.name}", chart.title, axes, marks + "".join(lines), _y_labels(axes))


def _axes(chart: Chart, curves: Sequence[Curve]) -> Axes | None:
    shown = []
    for curve in curves:
        start = int(len(curve.points) * START_SHARE) if chart.name == "loss" else 0
        shown += [point for point in curve.points[start:] if point.finite]
    if not shown:
        return None
    low, high = min(point.low for point in shown), max(point.high for point in shown)
    low = min(low, 0.0) if chart.from_zero else low
    margin = high / 20 - low / 20 or abs(high) / 10 or 1.0
    y_low = low if chart.from_zero and low == 0 else low - margin
    return Axes(max(curve.points[-1].x for curve in curves if curve.points) or 1.0, y_low, high + margin)


def _draw_curve(chart: Chart, curve: Curve, number: int, axes: Axes) -> str:
    values = [point.y for point in curve.points]
    xs = [axes.x(point.x) for point in curve.points]
    parts = []
    if curve.is_merged:
        finite = [(x, point) for x, point in zip(xs, curve.points, strict=True) if point.finite]
        above = [f"{x:.1f},{axes.y(point.high):.1f}" for x, point in finite]
        below = [f"{x:.1f},{axes.y(point.low):.1f}" for x, point in reversed(finite)]
        parts.append(f'<polygon class="band" points="{" ".join(above + below)}"/>')
    elif chart.smooth:
        parts.append(f'<path class="raw" d="{_path(xs, values, axes)}"/>')
    parts.append(f'<path class="line" d="{_path(xs, smoothed(values) if chart.smooth else values, axes)}"/>')
    if len(values) <= MAX_DOTS and not chart.smooth:
        dots = ((x, value) for x, value in zip(xs, values, strict=True) if value is not None)
        parts += [f'<circle cx="{x:.1f}" cy="{axes.y(value):.1f}" r="2.5"/>' for x, value in dots]
    return f'<g class="{style_of(number)}">{"".join(parts)}</g>\n'


def _path(xs: Sequence[float], values: Sequence[float | None], axes: Axes) -> str:
    """Return the data of a path with a gap at each value that is None."""
    parts, pen = [], "M"
    for x, value in zip(xs, values, strict=True):
        if value is None:
            pen = "M"
        else:
            parts.append(f"{pen}{x:.1f},{axes.y(value):.1f}")
            pen = "L"
    return "".join(parts)


def _event_marks(runs: Sequence[RunData], axes: Axes) -> str:
    """Return a vertical line for each event but saves, which are many."""
    marks = []
    for number, run in enumerate(runs):
        for event in run.events.kept():
            if event.kind != "saved":
                x = axes.x(event.step)
                title = f"{run.name}, step {event.step}: {event.kind}"
                marks.append(
                    f'<line class="mark {style_of(number)}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" '
                    f'y2="{HEIGHT - BOTTOM}"><title>{escaped(title)}</title></line>'
                )
    return "".join(marks)


def _y_labels(axes: Axes) -> str:
    parts = []
    for tick in nice_ticks(axes.y_low, axes.y_high):
        y = axes.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{number_text(tick)}</text>')
    return "".join(parts)


def _frame(name: str, title: str, axes: Axes, inside: str, y_labels: str, height: int = HEIGHT) -> str:
    """Return a drawing with a horizontal axis of steps around what is inside."""
    bottom = height - BOTTOM
    labels = []
    for tick in nice_ticks(0.0, axes.x_high):
        x = axes.x(tick)
        labels.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        labels.append(f'<text class="mid" x="{x:.1f}" y="{bottom + 17}">{number_text(tick)}</text>')
    return (
        f'<svg id="{name}" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escaped(title)}">\n'
        f'<clipPath id="{name}-area"><rect x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT + 4}" '
        f'height="{bottom - TOP + 6}"/></clipPath>\n{y_labels}{"".join(labels)}\n'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
        f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{height - 3}">step</text>\n'
        f'<g clip-path="url(#{name}-area)">\n{inside}</g>\n</svg>'
    )


def row_offset(number: int, num_runs: int) -> float:
    """Return how far below its row a run has its dots, so that those of other runs stay visible."""
    return (number - (num_runs - 1) / 2) * min(4.0, 10 / num_runs)


def event_kinds(runs: Sequence[RunData]) -> list[str]:
    """Return the kinds of events of all runs."""
    return list(dict.fromkeys(kind for run in runs for kind in run.events.counts))


def draw_events(runs: Sequence[RunData]) -> str:
    """Return a chart with a row of dots for each kind of event; "" if there is no event."""
    kinds = event_kinds(runs)
    if not kinds:
        return ""
    steps = [run.step for run in runs] + [event.step for run in runs for event in run.events.kept()]
    axes = Axes(max(steps) or 1.0, 0.0, 1.0)
    rows = {kind: TOP + ROW_HEIGHT * row - 6 for row, kind in enumerate(kinds, 1)}
    height = TOP + ROW_HEIGHT * len(kinds) + BOTTOM
    labels, dots = [], []
    for kind, y in rows.items():
        labels.append(f'<text x="{LEFT}" y="{y - 7}">{escaped(kind)}</text>')
        labels.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    for number, run in enumerate(runs):
        for event in run.events.kept():
            title = f"{run.name}, step {event.step}: {event.text}"
            below = rows[event.kind] + row_offset(number, len(runs))
            dots.append(
                f'<circle class="{style_of(number)}" cx="{axes.x(event.step):.1f}" cy="{below:.1f}" r="3.5">'
                f"<title>{escaped(title)}</title></circle>"
            )
    return _frame("chart-events", "Events", axes, "\n".join(dots), "".join(labels), height)


def script_values(runs: Sequence[RunData]) -> dict[str, Any]:
    """Return what script.js draws."""
    return {
        "layout": {
            "left": LEFT,
            "right": RIGHT,
            "top": TOP,
            "bottom": BOTTOM,
            "start": START_SHARE,
            "dots": MAX_DOTS,
            "row": ROW_HEIGHT,
        },
        "kinds": event_kinds(runs),
        "charts": [
            {"name": chart.name, "zero": chart.from_zero, "smooth": chart.smooth, "unit": chart.unit}
            for chart in CHARTS
        ],
        "runs": [
            {
                "name": run.name,
                "style": style_of(number),
                "tokens": run.tokens_per_step,
                "phases": run.token_phases,
                "curves": {name: _curve_values(curve) for name, curve in run.curves.items() if curve.points},
                "events": [[event.step, event.kind] for event in run.events.kept()],
            }
            for number, run in enumerate(runs)
        ],
    }


def _curve_values(curve: Curve) -> dict[str, list[float | None]]:
    values: dict[str, list[float | None]] = {
        "x": [_rounded(point.x, 9) for point in curve.points],
        "y": [_rounded(point.y) for point in curve.points],
    }
    if curve.is_merged:
        values["low"] = [_rounded(point.low) for point in curve.points]
        values["high"] = [_rounded(point.high) for point in curve.points]
    return values


def _rounded(value: float | None, digits: int = 5) -> float | None:
    """Return a number that needs few characters."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
