"""Read from files in several threads at once, so that a slow file system answers many requests together.

Must not know what is read. The threads are daemons: a read that never returns does not keep the process alive.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tinytrain_dist.data.open_files import OpenFile, share_of_files

READERS = 32  # threads; each waits for one read at a time, so more of them cost little
Item = TypeVar("Item")
Result = TypeVar("Result")


def read_at(file: OpenFile, values: npt.NDArray[Any], position: int) -> int:
    """Fill a contiguous array from a position of an open file; return the number of bytes read, fewer at its end.

    The reference to the file keeps it open while the read waits, even if others open many files meanwhile.
    """
    values_as_bytes, done = values.view(np.uint8), 0
    while done < len(values_as_bytes):
        count = os.preadv(file.descriptor, [values_as_bytes[done:]], position + done)  # type: ignore[list-item]
        if not count:
            break
        done += count
    return done


class ReaderPool:
    """Threads that call functions which wait for files."""

    def __init__(self, threads: int = READERS) -> None:
        """Make a pool of at most `threads` threads, which start when they are needed.

        There are fewer if this process may open few files, because each thread holds a file open.
        """
        self.threads = threads
        self._forget_threads()
        os.register_at_fork(after_in_child=self._forget_threads)

    def _forget_threads(self) -> None:
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._started = 0
        self._unfinished = 0

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Return function(item) of each item, in order. Waits for all; then raises the error of the first that failed.

        `function` must not call `map` of the same pool.
        """
        items = list(items)
        results: list[Any] = [None] * len(items)
        errors: dict[int, BaseException] = {}
        finished = threading.Semaphore(0)

        def call(index: int, item: Item) -> None:
            try:
                results[index] = function(item)
            except BaseException as error:
                errors[index] = error
            finished.release()

        for index, item in enumerate(items):
            self._start(lambda index=index, item=item: call(index, item))  # type: ignore[misc]
        for _ in items:
            finished.acquire()
        if errors:
            raise errors[min(errors)]
        return results

    def _start(self, task: Callable[[], None]) -> None:
        with self._lock:
            self._unfinished += 1
            if self._started < min(share_of_files(8, self.threads), self._unfinished):
                self._started += 1
                threading.Thread(target=self._run, args=(self._waiting,), name="reader", daemon=True).start()
        self._waiting.put(task)

    def _run(self, waiting: queue.SimpleQueue[Callable[[], None]]) -> None:
        while True:
            waiting.get()()
            with self._lock:
                self._unfinished -= 1


READER_POOL = ReaderPool()  # of this process


def in_chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Return the items in successive parts of `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def as_array(dtype: np.dtype[Any], count: int, file: OpenFile, position: int) -> npt.NDArray[Any]:
    """Read `count` values of a type from a position of an open file; fewer at its end."""
    values = np.empty(count, dtype)
    return values[: read_at(file, values, position) // dtype.itemsize]
