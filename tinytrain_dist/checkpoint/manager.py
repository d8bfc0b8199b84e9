"""Manage the checkpoints of one run: save in the background, choose the one to resume from, keep and delete.

Must not know the loop. Rank 0 alone creates, writes, renames and deletes; the other ranks receive what it decides.

A save costs a training step the copy into host buffers and, where there are replicas, a fingerprint of what a rank does
not copy. Gathering, comparing, hashing, writing and the commit happen in a thread, over a process group of its own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinytrain_dist.checkpoint.async_save import HostBuffers, SaveThread
from tinytrain_dist.checkpoint.checkpoint_folder import CheckpointFolder
from tinytrain_dist.checkpoint.compatibility import (
    check_same_numerics,
    check_same_run,
    checkpoints_to_try,
    describe_changes,
)
from tinytrain_dist.checkpoint.manifest import Manifest
from tinytrain_dist.checkpoint.sharded_io import read_checkpoint, write_checkpoint
from tinytrain_dist.checkpoint.state import ShardsByKind, collect_shards, optimizer_tensors
from tinytrain_dist.checkpoint.verify import find_damage
from tinytrain_dist.config.run_folder import TRAINER_STATE_FILE
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import CheckpointError, TrainingError
from tinytrain_dist.model.hf_config import to_hf_config
from tinytrain_dist.parallel.replica_check import ReplicaComparison
from tinytrain_dist.reliability.run_state import lost_run
from tinytrain_dist.utils.regular_files import read_text

POLL_SECONDS = 5.0  # time between two looks at a save that is waited for

LoadedState = tuple[dict[str, Any], list[str]]  # trainer_state.json, settings that differ as "name: saved -> present"


def print_line(text: str) -> None:
    """Print a line at once, also where the output is buffered."""
    print(text, flush=True)


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
        """Prepare to save this model and this optimizer, whose state exists already and stays in place. A collective.

        Args:
            config: the settings of the run
            context: this rank
            model: the model, in its wrappers
            optimizer: its optimizer, with its state made
            data: fingerprints of the token files
            numerics: what decides the last bit besides the run's identity
            report: called with each warning, a line of text, from the training thread or the save's. Warnings about
                checkpoints come from rank 0, the warning about a slow save from any rank.
        """
        self.config = config
        self.context = context
        self.model = model
        self.optimizer = optimizer
        self.data = data
        self.numerics = numerics
        self.report = report
        # collected once: it takes too long to be repeated in each save
        self.shards, _ = collect_shards(model, optimizer, config.max_shard_bytes, config.ckpt_writers)
        self.all_shards = list(itertools.chain.from_iterable(self.shards.values()))
        self._checkpoint_folder = CheckpointFolder(config.checkpoints_dir, config.ckpt_save_prefix, self._warn)
        self.buffers = HostBuffers(self.shards)
        self.pending: SaveThread | None = None  # the save that was started and not yet collected
        self.best_step: int | None = None  # the step with the best eval loss, as of the last save
        self.group = collectives.new_background_group()

    # ---------------------------------------------------------------- saving

    def save(self, step: int, record: dict[str, Any], last: bool = False) -> SaveThread:
        """Start to save the state after `step` steps; with ckpt_async = false it has ended on return. A collective.

        No other save may be pending. A state whose replicas differ is not saved. An existing checkpoint of this step is
        left as it is: `resume` lets no other history into the folder.

        Args:
            step: number of completed steps
            record: losses and the like, kept in trainer_state.json
            last: nothing is trained after this step, so a CPU writes from the live tensors and needs no copy
        """
        assert self.pending is None, "collect() first"
        self.best_step = record.get("best_eval_step")
        beside_training = self.config.ckpt_async and not (last and self.context.device.type == "cpu")
        comparison = ReplicaComparison(self.all_shards, beside_training, self.context)
        shards, copied = self.buffers.copy() if beside_training else (self.shards, None)
        state = self._trainer_state(step, record)

        def work(manifest: Manifest) -> None:
            if copied is not None:
                copied.synchronize()
            comparison.finish(itertools.chain.from_iterable(shards.values()), self.group)
            self._write(self.folder(step), shards, state, manifest)
            self._delete_old_checkpoints()

        save = SaveThread(step, work)
        save.start()
        self.pending = save
        if not self.config.ckpt_async:
            save.join()
        return save

    def _trainer_state(self, step: int, record: dict[str, Any]) -> dict[str, Any]:
        """Return the content of trainer_state.json."""
        return {
            "step": step,
            "tokens": step * self.config.batch_size * self.config.context_len,
            "config": self.config.resolved(),
            "data": self.data,
            "report": dict(record),
            "bits": self.numerics,
            "optimizer": optimizer_tensors(self.model, self.optimizer)[1],
        }

    def _write(self, path: Path, shards: ShardsByKind, state: dict[str, Any], manifest: Manifest) -> None:
        """Write the checkpoint, unless it exists. A collective over the save's group, like all of a save."""
        exists = False
        extra_files: dict[str, bytes] = {}
        error = None
        if self.context.is_main:
            try:
                exists = path.exists()
                extra_files = self._extra_files()
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

    def _extra_files(self) -> dict[str, bytes]:
        """Return config.json, and the tokenizer where the data has one, so that the folder is a Hugging Face model."""
        data_folder = Path(next(iter(self.config.train_files), "")).parent
        meta_file = data_folder / "meta.json"
        meta = json.loads(read_text(meta_file)) if meta_file.is_file() else {}
        hf_config = to_hf_config(self.config, meta.get("eos_id"), meta.get("bos_id"))
        files = {"config.json": (json.dumps(hf_config, indent=1) + "\n").encode()}
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (data_folder / name).is_file():
                files[name] = (data_folder / name).read_bytes()
        return files

    def _check_ownership(self) -> None:
        """Check that no other process has taken the run over: then nothing in its folder may be touched.

        Errors: TrainingError.
        """
        if lost_run(Path(self.config.target_dir)):
            raise TrainingError(
                f"{self.config.target_dir}: another process has taken this run over (lock.json says which), so this "
                "one ends without saving; nothing needs to be done"
            )

    @property
    def failure(self) -> str:
        """What went wrong in the pending save and will end the run, so that ranks can agree to end it now; else "".

        An OSError, such as a full disk, does not end the run.
        """
        error = None if self.pending is None or self.pending.is_alive() else self.pending.error
        return "" if error is None or isinstance(error, OSError) else str(error) or type(error).__name__

    def collect(self, wait: bool = False) -> SaveThread | None:
        """Return the save that has ended since the last call; with `wait` also one that is in progress.

        A save that takes long does not stop training, but is reported by each rank that is writing a file, and by
        rank 0. Without `wait`, a save whose error will end the run stays pending: ranks may see its end at different
        steps, and must agree on the step to end at (see `failure`).
        """
        save = self.pending
        if save is None:
            return None
        self._report_if_slow(save)
        while wait and save.is_alive():
            save.join(POLL_SECONDS)
            self._report_if_slow(save)
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
        """Load the checkpoint that the `resume` setting means, with every byte checked. A collective.

        With `resume = auto` that is the newest one that is valid. A damaged one is renamed to NAME.damaged and
        reported, and what was read of it is overwritten by the one before it.

        `begin` is called before each checkpoint is read. Returns its path and what `load` returns; None for a new run.
        Errors: CheckpointError if one that was asked for is missing or damaged, if all are damaged, if `load` refuses
        it, or if two histories would be mixed in one folder.
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
                self._checkpoint_folder.set_aside(path, problems)
        if candidates:
            raise CheckpointError(
                f"{self.config.checkpoints_dir}: none of {len(candidates)} checkpoint(s) is valid; restore one, or "
                "start a new run with another target_dir"
            )
        return None

    def _verify_and_load(self, path: Path) -> tuple[list[str], Future[LoadedState]]:
        """Find damage and load at the same time; return all ranks' problems and the result of `load`. A collective.

        Each of the two finds in the page cache what the other one has read. Ranks share the verification, so that
        each byte is verified once.
        """
        with ThreadPoolExecutor(1) as background:
            loading = background.submit(self.load, path)
            mine = find_damage(path, part=self.context.rank, parts=self.context.world_size)
            by_rank = self.context.all_gather_object(mine)
        problems = list(dict.fromkeys(itertools.chain.from_iterable(by_rank)))  # each once, in order
        return problems, loading

    def load(self, path: Path) -> LoadedState:
        """Fill model and optimizer from `path`; return the saved state, and the settings that differ, as sentences.

        Errors: CheckpointError if it belongs to another run, if resuming would not be bit-identical although it must
        be, or if its tensors are others.
        """
        state: dict[str, Any] = json.loads(read_text(path / TRAINER_STATE_FILE))
        check_same_run(path, state, self.config, self.data)
        check_same_numerics(path, state, self.config, self.numerics)
        read_checkpoint(path, self.model, self.optimizer)
        return state, describe_changes(state, self.config)

    # ---------------------------------------------------------------- the folder

    def folder(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self._checkpoint_folder.path(step)

    def committed(self) -> list[Path]:
        """Return the checkpoints under their final name, by step; they are complete, but may be damaged."""
        return self._checkpoint_folder.committed()

    def remove_leftovers(self) -> None:
        """Delete the half-written folders of processes that died. Only the process that holds the run may call it."""
        self._checkpoint_folder.remove_leftovers()

    def _delete_old_checkpoints(self) -> None:
        """Delete on rank 0 what the settings do not keep. A disk error costs disk space and not the save."""
        if not self.context.is_main:
            return
        try:
            self._checkpoint_folder.delete_old(self.config.keep_last, self.config.keep_every, self.best_step)
        except OSError as error:
            self._warn(f"older checkpoints could not be listed ({error}); they take disk space")
