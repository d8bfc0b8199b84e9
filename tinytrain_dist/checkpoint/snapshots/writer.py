"""Take snapshots: copy a rank's rows to shared memory, and do everything else in a thread while training continues.

Each rank has two slots, `a` and `b`, and writes to them in turn, so that one complete snapshot always remains. A rank
that keeps second copies for another node has two slots for each rank of it. Must not know when a snapshot is due.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from tinytrain_dist.checkpoint.async_save import CopyStream, HostBuffers, buffer_bytes
from tinytrain_dist.checkpoint.snapshots.placement import Placement, pieces_of
from tinytrain_dist.checkpoint.snapshots.slot_files import (
    Slot,
    SnapshotRecord,
    damaged_piece,
    data_bytes,
    delete_snapshot,
    with_digests,
)
from tinytrain_dist.checkpoint.state_collection import ShardsByKind
from tinytrain_dist.distributed.byte_messages import exchange_bytes
from tinytrain_dist.distributed.collectives import Group, all_gather_object
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.parallel.replica_check import ReplicaComparison

SLOTS = "ab"


class SnapshotWriter:
    """The snapshots that this rank writes, and the second copies that it keeps for other nodes."""

    def __init__(
        self, shards: ShardsByKind, placement: Placement, context: DistributedContext, group: Group | None
    ) -> None:
        """Plan, without using memory. A collective. group: for messages in the background, used by nothing else."""
        self._context = context
        self._placement = placement
        self._group = group
        kept = placement.kept(shards)
        self._shards = [shard for _, shard in kept]
        self._pieces = pieces_of(kept)
        self._stream = CopyStream(context.device) if context.device.type == "cuda" else None
        sizes = all_gather_object(buffer_bytes(self._shards), group)
        self._sizes = {source: sizes[source] for source in (placement.rank, *placement.sources())}
        self._slots: dict[tuple[int, str], Slot] = {}  # by rank and name
        self._buffers: dict[str, HostBuffers] = {}  # by name
        self._next = 0  # index of the slot that is written next
        self._spare: list[Path] = []  # folders that are needed only until the first new snapshot is complete
        self._thread: threading.Thread | None = None
        self.failure = ""  # why no further snapshot can be taken

    @property
    def slot_bytes(self) -> int:
        """The memory that one snapshot takes for this rank and the second copies it keeps; there are two."""
        return sum(data_bytes(size) for size in self._sizes.values())

    @property
    def busy(self) -> bool:
        """Whether this rank cannot take another snapshot now. Once there is a failure it never can."""
        return bool(self.failure) or (self._thread is not None and self._thread.is_alive())

    def open(self, spare: list[Path], needed: list[Path], restored: bool) -> None:
        """Reserve memory for the first slot, and for the second one too if no snapshot was loaded.

        Args:
            spare: folders whose memory can be reused
            needed: folders of the snapshot that was loaded. They stay until the next one is complete.
            restored: whether a snapshot was loaded; the same on all ranks

        Errors: OSError if there is not enough memory, CheckpointError if the driver of a GPU refuses to pin it.
        """
        self._spare = spare
        self._open_slots(SLOTS[0])
        if not restored:
            self._open_slots(SLOTS[1])
        self._remove_spare()
        self._spare = list(needed)

    def _open_second(self) -> None:
        self._open_slots(SLOTS[1])
        self._remove_spare()

    def _open_slots(self, name: str) -> None:
        shared = Path(self._placement.places[self._placement.rank].folder)
        for source, size in self._sizes.items():
            folder = shared / f"{self._context.launch_id}-{source:05d}-{name}"
            self._slots[source, name] = Slot(folder, size, self._spare)
        memory = self._slots[self._placement.rank, name].memory
        buffers = HostBuffers({"state": self._shards}, self._stream, memory)
        buffers.allocate()
        self._buffers[name] = buffers

    def _remove_spare(self) -> None:
        for folder in self._spare:
            delete_snapshot(folder)
        self._spare = []

    def before_update(self) -> None:
        """Let the GPU finish the newest copy before it changes the weights. The CPU does not wait."""
        for buffers in list(self._buffers.values()):  # the thread may add one
            buffers.before_update()

    def take(self, step: int, state: bytes, done: Callable[[str, float], None]) -> None:
        """Begin a snapshot of the state after `step` steps. A collective; this rank must not be busy.

        state: the content of trainer_state.json. done: called in the thread when the snapshot has ended on all ranks,
        with what went wrong on some rank, "" if it is complete, and the seconds that it took.
        """
        name = SLOTS[self._next]
        self._next = 1 - self._next
        slot = self._slots[self._placement.rank, name]
        problem = _problem_of(slot.invalidate)
        comparison = ReplicaComparison(self._shards, True, self._context)
        shards, event = self._buffers[name].copy()
        began = time.monotonic()

        def work() -> None:
            try:
                if event is not None:
                    event.synchronize()
                comparison.finish(shards["state"], self._group)
                problems = self._finish(step, state, name, problem)
                if not problems and SLOTS[1] not in self._buffers:
                    # until now, the snapshot that was loaded was the only complete one
                    problem_of_slots = _problem_of(self._open_second)
                    self.failure = next(filter(None, all_gather_object(problem_of_slots, self._group)), "")
                done(problems or self.failure, time.monotonic() - began)
            except BaseException as error:
                self.failure = str(error) or type(error).__name__
                done(self.failure, time.monotonic() - began)

        self._thread = threading.Thread(target=work, name=f"snapshot-{step}", daemon=True)
        self._thread.start()

    def _finish(self, step: int, state: bytes, name: str, problem: str) -> str:
        """Write the files of a snapshot, and send the second copy; return the problem of some rank. A collective."""
        rank = self._placement.rank
        slot = self._slots[rank, name]
        record = SnapshotRecord(
            step, self._context.launch_id, rank, with_digests(self._pieces, slot.memory), blake3(state).hexdigest()
        ).encode()
        problem = problem or _problem_of(lambda: slot.commit(record, state))
        problem = self._exchange_copies(name, record, state, problem) or problem
        return next(filter(None, all_gather_object(problem, self._group)), "")

    def _exchange_copies(self, name: str, record: bytes, state: bytes, problem: str) -> str:
        """Send this rank's second copy to its partner, and write those of other ranks; return what goes wrong.

        problem: why this rank has nothing to send.
        """
        rank = self._placement.rank
        partner = self._placement.partner(rank)
        sources = self._placement.sources()
        texts = [b"", b""] if problem else [record, state]
        targets = [] if partner is None else [partner]
        sizes = {source: torch.zeros(2, dtype=torch.int64) for source in sources}
        own_sizes = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        received_sizes = [(source, size.view(torch.uint8)) for source, size in sizes.items()]
        exchange_bytes([(target, own_sizes.view(torch.uint8)) for target in targets], received_sizes, self._group)
        alive = [source for source in sources if int(sizes[source].sum())]
        heads = {source: torch.empty(int(sizes[source].sum()), dtype=torch.uint8) for source in alive}
        own_head = _bytes_tensor(b"".join(texts))
        exchange_bytes([(target, own_head) for target in targets], list(heads.items()), self._group)
        problems = [_problem_of(self._slots[source, name].invalidate) for source in alive]
        data = [(source, self._slots[source, name].memory) for source in alive]
        own_data = [] if problem else [(target, self._slots[rank, name].memory) for target in targets]
        exchange_bytes(own_data, data, self._group)
        for source in alive:
            head = bytes(heads[source].numpy())
            split = int(sizes[source][0])
            problems.append(_commit_copy(self._slots[source, name], head[:split], head[split:]))
        return next(filter(None, problems), "")

    def close(self, seconds: float) -> None:
        """Wait at most so long for a snapshot in progress, and delete the files of this rank."""
        if self._thread is not None:
            self._thread.join(seconds)
        for slot in self._slots.values():
            delete_snapshot(slot.folder)
        self._remove_spare()


def _commit_copy(slot: Slot, record: bytes, state: bytes) -> str:
    """Check a second copy whose data has arrived, and commit it; return what is wrong with it."""
    if damaged := damaged_piece(SnapshotRecord.decode(record).pieces, slot.memory):
        return f"{damaged} arrived damaged"
    return _problem_of(lambda: slot.commit(record, state))


def _problem_of(action: Callable[[], Any]) -> str:
    """Return "" if the action succeeds, else what went wrong with the files."""
    try:
        action()
    except (OSError, CheckpointError) as error:
        return str(error)
    return ""


def _bytes_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
