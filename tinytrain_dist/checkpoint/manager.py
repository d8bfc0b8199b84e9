"""Manage the checkpoints of one run: save in the background, choose the one to resume from, and delete old ones.

Rank 0 alone creates, renames and deletes folders, and sends its decisions to the other ranks. Must not know the
training loop.

A save interrupts training only to copy the state into host buffers, and if there are replicas, to compute fingerprints
of what a rank does not copy. Gathering, comparing, hashing, writing and the commit happen in a thread with its own
process group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinytrain_dist.checkpoint.async_save import CopyStream, HostBuffers, SaveThread
from tinytrain_dist.checkpoint.checkpoint_folder import CheckpointFolder
from tinytrain_dist.checkpoint.copies.copier import CheckpointCopier
from tinytrain_dist.checkpoint.discovery import read_trainer_state
from tinytrain_dist.checkpoint.huggingface_files import huggingface_files
from tinytrain_dist.checkpoint.manifest import Manifest, file_bytes
from tinytrain_dist.checkpoint.resume_rules import (
    check_same_numerics,
    check_same_run,
    check_steps_left,
    checkpoints_to_try,
    describe_changes,
    how_to_restore,
    how_to_start_anew,
)
from tinytrain_dist.checkpoint.retention import RetentionRules
from tinytrain_dist.checkpoint.sharded_io import bytes_to_read, read_checkpoint, write_checkpoint
from tinytrain_dist.checkpoint.state_collection import ShardsByKind, collect_shards, optimizer_tensors
from tinytrain_dist.checkpoint.verify import find_damage
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import CheckpointError, TrainingError
from tinytrain_dist.parallel.replica_check import ReplicaComparison
from tinytrain_dist.reliability.run_state import lost_run
from tinytrain_dist.utils.lost_output import print_line
from tinytrain_dist.utils.progress import Advance, no_progress, progress_lines

POLL_SECONDS = 5.0  # how often to check whether a slow save needs a warning, while waiting for it

LoadedState = tuple[dict[str, Any], list[str]]  # trainer_state.json, settings that differ as "name: saved -> present"


class CheckpointManager:
    """Saves, finds, loads and deletes the checkpoints of one run."""

    def __init__(
        self,
        config: TrainingConfig,
        context: DistributedContext,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: dict[str, Any],
        numerics: dict[str, Any],
        *,
        report: Callable[[str], None] = print_line,
    ) -> None:
        """Prepare to save and load the state of this model and this optimizer. A collective.

        Args:
            config: the settings of the run
            context: this rank
            model: the model, in its wrappers
            optimizer: its optimizer. The tensors of its state must exist already, and must not be replaced later.
            data: fingerprints of the token files
            numerics: what else affects computed bits, besides settings and data (see `check_same_numerics`)
            report: called with each warning, a line of text, in the training thread or in the thread of a save. Only
                rank 0 warns about checkpoints, but any rank may warn about a slow save.
        """
        self.config = config
        self.context = context
        self.model = model
        self.optimizer = optimizer
        self.data = data
        self.numerics = numerics
        self.report = report
        # collected only once, because this takes too long to be repeated in each save
        one_of_each_node = range(0, context.world_size, context.local_world_size)
        writers = config.ckpt_writers or one_of_each_node
        self.shards, _ = collect_shards(model, optimizer, config.max_shard_bytes, writers)
        self.all_shards = list(itertools.chain.from_iterable(self.shards.values()))
        self.checkpoint_folder = CheckpointFolder(config.checkpoints_dir, config.ckpt_save_prefix, self._warn)
        on_gpu = context.device.type == "cuda"
        self.buffers = HostBuffers(self.shards, CopyStream(context.device) if on_gpu else None)
        optimizer.register_step_pre_hook(lambda *_: self.buffers.before_update())
        self.pending: SaveThread | None = None  # the save that was started and not yet collected
        self.retention_rules = RetentionRules.of(config, {}, None)  # as of the last save
        self.copier: CheckpointCopier | None = None  # on rank 0 of a run with checkpoint_copies
        self.group = collectives.new_background_group()

    # ---------------------------------------------------------------- saving

    def save(self, step: int, record: dict[str, Any], last: bool = False, sound_step: int | None = None) -> SaveThread:
        """Start to save the state after `step` steps. With ckpt_async = false, wait until it is saved. A collective.

        No other save may be pending. A state whose replicas differ is not saved. An existing checkpoint of this step is
        left as it is. It belongs to the same history, because `resume` allows only one history in the folder.

        Args:
            step: number of completed steps
            record: losses and other numbers to store in trainer_state.json
            last: whether training ends with this step; if so, tensors on the CPU are saved without a copy
            sound_step: the newest checkpoint up to this step is not deleted (None: no such rule); see LossLevel
        """
        assert self.pending is None, "collect() first"
        self.retention_rules = RetentionRules.of(self.config, record, sound_step)
        beside_training = self.config.ckpt_async and not (last and self.context.device.type == "cpu")
        comparison = ReplicaComparison(self.all_shards, beside_training, self.context)
        shards, copy_event = self.buffers.copy() if beside_training else (self.shards, None)
        state = self.trainer_state(step, record)

        def work(manifest: Manifest) -> None:
            if copy_event is not None:
                copy_event.synchronize()
            comparison.finish(itertools.chain.from_iterable(shards.values()), self.group)
            self._delete_old_checkpoints()  # before, too: what the last save kept until later steps were known
            self._write(self.folder(step), shards, state, manifest)
            self._delete_old_checkpoints()

        save = SaveThread(step, work)
        save.start()
        self.pending = save
        if not self.config.ckpt_async:
            save.join()
        return save

    def trainer_state(self, step: int, record: dict[str, Any]) -> dict[str, Any]:
        """Return the content of trainer_state.json."""
        return {
            "step": step,
            "tokens": self.config.batch_sizes.before(step) * self.config.context_len,
            "config": self.config.resolved(),
            "data": self.data,
            "report": dict(record),
            "bits": self.numerics,
            "optimizer": optimizer_tensors(self.model, self.optimizer)[1],
        }

    def _write(self, path: Path, shards: ShardsByKind, state: dict[str, Any], manifest: Manifest) -> None:
        """Write the checkpoint, unless it exists already. A collective over the save's process group."""
        exists = False
        extra_files: dict[str, bytes] = {}
        error = None
        if self.context.is_main:
            try:
                exists = path.exists()
                extra_files = huggingface_files(self.config)
            except (OSError, ValueError) as caught:
                error = OSError(f"{type(caught).__name__}: {caught}")
        collectives.raise_on_all_ranks(error, self.group)
        if not self.context.broadcast_object(exists, self.group):
            write_checkpoint(
                path,
                shards,
                state,
                extra_files,
                max_shard_bytes=self.config.max_shard_bytes,
                group=self.group,
                manifest=manifest,
                permit=self._check_ownership,
            )

    def _check_ownership(self) -> None:
        """Check that this process still owns the run. Errors: TrainingError if another process has taken it over."""
        if lost_run(Path(self.config.target_dir)):
            raise TrainingError(
                f"{self.config.target_dir}: another process has taken this run over (lock.json says which), so this "
                "one ends without saving; nothing needs to be done"
            )

    @property
    def failure(self) -> str:
        """Return the error of the pending save if it must end the run, else "".

        Ranks use it to agree on the step at which they end. An OSError, such as a full disk, does not end the run.
        """
        error = None if self.pending is None or self.pending.is_alive() else self.pending.error
        if error is None or isinstance(error, OSError):
            return ""
        return str(error) or type(error).__name__

    def collect(self, wait: bool = False) -> SaveThread | None:
        """Return the pending save if it has ended, else None. With `wait`, first wait until it has ended.

        A slow save does not stop training. It is reported by rank 0, and by each rank that is writing a file. Without
        `wait`, a save whose error must end the run stays pending: ranks may notice the error at different steps, and
        must first agree on the step at which they end (see `failure`).
        """
        save = self.pending
        if save is None:
            return None
        self._report_if_slow(save)
        while wait and save.is_alive():
            save.join(POLL_SECONDS)
            self._report_if_slow(save)
            if self.context.is_main and (line := save.progress_line()):
                self.report(line)
        if not wait and (save.is_alive() or self.failure):
            return None
        save.join()
        self.pending = None
        return save

    def _report_if_slow(self, save: SaveThread) -> None:
        text = save.slow_save_warning()
        if text and (self.context.is_main or save.manifest.files_in_progress):
            self._warn(f"rank {self.context.rank} on {self.context.host}: {text}")

    def _warn(self, text: str) -> None:
        self.report(f"WARNING: {text}")

    # ---------------------------------------------------------------- resuming

    def resume(self, begin: Callable[[], None] = lambda: None) -> tuple[Path, dict[str, Any], list[str]] | None:
        """Load the checkpoint that the `resume` setting selects, and check every byte of it. A collective.

        With `resume = auto` this is the newest valid checkpoint. A damaged one is reported and renamed to NAME.damaged.
        Then the one before it is loaded, which overwrites what was read of the damaged one.
        `begin`: called before each checkpoint is read. Returns the checkpoint's path and what `load` returns; None for
        a new run. Errors: CheckpointError if the checkpoint named by `resume` is missing or damaged, if all checkpoints
        are damaged, if `load` refuses the checkpoint, or if one folder would hold two different histories.
        """
        own: list[Path] = self.context.broadcast_object(self.committed())
        candidates = checkpoints_to_try(self.config, own)
        for path in reversed(candidates):
            begin()
            problems, loading = self._verify_and_load(path)
            if not problems:
                state, changes = collectives.run_on_all_ranks(loading.result)
                return path, state, changes
            if self.config.resume_from != "auto":
                raise CheckpointError(f"resume = {path}: " + "; ".join(problems))
            if self.context.is_main:
                self.checkpoint_folder.set_aside(path, problems)
        if candidates:
            raise CheckpointError(
                f"{self.config.checkpoints_dir}: none of {len(candidates)} checkpoint(s) is valid; "
                f"{how_to_restore(self.config)}, or {how_to_start_anew(self.config)}"
            )
        return None

    def _verify_and_load(self, path: Path) -> tuple[list[str], Future[LoadedState]]:
        """Verify and load at the same time; return all ranks' problems and the future of `load`. A collective.

        Together, because each finds in the page cache what the other has read. Each rank verifies its share of bytes.
        """
        advance = _loading_progress(path, self) if self.context.is_main else no_progress
        with ThreadPoolExecutor(1) as background:
            loading = background.submit(self.load, path, advance)
            own_problems = find_damage(path, None, self.context.rank, self.context.world_size, advance)
            problems_by_rank = self.context.all_gather_object(own_problems)
        problems = list(dict.fromkeys(itertools.chain.from_iterable(problems_by_rank)))  # without duplicates, in order
        return problems, loading

    def load(self, path: Path, advance: Advance = no_progress) -> LoadedState:
        """Load `path` into model and optimizer; return the saved state, and a text for each setting that differs.

        advance: called with the numbers of bytes that were read. Errors: CheckpointError if the checkpoint belongs to
        another run, is beyond total_steps, does not fit, or would not give the same bits in a reproducible run.
        """
        state = read_trainer_state(path)
        check_steps_left(path, state, self.config)
        check_same_run(path, state, self.config, self.data)
        check_same_numerics(path, state, self.config, self.numerics)
        read_checkpoint(path, self.model, self.optimizer, advance)
        return state, describe_changes(state, self.config)

    # ---------------------------------------------------------------- the folder

    def folder(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.checkpoint_folder.path(step)

    def committed(self) -> list[Path]:
        """Return the checkpoints under their final name, in order of steps. They are complete, but may be damaged."""
        return self.checkpoint_folder.committed()

    def remove_leftovers(self) -> None:
        """Delete the incomplete folders of earlier processes. Only the process that holds the run may call it."""
        self.checkpoint_folder.remove_leftovers()

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename the checkpoints after `step`, because the run diverged; return their new paths. Only on rank 0."""
        return [] if lost_run(Path(self.config.target_dir)) else self.checkpoint_folder.set_aside_after(step)

    def _delete_old_checkpoints(self) -> None:
        """Delete, on rank 0, the checkpoints that no setting keeps. A disk error is reported; the save stays valid."""
        if not self.context.is_main or lost_run(Path(self.config.target_dir)):
            return
        try:
            self.checkpoint_folder.delete_old(self.retention_rules)
        except OSError as error:
            self._warn(f"older checkpoints could not be listed ({error}), so none was deleted; they take disk space")


def _loading_progress(path: Path, manager: CheckpointManager) -> Advance:
    """Return a function that reports how many bytes of a checkpoint this rank has verified and loaded."""
    to_verify = file_bytes(path) / manager.context.world_size
    total = to_verify + bytes_to_read(manager.model, manager.optimizer)
    return progress_lines(f"verifying and loading {path.name}", total, manager.report, "bytes")
