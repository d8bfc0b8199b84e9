"""Clocks for a run: device values copied to the host, seconds per step without pauses, time in forward passes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class HostCopy:
    """Device values on their way to the host; `read` waits for these values only, not for what was queued after."""

    def __init__(self, values: Tensor, clock: Callable[[], float] = time.perf_counter) -> None:
        """`values`: any tensor; the copy starts now and does not block."""
        self._values, self._clock = values.detach(), clock
        self.ready_at = clock()  # on the CPU they are there already
        self._ready: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values.detach(), non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> list[float]:
        """Wait for the copy, and return the values as numbers."""
        if self._ready is not None:
            self._ready.synchronize()
            self.ready_at = self._clock()
        numbers: list[float] = self._values.tolist()
        return numbers


class StepTimer:
    """Time spent in steps, without what happened inside `paused`: evaluation and saving are not training."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock`: seconds, monotonic."""
        self._clock = clock
        self._start, self._off = clock(), 0.0

    def lap(self, now: float) -> float:
        """Return the seconds from the last lap to the time `now`, without pauses."""
        seconds, self._start, self._off = now - self._start - self._off, now, 0.0
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside, such as evaluation and saving."""
        start = self._clock()
        try:
            yield
        finally:
            self._off += self._clock() - start


class ForwardTimer:
    """Time inside some modules' forward, by the host's clock, or on a GPU by events on its stream, read when past."""

    def __init__(self, modules: list[nn.Module], cuda: bool, compiled: bool = False) -> None:
        """`modules`: must not contain each other; compiled: their calls are, hooks included, which a clock must not."""
        self._cuda = cuda
        self._marks: list[Any] = []
        mark = torch.compiler.disable(self._mark) if compiled else self._mark
        for module in modules:
            module.register_forward_pre_hook(mark)
            module.register_forward_hook(mark)

    def _mark(self, *_: Any) -> None:
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def take(self) -> list[Any]:
        """Return the marks since the last call, for `seconds`."""
        marks, self._marks = self._marks, []
        return marks

    def seconds(self, marks: list[Any]) -> float:
        """Seconds between each odd mark and the next. On a GPU the work must be done, or this is an error."""
        pairs = zip(marks[0::2], marks[1::2], strict=True)
        return float(sum(a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in pairs))
