"""Find the rank that the others wait for, by the time of its own work.

A step takes equally long on all ranks, because all wait for the slowest one. Ranks differ only in their own work: what
they do before they wait for each other, which is to wait for data and to run the forward pass. Must not know how these
times are measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# A rank is slow if its own work takes more than this many times the median, and this much longer per step.
SLOW_RANK_RATIO = 1.2
# measured (2-core x86 VM, 2026-11-27): in steps of 10 ms on two equal ranks, one often takes 2 ms longer for a while
SLOW_RANK_SECONDS = 0.01


@dataclass(frozen=True)
class SlowestRank:
    """The rank whose own work took longest in one interval."""

    rank: int
    ratio: float  # of its work to the median; 1.0 where the median is zero
    warning: str  # "" unless the rank has just been found to be slow


class SlowRankDetector:
    """Warn about a rank that is slow in two intervals in a row.

    Warns about the same rank again only after an interval without a slow rank.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        """Begin without a slow rank. hosts: the host of each rank, for the warning."""
        self._hosts = hosts
        self._suspect: int | None = None  # the rank that was slow in the last interval
        self._warned_of: int | None = None  # the rank of the last warning, until no rank is slow

    def update(self, wait_seconds: Sequence[float], work_seconds: Sequence[float]) -> SlowestRank:
        """Compare the ranks over one interval.

        wait_seconds, work_seconds: by rank, per step; the work includes the wait for data.
        """
        rank = max(range(len(work_seconds)), key=work_seconds.__getitem__)
        median = statistics.median_low(work_seconds)  # of two ranks the faster one: their mean would hide the slow one
        ratio = work_seconds[rank] / median if median > 0 else 1.0
        lost_seconds = work_seconds[rank] - median
        suspect = rank if ratio > SLOW_RANK_RATIO and lost_seconds >= SLOW_RANK_SECONDS else None
        warning = ""
        if suspect is None:
            self._warned_of = None
        elif suspect == self._suspect and suspect != self._warned_of:
            warning = (
                f"rank {rank} ({self._hosts[rank]}) is slow: its own work takes {work_seconds[rank]:.3f} s per step, "
                f"{ratio:.1f} times the median of {median:.3f} s; it waits for data for {wait_seconds[rank]:.3f} s and "
                "spends the rest in the forward pass. All other ranks wait for this rank"
            )
            self._warned_of = suspect
        self._suspect = suspect
        return SlowestRank(rank, ratio, warning)
