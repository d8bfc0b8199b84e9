"""Clocks for a run: device values copied to the host, seconds per step without pauses, time in forward passes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class HostCopy:
    """Device values being copied to the host; `read` waits for these values only, not for what was queued after."""

    def __init__(self, values: Tensor, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start to copy `values` (a tensor of any shape) without waiting. clock: seconds, monotonic."""
        self._values = values.detach()
        self._clock = clock
        self.ready_at = clock()  # by the clock; CPU values are ready at once, others when `read` has waited
        self._ready: torch.cuda.Event | None = None
        if values.is_cuda:
            # only a copy to pinned memory leaves the host free meanwhile
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
        """Begin the first lap now. clock: seconds, monotonic."""
        self._clock = clock
        self._lap_start = clock()
        self._paused_seconds = 0.0  # in this lap

    def lap(self, now: float) -> float:
        """Return the seconds from the last lap to the time `now`, without pauses; `now` may be in the past."""
        seconds = now - self._lap_start - self._paused_seconds
        self._lap_start = now
        self._paused_seconds = 0.0
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside, such as evaluation and saving."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - start


class ForwardTimer:
    """Time inside the forward passes of some modules.

    It is measured by the host's clock, or on a GPU by events on its stream, which are read once they have passed.
    """

    def __init__(self, modules: list[nn.Module], cuda: bool, compiled: bool = False) -> None:
        """Time `modules`, which must not contain each other.

        compiled: their calls are compiled, hooks included; the hooks are then kept out, because reading a clock must
        not be compiled.
        """
        self._cuda = cuda
        self._marks: list[Any] = []  # begin, end, begin, end, ...: seconds, or CUDA events
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
        marks = self._marks
        self._marks = []
        return marks

    def seconds(self, marks: list[Any]) -> float:
        """Return the seconds between the begin and the end of each pass.

        Errors: RuntimeError on a GPU whose work has not come to the last mark.
        """
        passes = zip(marks[0::2], marks[1::2], strict=True)
        if self._cuda:
            return float(sum(begin.elapsed_time(end) / 1000 for begin, end in passes))  # events count milliseconds
        return float(sum(end - begin for begin, end in passes))
