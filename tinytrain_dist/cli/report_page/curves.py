"""Keep a curve of any number of points in bounded memory: neighbours are merged, extremes are kept.

Must not know what a curve shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LARGEST = 1e300  # greater values count as infinite, so that sums and differences of values are finite
SMOOTHED_SHARE = 0.04  # of all points of a curve, on each side of a point


@dataclass
class Point:
    """One or several neighbouring points of a curve."""

    x_sum: float = 0.0
    count: int = 0
    y_sum: float = 0.0
    finite: int = 0  # number of finite values in y_sum
    low: float = math.inf
    high: float = -math.inf

    def add(self, x: float, y: float) -> None:
        """Add a point. A value that is not finite only counts."""
        self.x_sum += x
        self.count += 1
        if abs(y) < LARGEST:  # also not NaN
            self.y_sum += y
            self.finite += 1
            self.low = min(self.low, y)
            self.high = max(self.high, y)

    def merged(self, other: Point) -> Point:
        """Return both points as one."""
        return Point(
            self.x_sum + other.x_sum,
            self.count + other.count,
            self.y_sum + other.y_sum,
            self.finite + other.finite,
            min(self.low, other.low),
            max(self.high, other.high),
        )

    @property
    def x(self) -> float:
        """The mean place."""
        return self.x_sum / self.count

    @property
    def y(self) -> float | None:
        """The mean of the finite values; None if there is none."""
        return self.y_sum / self.finite if self.finite else None


class Curve:
    """A curve with at most `limit` points. When it is full, each two neighbours become one."""

    def __init__(self, limit: int) -> None:
        """limit: an even number."""
        self.points: list[Point] = []
        self.not_finite = 0
        self.first_not_finite: float | None = None  # x of the first value that is not finite
        self.last = math.nan  # the last finite value
        self._limit = limit
        self._points_in_each = 1

    def add(self, x: float, y: float) -> None:
        """Add a point at the end."""
        if not self.points or self.points[-1].count == self._points_in_each:
            if len(self.points) == self._limit:
                pairs = zip(self.points[::2], self.points[1::2], strict=True)
                self.points = [left.merged(right) for left, right in pairs]
                self._points_in_each *= 2
            self.points.append(Point())
        self.points[-1].add(x, y)
        if abs(y) < LARGEST:  # also not NaN
            self.last = y
        else:
            self.not_finite += 1
            self.first_not_finite = x if self.first_not_finite is None else self.first_not_finite

    @property
    def is_merged(self) -> bool:
        """Whether points were merged, so that each shows a range."""
        return self._points_in_each > 1

    @property
    def low(self) -> float | None:
        """The least value; None if none is finite."""
        return min((point.low for point in self.points if point.finite), default=None)

    @property
    def median(self) -> float | None:
        """The median of the points."""
        values = sorted(point.y for point in self.points if point.y is not None)
        return values[len(values) // 2] if values else None


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Return for each point the mean of the points around it, without those that are None.

    The window is centred, so that the curve does not lag; at the start, where a loss falls steeply, it is narrower.
    """
    width = int(len(values) * SMOOTHED_SHARE)
    result: list[float | None] = []
    for index in range(len(values)):
        half = min(index, width)
        # not by differences of running sums: after one huge value, these have no digits left for the others
        around = [value for value in values[index - half : index + half + 1] if value is not None]
        result.append(sum(around) / len(around) if around else None)
    return result
