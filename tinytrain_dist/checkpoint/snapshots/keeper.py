"""Take the snapshots of a run, and restore the state from them when the ranks were restarted.

The agent of each node makes a folder in shared memory before it starts ranks, and deletes it when it ends. So snapshots
serve the restarts of one agent, and nothing else. Must not know when a snapshot is due.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.manager import CheckpointManager, LoadedState
from tinytrain_dist.checkpoint.resume_rules import (
    check_same_numerics,
    check_same_run,
    check_steps_left,
    describe_changes,
)
from tinytrain_dist.checkpoint.sharded_io import exact_optimizer_values
from tinytrain_dist.checkpoint.snapshots.launches import LaunchRecord, belongs_to_run, read_newest_launch
from tinytrain_dist.checkpoint.snapshots.placement import Place, Placement
from tinytrain_dist.checkpoint.snapshots.restore import SnapshotReader
from tinytrain_dist.checkpoint.snapshots.slot_files import Key, read_records
from tinytrain_dist.checkpoint.snapshots.writer import SnapshotWriter
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.reliability.host_memory import free_host_bytes
from tinytrain_dist.utils.json_files import to_json
from tinytrain_dist.utils.stale_files import disk_bytes
from tinytrain_dist.utils.text import format_bytes

FOLDER_VARIABLE = "TINYTRAIN_SNAPSHOTS"
END_SECONDS = 60.0  # to wait for a snapshot in progress at the end of a run


@dataclass(frozen=True)
class SnapshotResult:
    """How a snapshot ended. problem: "" if it is complete."""

    step: int
    problem: str
    seconds: float


class SnapshotKeeper:
    """The snapshots of one run on this rank. Its methods are collectives, except for `busy` and `take_result`."""

    def __init__(self, checkpoints: CheckpointManager, placement: Placement) -> None:
        """Prepare; see `build_keeper`. A collective."""
        self._checkpoints = checkpoints
        self._config = checkpoints.config
        self._context = checkpoints.context
        self._placement = placement
        self._group = collectives.new_background_group()
        self._writer = SnapshotWriter(checkpoints.shards, placement, self._context, self._group)
        self._loaded: Key | None = None
        self._record: LaunchRecord | None = None  # on rank 0
        self._result: SnapshotResult | None = None
        self._closed = False
        self.bytes_per_node = 0  # the largest memory that snapshots take on a node; known after `begin`

    @property
    def _shared(self) -> Path:
        """The folder in the shared memory of this node."""
        return Path(self._placement.places[self._placement.rank].folder)

    # ---------------------------------------------------------------- restoring

    def restore(self, newer_than: int) -> LoadedState | None:
        """Load the newest snapshot that is complete and belongs to this run, if it is newer than a step.

        Returns what `CheckpointManager.load` returns; None if there is none. Errors: CheckpointError if it is beyond
        total_steps.
        """
        newest = self._context.broadcast_object(read_newest_launch(Path(self._config.target_dir)))
        reader = SnapshotReader(self._checkpoints.shards, self._placement, self._group)
        for key in reader.find(lambda key: key[0] > newer_than and belongs_to_run(key, newest), self._warn):
            state = reader.read_state()
            place = Path(f"snapshot of step {key[0]}")
            check_steps_left(place, state, self._config)
            try:  # the same on all ranks
                check_same_run(place, state, self._config, self._checkpoints.data)
                check_same_numerics(place, state, self._config, self._checkpoints.numerics)
            except CheckpointError as error:
                if self._context.is_main:
                    self._warn(f"{error}\nThis snapshot is not used")
                continue
            reader.load()
            self._loaded = key
            return state, describe_changes(state, self._config)
        return None

    def _warn(self, text: str) -> None:
        self._checkpoints.report(f"WARNING: {text}")

    # ---------------------------------------------------------------- taking

    def begin(self) -> str:
        """Delete what is stale, and reserve the memory; return why no snapshots will be taken, "" if they will.

        Errors: CheckpointError if `snapshot_every` is set and there is not enough memory, unless ranks were restarted.
        """
        folders = sorted(self._shared.iterdir())
        loaded = {folder for folder, record in read_records(self._shared) if record.key == self._loaded}
        restarted = self._context.any_rank(bool(folders))
        mine = folders[self._placement.local_index :: len(self._placement.neighbours)]
        spare = [folder for folder in mine if folder not in loaded]
        needed = [folder for folder in mine if folder in loaded]
        problem = self._missing_memory() or self._open(spare, needed)
        if problem:
            self._delete()
            if self._config.snapshot_every is not None and not restarted:
                raise CheckpointError(problem)
            return problem
        self._checkpoints.optimizer.register_step_pre_hook(lambda *_: self._writer.before_update())
        nodes = self._nodes()
        self.bytes_per_node = max(node["bytes"] for node in nodes)
        run, launch_id = Path(self._config.target_dir), self._context.launch_id

        def write() -> LaunchRecord | None:
            return LaunchRecord(run, launch_id, self._loaded, nodes) if self._context.is_main else None

        self._record = collectives.run_on_all_ranks(write)
        return ""

    def _open(self, spare: list[Path], needed: list[Path]) -> str:
        """Reserve the memory of this rank; return the problem of some rank, or ""."""
        problem = ""
        try:
            self._writer.open(spare, needed, self._loaded is not None)
        except (OSError, CheckpointError) as error:
            problem = (
                f"snapshot_every: {self._shared} on {self._context.host} cannot hold the snapshots ({error}); make it "
                "larger, or set snapshot_every = 0"
            )
        return next(filter(None, self._context.all_gather_object(problem)), "")

    def _nodes(self) -> list[dict[str, Any]]:
        """Return for each node what snapshots take there. A collective."""
        bytes_by_rank = self._context.all_gather_object(2 * self._writer.slot_bytes)
        nodes = []
        for ranks in self._placement.nodes:
            place = self._placement.places[ranks[0]]
            total = sum(bytes_by_rank[rank] for rank in ranks)
            nodes.append({"host": place.host, "folder": place.folder, "bytes": total})
        return nodes

    def _missing_memory(self) -> str:
        """Return "" if the memory of every node suffices, else a sentence about the first where it does not."""
        free: tuple[int, int] = 0, 0
        with contextlib.suppress(OSError):
            held = disk_bytes(self._shared)
            free = shutil.disk_usage(self._shared).free + held, free_host_bytes() + held
        free_by_rank = self._context.all_gather_object(free)
        needed_by_host: dict[str, int] = {}
        for node, ranks in zip(self._nodes(), self._placement.nodes, strict=True):
            shared, memory = free_by_rank[ranks[0]]
            host = str(node["host"])
            needed_by_host[host] = needed_by_host.get(host, 0) + node["bytes"]  # several nodes may be on one host
            needed = needed_by_host[host]
            if needed <= min(shared, memory):
                continue
            where = f"{Path(node['folder']).parent} on {host} has" if shared < needed else f"{host} has in all"
            return (
                f"snapshot_every: snapshots need {format_bytes(needed)} of shared memory on {host} (two of "
                f"{format_bytes(needed / 2)}), but {where} {format_bytes(min(shared, memory))} free; make it larger, "
                "use more nodes, or set snapshot_every = 0"
            )
        return ""

    @property
    def busy(self) -> bool:
        """Whether this rank cannot take a snapshot now."""
        return self._writer.busy

    def take(self, step: int, record: dict[str, Any]) -> None:
        """Begin a snapshot of the state after `step` steps; no rank may be busy. record: as in a checkpoint."""
        began = time.perf_counter()
        state = to_json(exact_optimizer_values(self._checkpoints.trainer_state(step, record))).encode()

        def done(problem: str, seconds: float) -> None:
            self._result = SnapshotResult(step, problem, seconds)
            if self._record is not None and not problem:
                values = {"step": step, "time": time.time(), "seconds": seconds, "stall_seconds": stall}
                with contextlib.suppress(OSError):  # only `tinytrain status` needs it
                    self._record.add(values)

        stall = 0.0
        self._writer.take(step, state, done)
        stall = time.perf_counter() - began

    def take_result(self) -> SnapshotResult | None:
        """Return how the last snapshot ended, if it has and this was not asked before."""
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Delete all snapshots, at the end of a run."""
        if not self._closed:
            self._closed = True
            self._writer.close(END_SECONDS)
            if self._record is not None:
                with contextlib.suppress(OSError):
                    self._record.remove()

    def _delete(self) -> None:
        """Delete everything in the shared memory of this node that agents and ranks of this run have put there."""
        self._context.barrier()
        if self._placement.local_index == 0:
            for folder in self._shared.iterdir():
                shutil.rmtree(folder, ignore_errors=True)


def build_keeper(
    config: TrainingConfig, context: DistributedContext, checkpoints: CheckpointManager
) -> tuple[SnapshotKeeper | None, str]:
    """Return the keeper of a run's snapshots, and a sentence that says why there is none. A collective.

    Snapshots need an agent that restarts ranks: it sets TINYTRAIN_SNAPSHOTS.
    """
    folder = os.environ.get(FOLDER_VARIABLE, "")
    usable = bool(folder) and os.access(folder, os.W_OK)
    places = context.all_gather_object(Place(context.host, folder if usable else "", context.shard))
    if config.snapshot_every == 0:
        return None, ""
    without = sorted({place.host for place in places if not place.folder})
    if without:
        note = (
            f"snapshot_every: {config.snapshot_every} has no effect, because ranks on {', '.join(without)} are not "
            "restarted; start with --max-restarts N, or leave it out"
        )
        return None, note if config.snapshot_every else ""
    return SnapshotKeeper(checkpoints, Placement(places, context.rank)), ""
