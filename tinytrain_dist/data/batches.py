"""Make batches: random windows for own loops, reading ahead in a thread, and cutting into micro-batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tinytrain_dist.data.sampling import window_starts
from tinytrain_dist.data.token_dataset import Tokens, num_windows, read_windows


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
    """Random windows of `data` and the same windows one token later: two int64 tensors [batch_size, context_len].

    Every window can be drawn, also the one that ends with the last token. By default each call of each process draws
    from fresh entropy, so ranks never share a batch by accident. `rng` makes the draw repeatable; `seed` (with `step`,
    and `slots` of the global batch, default 0 .. batch_size - 1) makes it the trainer's own draw.
    Errors: DataError if there are fewer than context_len + 1 tokens.
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
    """Runs `make(step)` for step, step + 1, ... in one thread, at most `depth` ahead, and hands the results out."""

    def __init__(self, make: Callable[[int], Tensor], first_step: int, depth: int = 2) -> None:
        """`make` must be a pure function of the step: what is thrown away by `close` is made again after a resume."""
        self._ready: queue.Queue[tuple[int, Tensor | BaseException]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, first_step), name="prefetch", daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], Tensor], step: int) -> None:
        while not self._stop.is_set():
            try:
                item: Tensor | BaseException = make(step)
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put((step, item), timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def get(self, step: int) -> Tensor:
        """Return the batch of `step`; steps must be requested in order. Errors: whatever `make` raised."""
        ready, item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put((ready, item))  # the thread has ended: every later call gets the same error
            raise item
        assert ready == step, f"asked for step {step}, have {ready}"
        return item

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join()


def split_micro_batches(rows: Tensor, micro_batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut [n, context_len + 1] rows into (ids, targets) of micro_batch_size rows each, int64 on the device."""
    rows = rows.to(device, non_blocking=True)  # 32-bit ids over the bus, widened there
    for piece in rows.split(micro_batch_size):
        wide = piece.long()
        yield wide[:, :-1], wide[:, 1:]
