"""Draw the numbers of token files as SVG: lengths of documents, frequencies of tokens, overlap of windows.

Must not know how they were computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tinytrain_dist.cli.report_page.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, nice_ticks, style_of
from tinytrain_dist.cli.report_page.markup import escaped, number_text
from tinytrain_dist.data.statistics.lengths import LengthHistogram

MOST_POINTS = 200  # of a curve
MOST_LABELS = 9  # below bars
AREA_WIDTH, AREA_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
SHARES = ("none", *(f"to {10 * number} %" for number in range(1, 11)))


def length_bins(lengths: LengthHistogram) -> tuple[list[int], list[int]]:
    """Return bounds of lengths, each twice the one before, and how many documents are between two of them."""
    bounds = [1 << power for power in range(lengths.greatest.bit_length() + 1)]
    counts = lengths.between(bounds)
    first = next((number for number, count in enumerate(counts) if count), 0)
    return bounds[first:], counts[first:]


def share_bins(ngrams: npt.NDArray[np.int64], found: npt.NDArray[np.int64]) -> list[int]:
    """Return how many windows have no n-gram in common with the training data, up to 10 % of theirs, ... (SHARES)."""
    bins = np.ceil(10 * found / np.maximum(ngrams, 1)).astype(np.int64)
    return [int(count) for count in np.bincount(bins, minlength=len(SHARES))]


def draw_bars(name: str, title: str, labels: Sequence[str], counts: Sequence[int], below: str, number: int = 0) -> str:
    """Return bars with a label each. below: what the labels are. number: of the colour."""
    width = AREA_WIDTH / max(1, len(counts))
    high = max([*counts, 1]) * 1.05
    every = -(-len(labels) // MOST_LABELS)
    parts = []
    for index, (label, count) in enumerate(zip(labels, counts, strict=True)):
        left = LEFT + index * width
        height = AREA_HEIGHT * count / high
        height = max(height, 1.0) if count else 0.0  # a single document among many stays visible
        parts.append(
            f'<rect class="bar" x="{left + 0.05 * width:.1f}" y="{TOP + AREA_HEIGHT - height:.1f}" '
            f'width="{0.9 * width:.1f}" height="{height:.1f}"><title>{escaped(label)}: {count:,}</title></rect>'
        )
        if index % every == 0:
            parts.append(
                f'<text class="mid" x="{left + width / 2:.1f}" y="{HEIGHT - BOTTOM + 17}">{escaped(label)}</text>'
            )
    inside = f'<g class="{style_of(number)}">{"".join(parts)}</g>'
    return _frame(name, title, inside, [(tick, tick / high) for tick in nice_ticks(0.0, high)], below)


def draw_frequencies(counts: npt.NDArray[np.int64]) -> str:
    """Return the curve of token counts by rank, with logarithmic axes; "" without tokens."""
    sorted_counts = np.sort(counts[counts > 0])[::-1]
    if not len(sorted_counts):
        return ""
    ranks = np.unique(np.geomspace(1, len(sorted_counts), MOST_POINTS).astype(np.int64))
    most, last = max(1.0, math.log10(int(sorted_counts[0]))), max(1.0, math.log10(len(sorted_counts)))
    points = [
        (LEFT + AREA_WIDTH * math.log10(rank) / last, _y(math.log10(int(sorted_counts[rank - 1])) / most))
        for rank in ranks.tolist()
    ]
    path = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    labels = "".join(
        f'<text class="mid" x="{LEFT + AREA_WIDTH * power / last:.1f}" y="{HEIGHT - BOTTOM + 17}">'
        f"{number_text(10.0**power)}</text>"
        for power in range(math.floor(last) + 1)
    )
    inside = f'<g class="{style_of(0)}"><path class="line" d="M{path}"/></g>{labels}'
    ticks = [(10.0**power, power / most) for power in range(math.floor(most) + 1)]
    return _frame("chart-frequencies", "How often each token occurs, by rank", inside, ticks, "rank of the token")


def _y(share: float) -> float:
    return TOP + AREA_HEIGHT * (1 - share)


def _frame(name: str, title: str, inside: str, ticks: Sequence[tuple[float, float]], below: str) -> str:
    """Return a drawing with a vertical axis. ticks: numbers, and how high they are as a share of the area."""
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(share):.1f}" y2="{_y(share):.1f}"/>'
        f'<text class="end" x="{LEFT - 6}" y="{_y(share) + 4:.1f}">{number_text(tick)}</text>'
        for tick, share in ticks
    )
    return (
        f'<svg id="{escaped(name)}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(title)}">\n{grid}'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 3}">{escaped(below)}</text>\n'
        f"{inside}\n</svg>"
    )
