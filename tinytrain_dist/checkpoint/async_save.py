"""Copy a rank's shards to host memory, and run a save in a thread beside training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tinytrain_dist.checkpoint.manifest import Manifest
from tinytrain_dist.checkpoint.state import ShardsByKind

SLOW_SAVE_SECONDS = 120.0  # when a save is worth a word


class HostBuffers:
    """Copies of this rank's shards in host memory, kept from save to save; pinned where they come from a GPU."""

    def __init__(self, shards: ShardsByKind) -> None:
        """`shards`: what is to be copied each time; the memory is taken at the first one."""
        self._sources = [shard.rows_to_save for parts in shards.values() for shard in parts]
        self._cuda = any(source.is_cuda for source in self._sources)
        self._pieces, self._copied = shards, list[Tensor]()

    def copy(self) -> tuple[ShardsByKind, torch.cuda.Event | None]:
        """Copy the shards to host memory; return them, and the event to wait for while a GPU copies."""
        if not self._copied:
            self._copied = [torch.empty_like(s, device="cpu", pin_memory=s.is_cuda) for s in self._sources]
            buffers = iter(self._copied)
            self._pieces = {k: [replace(p, rows_to_save=next(buffers)) for p in ps] for k, ps in self._pieces.items()}
        torch._foreach_copy_(self._copied, self._sources, non_blocking=self._cuda)
        event = torch.cuda.Event() if self._cuda else None
        if event is not None:
            event.record()
        return self._pieces, event


class SaveThread(threading.Thread):
    """A save in progress; `join` waits for it, and its `error` is the same on every rank."""

    def __init__(self, step: int, work: Callable[[Manifest], None]) -> None:
        """`work(manifest)` does it; it runs at once, in the background. The manifest says which file it is at."""
        super().__init__(name=f"save-{step}", daemon=True)
        self.step, self.seconds, self._work = step, 0.0, work
        self.manifest, self.started_at, self._said = Manifest(), time.monotonic(), 0.0
        self.error: BaseException | None = None
        self.start()

    def too_long(self) -> str:
        """Every time it has taken twice as long as was said before, a sentence: how long, and at which file."""
        seconds = time.monotonic() - self.started_at
        if not self.is_alive() or seconds < max(SLOW_SAVE_SECONDS, 2 * self._said):
            return ""
        self._said, files = seconds, list(self.manifest.under_way)
        at = f"{files[0]} is being written" if files else "waiting for other ranks"
        return f"the save of step {self.step} has taken {seconds:.0f} s and has not ended; {at}"

    def run(self) -> None:
        """Work, and remember how it went."""
        try:
            self._work(self.manifest)
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - self.started_at
