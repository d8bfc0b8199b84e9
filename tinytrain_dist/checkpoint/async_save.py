"""Copy a rank's shards to host memory, and run a save in a thread while training continues.

On a GPU the copy runs beside the computation. Only the next update of the weights waits for it.

Must not know what a save does: `manager.py` gives the thread a function to run.
"""

from __future__ import annotations

import mmap
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tinytrain_dist.checkpoint.manifest import Manifest
from tinytrain_dist.checkpoint.state_collection import ShardsByKind
from tinytrain_dist.distributed.shard_transfer import TensorShard
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils import progress

SLOW_SAVE_SECONDS = 120.0  # a save that takes longer causes a warning


ALIGNMENT = 512  # bytes; torch aligns its GPU tensors in the same way


class CopyStream:
    """A CUDA stream for copies from the GPU to the host, and the pinned memory that they need."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        """`cuda`: torch.cuda, or its replacement in a test."""
        self._cuda = cuda
        self._device = device
        self._stream = cuda.Stream(device)

    def run(self, copy: Callable[[], None]) -> Any:
        """Enqueue `copy` after everything that the GPU has been given so far; return the event of its end."""
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._stream):
            copy()
        return self._stream.record_event()

    def hold_compute(self, event: Any) -> None:
        """Let what the GPU is given from now on wait for an event. The CPU does not wait."""
        self._cuda.current_stream(self._device).wait_event(event)

    def pin(self, memory: Tensor) -> Callable[[], None]:
        """Lock `memory` into RAM, so that the GPU can copy to it; return the function that unlocks it.

        Torch's own pinned memory would take up to twice the bytes, because its allocator rounds up to powers of two.
        Errors: CheckpointError if the driver refuses.
        """
        runtime = self._cuda.cudart()
        portable = 1  # pinned for all CUDA contexts
        result = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, portable))
        if result != 0:
            raise CheckpointError(
                f"ckpt_async: the GPU's driver cannot pin {memory.nbytes / 1e9:.2f} GB of host memory (CUDA error "
                f"{result}); set ckpt_async = false, or raise the limit on locked memory"
            )

        def unpin() -> None:
            runtime.cudaHostUnregister(memory.data_ptr())

        return unpin


class HostBuffers:
    """Copies of this rank's shards in host memory, reused by every save.

    Each kind of state has one flat buffer, and the rows of its shards are views of it.
    """

    def __init__(self, shards: ShardsByKind, stream: CopyStream | None = None, memory: Tensor | None = None) -> None:
        """`shards`: what to copy each time. The first copy allocates the memory.

        stream: for shards on a GPU; None for shards on the CPU. memory: uint8 memory to use instead, for shards of one
        kind only, as large as `buffer_bytes` says.
        """
        assert memory is None or len(shards) == 1, "memory holds one kind"
        self._memory = memory
        self._sources = [shard.rows_to_save for shards_of_kind in shards.values() for shard in shards_of_kind]
        self._stream = stream
        self._shards = shards  # after the first copy: the same shards, with rows_to_save in the buffers
        self._copied: list[Tensor] = []
        self._unfinished: Any = None  # the event of a copy that no update of the weights has waited for

    def copy(self) -> tuple[ShardsByKind, Any]:
        """Copy the shards to host memory. On a GPU, only enqueue the copy; see `before_update`.

        Returns the shards with `rows_to_save` in host memory, and an event to wait for before reading them (None
        without a stream). The next call overwrites them.
        """
        self.allocate()
        if self._stream is None:
            torch._foreach_copy_(self._copied, self._sources)
        else:
            self._unfinished = self._stream.run(
                lambda: torch._foreach_copy_(self._copied, self._sources, non_blocking=True)
            )
        return self._shards, self._unfinished

    def before_update(self) -> None:
        """Let the GPU finish the newest copy before it changes the shards. The CPU does not wait."""
        if self._stream is not None and self._unfinished is not None:
            self._stream.hold_compute(self._unfinished)
            self._unfinished = None

    def allocate(self) -> None:
        """Allocate the memory if that was not done. Errors: CheckpointError if a GPU's driver refuses to pin it."""
        if self._copied:
            return
        self._shards = {kind: self._with_buffer(shards_of_kind) for kind, shards_of_kind in self._shards.items()}
        self._copied = [shard.rows_to_save for shards_of_kind in self._shards.values() for shard in shards_of_kind]

    def _with_buffer(self, shards: list[TensorShard]) -> list[TensorShard]:
        """Return shards whose `rows_to_save` are views of one new buffer."""
        sizes = [shard.rows_to_save.nbytes for shard in shards]
        padded_sizes = [padded(size) for size in sizes]
        pinned = self._stream is not None and sum(padded_sizes) > 0  # a driver refuses to pin nothing
        if self._memory is not None:
            memory = self._memory
        elif pinned:
            memory = _whole_pages(sum(padded_sizes))
        else:
            memory = torch.empty(sum(padded_sizes), dtype=torch.uint8)
        if pinned and self._stream is not None:
            weakref.finalize(self, self._stream.pin(memory)).atexit = False  # the end of the process unlocks it too
        placed = []
        start = 0
        for shard, size, padded_size in zip(shards, sizes, padded_sizes, strict=True):
            rows = shard.rows_to_save
            placed.append(replace(shard, rows_to_save=memory[start : start + size].view(rows.dtype).view(rows.shape)))
            start += padded_size
        return placed


def buffer_bytes(shards: Iterable[TensorShard]) -> int:
    """Return the size of the buffer that holds the rows to save of shards of one kind."""
    return sum(padded(shard.rows_to_save.nbytes) for shard in shards)


def padded(nbytes: int) -> int:
    """Return the room that rows of so many bytes take in a buffer."""
    return nbytes + -nbytes % ALIGNMENT


def _whole_pages(nbytes: int) -> Tensor:
    """Return memory that shares no page with anything else, because a driver locks whole pages: uint8 [nbytes]."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8, count=nbytes)


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
        self._last_line = self._created_at  # when progress_line has returned one
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

    def progress_line(self) -> str:
        """Return a line with the bytes that this rank has written, or "" if none is due; for a caller that waits."""
        now = time.monotonic()
        manifest = self.manifest
        if not self.is_alive() or not manifest.bytes_written or now - self._last_line < progress.LINE_SECONDS:
            return ""
        self._last_line = now
        seconds = now - self._created_at
        what = f"saving step {self.step}"
        if manifest.bytes_written >= manifest.bytes_to_write:
            return f"{what}: {manifest.bytes_written / 1e6:,.0f} MB written; waiting for the disk and the other ranks"
        return progress.progress_text(what, manifest.bytes_written, manifest.bytes_to_write, seconds, "bytes")

    def run(self) -> None:
        """Perform the save, and store its error and its duration."""
        try:
            self._work(self.manifest)
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - self._created_at
