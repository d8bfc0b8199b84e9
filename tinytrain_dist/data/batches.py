"""Make batches: draw random windows for users' own loops, read ahead in a thread, and cut into micro-batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tinytrain_dist.data.token_file import Tokens, num_windows, read_windows
from tinytrain_dist.data.training_windows import IGNORE_INDEX, Windows
from tinytrain_dist.data.window_sampling import window_starts


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


class Prefetcher:
    """Make the batches of the next steps in a thread while the current step runs.

    The thread calls make_batch(step) for step, step + 1, ... and stays at most `depth` batches ahead of `get`.
    """

    def __init__(self, make_batch: Callable[[int], Windows], first_step: int, depth: int = 2) -> None:
        """Start the thread.

        make_batch: must be a pure function of the step. Batches that `close` discards are made again after a resume.
        """
        self._ready: queue.Queue[tuple[int, Windows | BaseException]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make_batch, first_step), name="prefetch", daemon=True)
        self._thread.start()

    def _run(self, make_batch: Callable[[int], Windows], step: int) -> None:
        while not self._stop.is_set():
            try:
                batch_or_error: Windows | BaseException = make_batch(step)
            except BaseException as error:
                batch_or_error = error  # raised by `get`, in the thread that trains
            self._put(step, batch_or_error)
            if isinstance(batch_or_error, BaseException):
                return
            step += 1

    def _put(self, step: int, batch_or_error: Windows | BaseException) -> None:
        """Put an item into the queue, waiting until there is room or until `close` is called."""
        while not self._stop.is_set():
            try:
                self._ready.put((step, batch_or_error), timeout=0.2)
                return
            except queue.Full:
                continue

    def get(self, step: int) -> Windows:
        """Return the batch of `step`; steps must be requested in order. Errors: whatever `make_batch` raised."""
        ready_step, batch_or_error = self._ready.get()
        if isinstance(batch_or_error, BaseException):
            # The thread has ended, so put the error back: every later call must raise it too instead of waiting.
            self._ready.put((ready_step, batch_or_error))
            raise batch_or_error
        assert ready_step == step, f"asked for step {step}, have {ready_step}"
        return batch_or_error

    def close(self) -> None:
        """End the thread and discard the batches that it has made."""
        self._stop.set()
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join()


def split_micro_batches(windows: Windows, micro_batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Yield what the model is called with for micro_batch_size windows each, on the device.

    It is (ids, targets), both int64 [micro_batch_size, context_len], and then the documents if they are separated.
    Targets that do not count are IGNORE_INDEX.
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
