"""What a stage is given: the device, the folder, and a place for its numbers. Also how calls are timed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WINDOW_SECONDS = 0.25  # a call is repeated for so long, three times; the fastest of the three counts
WINDOWS = 3


@dataclass
class Stage:
    """One stage in its own process. Every number is written at once, so that a crash keeps what was measured."""

    name: str
    device: str  # cpu or cuda
    dry: bool  # tiny sizes
    folder: Path  # for files of this stage only
    out: Path  # the JSON file of its numbers
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any) -> None:
        """Record a number, or a dictionary of numbers."""
        self.values[key] = value
        print(f"{key}: {value}", flush=True)
        self._write()

    def note(self, text: str) -> None:
        """Record a sentence for the report."""
        self.notes.append(text)
        print(text, flush=True)
        self._write()

    def attempt(self, key: str, measure: Callable[[], Any]) -> Any:
        """Record what `measure` returns, or a note that says why it failed; return the value or None."""
        try:
            value = measure()
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            self.note(f"{key}: {type(error).__name__}: {first_line[:240]}")
            value = None
        if value is not None:
            self.put(key, value)
        self.free()
        return value

    def free(self) -> None:
        """Return unused memory of the GPU, so that the next measurement begins alike."""
        if self.device == "cuda":
            import gc

            import torch

            gc.collect()
            torch.cuda.empty_cache()

    def _write(self) -> None:
        beside = self.out.with_suffix(".new")
        beside.write_text(json.dumps({"values": self.values, "notes": self.notes}))
        os.replace(beside, self.out)


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], device: str, dry: bool = False) -> float:
    """Return the time of one call, of the fastest of several windows of calls. Each window waits only at its ends."""
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    once = time.perf_counter() - start
    count = 1 if dry else max(1, min(2000, round(WINDOW_SECONDS / max(once, 1e-6))))
    return min(_window(call, device, count) for _ in range(1 if dry else WINDOWS)) / count


def _window(call: Callable[[], Any], device: str, count: int) -> float:
    if device == "cuda":
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return 1000 * (time.perf_counter() - begin)


def peak_mib(call: Callable[[], Any], device: str) -> float | None:
    """Return by how many MiB the allocated memory of the GPU grows during a call; None on a CPU."""
    if device != "cuda":
        return None
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
