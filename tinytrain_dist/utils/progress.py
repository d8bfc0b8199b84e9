"""Show how far long work is: a bar on a terminal, a line now and then elsewhere.

Must not know what the work is.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tinytrain_dist.utils.text import format_age

LINE_SECONDS = 10.0  # between two lines where there is no terminal
REFRESH_SECONDS = 0.1  # between two updates of a bar; its lock takes longer than small pieces of work

Advance = Callable[[float], None]  # called with the amount of work that was done since the last call; by any thread


def no_progress(_: float) -> None:
    """Ignore an amount of work: an Advance for work that nobody waits for."""


@contextlib.contextmanager
def progress_bar(what: str, total: float, shown: bool = True, unit: str = "", done: float = 0.0) -> Iterator[Advance]:
    """Give a function that the block calls with the amount of work that was done since the last call.

    Shown on stderr, as a bar if this is a terminal, and else as lines.

    what: what is counted, or what is done. total: the amount of all work. unit: "bytes" for amounts in bytes.
    done: the amount that was done before.
    """
    if not shown:
        yield no_progress
    elif sys.stderr.isatty():
        with _terminal_bar(what, total, unit, done) as advance:
            yield advance
    else:
        yield progress_lines(what, total, _print_to_stderr, unit, done)


def progress_lines(what: str, total: float, write: Callable[[str], None], unit: str = "", done: float = 0.0) -> Advance:
    """Return a function as `progress_bar` does, which gives a line to `write` every LINE_SECONDS."""
    started = last_line = time.monotonic()
    before = done
    lock = threading.Lock()

    def advance(amount: float) -> None:
        nonlocal done, last_line
        with lock:
            done += amount
            now = time.monotonic()
            if now - last_line < LINE_SECONDS or done >= total:
                return
            last_line = now
            write(progress_text(what, done, total, now - started, unit, before))

    return advance


def progress_text(what: str, done: float, total: float, seconds: float, unit: str = "", before: float = 0.0) -> str:
    """Return a line about work: how much is done, how fast it was, and the time that is left at the same speed.

    seconds: what the work has taken since `before` of it was done.
    """
    amounts = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB" if unit == "bytes" else f"{done:,.0f} of {total:,.0f}"
    if done <= before:
        return f"{what}: {amounts}"
    speed = (done - before) / max(seconds, 1e-9)
    rate = f", {speed / 1e6:,.1f} MB/s" if unit == "bytes" else ""
    return f"{what}: {amounts}{rate}, about {format_age((total - done) / speed)} left"


@contextlib.contextmanager
def _terminal_bar(what: str, total: float, unit: str, done: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts: ProgressColumn = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    rate: tuple[ProgressColumn, ...] = (TransferSpeedColumn(),) if unit == "bytes" else ()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amounts, *rate, TimeRemainingColumn())
    last_update = 0.0
    lock = threading.Lock()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, completed=int(done))

        def advance(amount: float) -> None:
            nonlocal done, last_update
            with lock:
                done += amount
                now = time.monotonic()
                if now - last_update < REFRESH_SECONDS:
                    return
                last_update = now
                shown = done
            progress.update(task, completed=shown)

        yield advance


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
