"""Show how far a verb is: a bar on a terminal, a line now and then elsewhere, always on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_SECONDS = 10.0  # between two lines where there is no terminal


@contextlib.contextmanager
def progress_bar(what: str, total: float, shown: bool = True, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Give a function that the block calls with the amount of work that was done since the last call.

    what: what is counted, in the plural. total: the amount of all work. unit: "bytes" for amounts in bytes.
    """
    if not shown:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _terminal_bar(what, total, unit) as advance:
            yield advance
    else:
        yield _line_writer(what, total, unit)


@contextlib.contextmanager
def _terminal_bar(what: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    amount: ProgressColumn = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, advance=done)


def _line_writer(what: str, total: float, unit: str) -> Callable[[float], None]:
    started = time.monotonic()
    last_line = started
    done = 0.0

    def advance(amount: float) -> None:
        nonlocal done, last_line
        done += amount
        now = time.monotonic()
        if now - last_line >= LINE_SECONDS and done < total:
            last_line = now
            seconds_left = (now - started) / done * (total - done) if done else 0.0
            shown = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB" if unit == "bytes" else f"{done:,.0f} of {total:,.0f}"
            print(f"{shown} {what}, about {seconds_left:.0f} s left", file=sys.stderr, flush=True)

    return advance
