"""Copy a rank's shards to host memory, and run a save in a thread while training continues.

Must not know what a save does: `manager.py` gives the thread a function to run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tinytrain_dist.checkpoint.manifest import Manifest
from tinytrain_dist.checkpoint.state import ShardsByKind

SLOW_SAVE_SECONDS = 120.0  # a save that takes longer causes a warning


class HostBuffers:
    """Copies of this rank's shards in host memory, reused by every save; pinned if the shards are on a GPU."""

    def __init__(self, shards: ShardsByKind) -> None:
        """`shards`: what to copy each time. The first copy allocates the memory."""
        self._sources = [shard.rows_to_save for shards_of_kind in shards.values() for shard in shards_of_kind]
        self._on_gpu = any(source.is_cuda for source in self._sources)
        self._shards = shards  # after the first copy: the same shards, with rows_to_save in the buffers
        self._copied: list[Tensor] = []

    def copy(self) -> tuple[ShardsByKind, torch.cuda.Event | None]:
        """Copy the shards to host memory.

        Returns the shards with `rows_to_save` in host memory, and an event to wait for before reading them (None if no
        shard is on a GPU). The next call overwrites them.
        """
        if not self._copied:
            self._allocate()
        torch._foreach_copy_(self._copied, self._sources, non_blocking=self._on_gpu)
        event = torch.cuda.Event() if self._on_gpu else None
        if event is not None:
            event.record()
        return self._shards, event

    def _allocate(self) -> None:
        self._copied = [torch.empty_like(source, device="cpu", pin_memory=source.is_cuda) for source in self._sources]
        buffers = iter(self._copied)
        self._shards = {
            kind: [replace(shard, rows_to_save=next(buffers)) for shard in shards_of_kind]
            for kind, shards_of_kind in self._shards.items()
        }


class SaveThread(threading.Thread):
    """A save in progress: `start` begins it, `join` waits for it, and its `error` is the same on every rank."""

    def __init__(self, step: int, work: Callable[[Manifest], None]) -> None:
        """`work(manifest)` performs the save. It lists the files that it is writing in `manifest.files_in_progress`."""
        super().__init__(name=f"save-{step}", daemon=True)
        self.step = step
        self.seconds = 0.0  # how long it took, once it has ended
        self.error: BaseException | None = None
        self.manifest = Manifest()
        self._work = work
        self._created_at = time.monotonic()
        self._warned_after_seconds = 0.0  # how long it had taken at the last warning

    def slow_save_warning(self) -> str:
        """Return a warning that says how long the save has taken and what it waits for.

        Returns "" if the save has ended or no warning is due. The first warning is due after SLOW_SAVE_SECONDS, and
        each further one when the time has doubled since the last.
        """
        seconds = time.monotonic() - self._created_at
        if not self.is_alive() or seconds < max(SLOW_SAVE_SECONDS, 2 * self._warned_after_seconds):
            return ""
        self._warned_after_seconds = seconds
        files = list(self.manifest.files_in_progress)
        waiting_for = f"{files[0]} is being written" if files else "waiting for other ranks"
        return f"the save of step {self.step} has taken {seconds:.0f} s and has not ended; {waiting_for}"

    def run(self) -> None:
        """Perform the save, and store its error and its duration."""
        try:
            self._work(self.manifest)
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - self._created_at
