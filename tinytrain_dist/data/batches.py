"""Make batches: draw random windows for users' own loops, read ahead in threads, and cut into micro-batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tinytrain_dist.data.token_file import Tokens, num_windows, read_windows
from tinytrain_dist.data.training_windows import IGNORE_INDEX, Windows
from tinytrain_dist.data.window_sampling import window_starts

MOST_BATCHES_AHEAD, MOST_BYTES_AHEAD = 64, 256 * 1024**2
CLOSE_SECONDS = 1.0


def get_batch(
    data: Tokens,
    batch_size: int,
    context_len: int,
    device: torch.device | str,
    *,
    rng: np.random.Generator | None = None,
    seed: int | None = None,
    step: int = 0,
    slots: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return random windows of `data` and their targets: (ids, targets), both int64 [batch_size, context_len].

    The targets are the same windows one token later. Every window can be drawn, also the one that ends with the last
    token of `data`. How windows are drawn:

    * By default from fresh entropy in each call of each process, so no two ranks share a batch by accident.
    * With `rng` the draw is repeatable.
    * With `seed` it is the trainer's own draw, for `step` and the sample slots `slots` of the global batch (default:
      0 .. batch_size - 1).

    Errors: DataError if `data` has fewer than context_len + 1 tokens.
    """
    windows = num_windows(data, context_len, "get_batch: data")
    if seed is not None:
        starts = window_starts(seed, step, range(batch_size) if slots is None else slots, windows)
    else:
        starts = (rng or np.random.default_rng()).integers(0, windows, size=batch_size)
    rows = read_windows(data, starts, context_len).long()
    if torch.device(device).type == "cuda":
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def read_ahead_depth(batch_bytes: int) -> int:
    """Return how many batches of this size to read ahead: as many as bridge a stall of the file system in memory.

    With steps of half a second, 64 batches last for 32 seconds.
    """
    return max(2, min(MOST_BATCHES_AHEAD, MOST_BYTES_AHEAD // max(1, batch_bytes)))


class Prefetcher:
    """Make the batches of the next steps in threads while the current step runs.

    The threads call make_batch(step) for step, step + 1, ..., several steps at a time, so that a read that stalls does
    not delay the steps behind it. They stay at most `depth` batches ahead of `get`.
    """

    def __init__(
        self,
        make_batch: Callable[[int], Windows],
        first_step: int,
        depth: int = 2,
        *,
        last_step: int | None = None,
        threads: int = 8,
    ) -> None:
        """Start the threads.

        make_batch: must be a pure function of the step, and is called from several threads at once. Batches that
        `close` discards are made again after a resume. last_step: no batch is made for this step or later ones.
        """
        self._make_batch = make_batch
        self._depth = depth
        self._last_step = last_step
        self._next_to_make = self._next_to_get = first_step
        self._made: dict[int, Windows | BaseException] = {}  # by step
        self._error: BaseException | None = None  # that `get` has raised
        self._ended = False  # closed, or a batch has failed: no further batch is made
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name="prefetch", daemon=True) for _ in range(min(threads, depth))
        ]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._next_to_make < self._next_to_get + self._depth)
                if self._ended or self._next_to_make == self._last_step:
                    return
                step = self._next_to_make
                self._next_to_make += 1
            try:
                batch_or_error: Windows | BaseException = self._make_batch(step)
            except BaseException as error:
                batch_or_error = error  # raised by `get`, in the thread that trains
            with self._changed:
                self._made[step] = batch_or_error
                self._ended |= isinstance(batch_or_error, BaseException)
                self._changed.notify_all()

    def get(self, step: int) -> Windows:
        """Return the batch of `step`; steps must be requested in order. Errors: whatever `make_batch` raised."""
        with self._changed:
            if self._error is not None:  # the threads have ended, so every later call raises it instead of waiting
                raise self._error
            assert step == self._next_to_get, f"asked for step {step}, have {self._next_to_get}"
            self._changed.wait_for(lambda: step in self._made)
            batch_or_error = self._made.pop(step)
            if isinstance(batch_or_error, BaseException):
                self._error = batch_or_error
                raise batch_or_error
            self._next_to_get += 1
            self._changed.notify_all()
        return batch_or_error

    def close(self) -> None:
        """End the threads and discard the batches that they have made.

        A thread whose read stalls is left behind after a second. It ends with its read, or with the process.
        """
        with self._changed:
            self._ended = True
            self._made.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def split_micro_batches(windows: Windows, micro_batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Yield what the model is called with for micro_batch_size windows each, on the device.

    It is (ids, targets), both int64 [micro_batch_size, number of columns], and then the documents of the whole windows
    if they are separated. Targets that do not count are IGNORE_INDEX.
    """
    # Widened on the device: IDs of 32 bits take half as long over the bus as those of 64.
    tokens, counted, documents = (
        None if part is None else part.to(device, non_blocking=True)
        for part in (windows.tokens, windows.counted, windows.documents)
    )
    assert tokens is not None
    for start in range(0, len(windows), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        ids_and_next = tokens[rows].long()
        ids, targets = ids_and_next[:, :-1], ids_and_next[:, 1:]
        if counted is not None:
            targets = targets.masked_fill(~counted[rows], IGNORE_INDEX)
        yield (ids, targets) if documents is None else (ids, targets, documents[rows])
