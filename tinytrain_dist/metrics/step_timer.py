"""Copy device values to the host without waiting, and measure the time of steps and forward passes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class HostCopy:
    """A copy of device values to the host, in progress. `read` waits for this copy, not for work queued later."""

    def __init__(self, values: Tensor, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start to copy `values` (a tensor of any shape) without waiting. clock: returns seconds, monotonic."""
        self._values = values.detach()
        self._clock = clock
        self.ready_at = clock()  # by the clock; values on a CPU are ready now, others when `read` has waited
        self._ready: torch.cuda.Event | None = None
        if values.is_cuda:
            # only a copy to pinned memory does not block the host
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
    """Measure the time of training steps, without the time inside `paused` (evaluations and saves)."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin the first lap now. clock: returns seconds, monotonic."""
        self._clock = clock
        self._lap_start = clock()
        self._paused_seconds = 0.0  # in this lap

    def lap(self, now: float) -> float:
        """End a lap at the time `now`, which may be in the past; return its seconds without pauses."""
        seconds = now - self._lap_start - self._paused_seconds
        self._lap_start = now
        self._paused_seconds = 0.0
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside this context from the lap."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - start


class ForwardTimer:
    """Measure the time inside the forward passes of some modules.

    Uses the host's clock on a CPU. On a GPU, uses events on its stream, which are read after the GPU has passed them.
    """

    def __init__(self, modules: list[nn.Module], cuda: bool, compiled: bool = False) -> None:
        """Measure `modules`, which must not contain each other.

        compiled: whether their calls are compiled. If so, the hooks are not, because reading a clock cannot be
        compiled.
        """
        self._cuda = cuda
        self._marks: list[Any] = []  # start, end, start, end, ...: seconds, or CUDA events
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
        """Return the total seconds of the passes between `marks`.

        Errors: RuntimeError if a GPU has not reached the last mark yet.
        """
        passes = zip(marks[0::2], marks[1::2], strict=True)
        if self._cuda:
            return float(sum(start.elapsed_time(end) / 1000 for start, end in passes))  # elapsed_time is in ms
        return float(sum(end - start for start, end in passes))
