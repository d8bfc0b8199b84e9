"""Say what a program waits for when a wait takes more than a few seconds. Must not know what it is."""

from __future__ import annotations

import time
from collections.abc import Callable

from tinytrain_dist.utils.lost_output import print_line

FIRST_NOTICE_SECONDS = 5.0
REPEAT_SECONDS = 60.0


class WaitNotice:
    """The messages about one wait. The loop that waits calls `check` about once a second."""

    def __init__(
        self,
        describe: Callable[[], str],
        limit_seconds: float,
        say: Callable[[str], None] = print_line,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count.

        Args:
            describe: called for each message; returns what the program waits for, as it is at that moment
            limit_seconds: after how many seconds the wait ends at the latest
            say: called with each message
            clock: seconds, monotonic
        """
        self._describe = describe
        self._limit_seconds = limit_seconds
        self._say = say
        self._clock = clock
        self._start = clock()
        self._next_notice = FIRST_NOTICE_SECONDS

    @property
    def seconds(self) -> float:
        """Return how long the wait has taken so far."""
        return self._clock() - self._start

    def check(self) -> None:
        """Print a message if one is due: after five seconds, and then once a minute."""
        seconds = self.seconds
        if seconds < self._next_notice:
            return
        self._next_notice = seconds + REPEAT_SECONDS
        left = max(0.0, self._limit_seconds - seconds)
        self._say(f"waiting for {self._describe()} (for {seconds:.0f} s so far, {left:.0f} s more at most)")
