"""Manage the checkpoints of one run: save in the background, choose the one to resume from, keep and delete.

Must not know the loop. Rank 0 alone lists, creates, writes and deletes, and informs the others. A save costs a training
step the copy into host buffers, and where there are replicas a fingerprint of what a rank does not copy. Gathering,
comparing, hashing, writing and the commit happen in a thread over a process group of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinytrain_dist.checkpoint.async_save import HostBuffers, SaveThread
from tinytrain_dist.checkpoint.manifest import Manifest
from tinytrain_dist.checkpoint.sharded_io import read_checkpoint, write_checkpoint
from tinytrain_dist.checkpoint.state import ShardsByKind, collect_shards, optimizer_tensors
from tinytrain_dist.checkpoint.verify import find_damage
from tinytrain_dist.config.run_folder import (
    DAMAGED_SUFFIX,
    TEMPORARY_SUFFIX,
    TRAINER_STATE_FILE,
    checkpoint_name,
    checkpoint_step,
)
from tinytrain_dist.config.schema import IDENTITY_SETTINGS, TrainingConfig
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import CheckpointError, TrainingError
from tinytrain_dist.model.hf_config import to_hf_config
from tinytrain_dist.parallel.replica_check import ReplicaComparison
from tinytrain_dist.reliability.run_state import lost_run

POLL_SECONDS = 5.0  # how often one waited for is looked at


class CheckpointManager:
    """Saves, finds, loads and keeps the checkpoints of one run."""

    def __init__(
        self,
        config: TrainingConfig,
        context: DistributedContext,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: dict[str, Any],
        bits: dict[str, Any],
    ) -> None:
        """Prepare to save this model and this optimizer, whose state exists already and stays in place.

        `data`: fingerprint of the token files; `bits`: what decides the last bit besides the run's identity.
        """
        self.config, self.context, self.data, self.bits = config, context, data, bits
        self.model, self.optimizer = model, optimizer
        self.shards, _ = collect_shards(
            model, optimizer, config.max_shard_bytes, config.ckpt_writers
        )  # too slow for a save
        self.all_shards = list(itertools.chain.from_iterable(self.shards.values()))
        self.buffers = HostBuffers(self.shards)
        self.pending: SaveThread | None = None
        self.group = collectives.new_background_group()

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.config.checkpoints_dir / checkpoint_name(self.config.ckpt_save_prefix, step)

    def save(self, step: int, report: dict[str, Any], last: bool = False) -> SaveThread:
        """Start to save the state after `step`; with ckpt_async = false it is complete on return. A collective.

        There must be no other save in progress. last: nothing trains any more, so that a CPU needs no copy. `report`
        (losses and the like) is kept in trainer_state.json. A checkpoint of this step that is there already is left
        as it is: `resume` lets no other history into the folder. A state whose replicas differ is not saved.
        """
        assert self.pending is None, "collect() first"
        self.best_step = report.get("best_eval_step")
        beside = self.config.ckpt_async and not (last and self.context.device.type == "cpu")
        comparison = ReplicaComparison(self.all_shards, beside, self.context)
        shards, event = self.buffers.copy() if beside else (self.shards, None)
        state = {
            "step": step,
            "tokens": step * self.config.batch_size * self.config.context_len,
            "config": self.config.resolved(),
            "data": self.data,
            "report": dict(report),
            "bits": self.bits,
            "optimizer": optimizer_tensors(self.model, self.optimizer)[1],
        }

        def work(manifest: Manifest) -> None:
            if event is not None:
                event.synchronize()
            comparison.finish(itertools.chain.from_iterable(shards.values()), self.group)
            self._write(self.folder(step), shards, state, manifest)

        self.pending = save = SaveThread(step, work)
        if not self.config.ckpt_async:
            save.join()
        return save

    @property
    def failure(self) -> str:
        """What went wrong in the save in progress and will end the run, so that ranks can agree to end it now."""
        error = None if self.pending is None or self.pending.is_alive() else self.pending.error
        return "" if error is None or isinstance(error, OSError) else str(error) or type(error).__name__

    def collect(self, wait: bool = False) -> SaveThread | None:
        """Return the save that has ended since the last call; with `wait` also one that is in progress.

        One that takes long does not stop training, and each rank that is at a file, or rank 0, says so.
        """
        save = self.pending
        while save is not None:
            text = save.too_long()
            if text and (self.context.is_main or save.manifest.under_way):
                print(f"WARNING: rank {self.context.rank} on {self.context.host}: {text}", flush=True)
            if not (wait and save.is_alive()):
                break
            save.join(POLL_SECONDS)
        if save is None or (not wait and save.is_alive()):
            return None
        if not wait and save.error is not None and not isinstance(save.error, OSError):
            return None  # it will end the run, at the same step on all ranks: they vote for it (see `failure`)
        save.join()
        self.pending = None
        return save

    def _write(self, path: Path, shards: ShardsByKind, state: dict[str, Any], manifest: Manifest) -> None:
        exists, files, error = False, dict[str, bytes](), None
        if self.context.is_main:
            try:
                exists, files = path.exists(), self._extra_files()
            except (OSError, ValueError) as caught:
                error = OSError(f"{type(caught).__name__}: {caught}")
        collectives.raise_on_all_ranks(error, self.group)
        if not self.context.broadcast_object(exists, self.group):
            bounds = self.config.max_shard_bytes, self.group
            write_checkpoint(path, shards, state, files, *bounds, manifest, self._permit)
        if self.context.is_main:
            try:
                self._retain()
            except OSError as caught:
                print(f"warning: older checkpoints could not be looked at ({caught})", flush=True)

    def _permit(self) -> None:
        """Errors: TrainingError if the run is another process's by now: then nothing in its folder may be touched."""
        if lost_run(Path(self.config.target_dir)):
            raise TrainingError(
                f"{self.config.target_dir}: another process has taken this run over (lock.json says which), so this "
                "one ends without saving; nothing needs to be done"
            )

    def resume(self, begin: Callable[[], None] = lambda: None) -> tuple[Path, dict[str, Any], list[str]] | None:
        """Load the checkpoint that the `resume` setting means, every byte of it checked; None for a fresh start.

        Returns its path and what `load` does. A collective: rank 0 looks, all ranks check a share of the files, all are
        told. A damaged one is renamed to NAME.damaged and named, and what was read of it is overwritten by the one
        before it. `begin` is called before each is read. Errors: CheckpointError if one that was asked for is missing
        or damaged, if all are, or if `load` refuses it.
        """
        auto = self.config.resume_from == "auto"
        candidates: list[Path] = self.context.broadcast_object(self.committed())
        if self.config.resume_from == "never":
            if candidates:
                raise CheckpointError(
                    f"{self.config.checkpoints_dir}: holds {len(candidates)} checkpoint(s), but resume = never starts "
                    "a new run; set resume = auto, or another target_dir"
                )
            return None
        if not auto:
            candidates = self._from_path(Path(self.config.resume_from), candidates)
        for path in reversed(candidates):
            begin()
            with ThreadPoolExecutor(1) as beside:
                # each finds in the page cache what the other has read
                loading = beside.submit(self.load, path)
                problems = self._problems_in(path)
            if not problems:
                return path, *collectives.run_on_all_ranks(loading.result)
            if not auto:
                raise CheckpointError(f"resume = {path}: " + "; ".join(problems))
            if self.context.is_main:
                _rename_damaged(path, problems)
        if candidates:
            raise CheckpointError(
                f"{self.config.checkpoints_dir}: none of {len(candidates)} checkpoint(s) is valid; restore one, or "
                "start a new run with another target_dir"
            )
        return None

    def _from_path(self, path: Path, own: list[Path]) -> list[Path]:
        """Resolve `resume = PATH` in a folder that has checkpoints: a requeued run continues, a branch is refused."""
        names = [other.name for other in own]
        if path.resolve().parent != self.config.checkpoints_dir.resolve():
            return own[-1:] or [path]  # this run began at PATH and has come further since
        later = [name for name in names if name > path.name]
        if path.name in names and later:
            raise CheckpointError(
                f"resume = {path}: {len(later)} later checkpoint(s) lie beside it, up to {later[-1]}; two histories in "
                "one folder would be mixed; set another target_dir, or move the later ones away"
            )
        return [path]

    def _problems_in(self, path: Path) -> list[str]:
        """Return what is damaged in a checkpoint; each byte is read once, by one of the ranks. A collective."""
        found = self.context.all_gather_object(find_damage(path, part=self.context.rank, parts=self.context.world_size))
        return list(dict.fromkeys(problem for theirs in found for problem in theirs))

    def load(self, path: Path) -> tuple[dict[str, Any], list[str]]:
        """Fill model and optimizer from `path`; the saved state, and the settings that differ, as sentences.

        Errors: CheckpointError if the settings or the data that make the run what it is are not the saved ones.
        """
        state: dict[str, Any] = json.loads((path / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        saved, now = state.get("config", {}), self.config.resolved()
        differing = [key for key in now if key in saved and saved[key] != now[key]]
        allowed = self.config.allowed_changes
        refused = [
            f"{key}: {saved[key]} in the checkpoint, {now[key]} now"
            for key in differing
            if key in IDENTITY_SETTINGS and key not in allowed
        ]
        if state.get("data") != self.data and "train_data" not in allowed:
            refused.append(f"train_data: {state.get('data')} in the checkpoint, {self.data} now")
        if refused:
            raise CheckpointError(
                f"{path}: belongs to another run; start a new one (another target_dir), restore them, or name in "
                "`allow` what may change:\n  " + "\n  ".join(refused)
            )
        bits = state["bits"]
        drift = [f"{k}: {bits.get(k)} in the checkpoint, {v} now" for k, v in self.bits.items() if bits.get(k) != v]
        if drift and self.config.reproducible and not self.config.allow_drift:
            raise CheckpointError(
                f"{path}: resuming here would not be bit-identical; restore these settings or set "
                "allow_drift = true:\n  " + "\n  ".join(drift)
            )
        read_checkpoint(path, self.model, self.optimizer)
        return state, [f"{key}: {saved[key]} -> {now[key]}" for key in differing]

    def remove_leftovers(self) -> None:
        """Delete the half-written folders of processes that died; called by the one that holds the run."""
        for path in self.config.checkpoints_dir.glob(f"{self.config.ckpt_save_prefix}-*{TEMPORARY_SUFFIX}"):
            shutil.rmtree(path, ignore_errors=True)

    def committed(self) -> list[Path]:
        """Complete checkpoints by step, as far as their names tell."""
        pattern = re.compile(re.escape(self.config.ckpt_save_prefix) + r"-\d{8,}")
        folder = self.config.checkpoints_dir
        names = [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.is_dir() else []
        return sorted(names, key=checkpoint_step)

    def _retain(self) -> None:
        """Delete what is neither among the last, nor at a multiple of keep_every, nor the best by eval loss."""
        every, paths = self.config.keep_every, self.committed()
        best = min(paths, key=_eval_loss, default=None)
        for path in paths[: -self.config.keep_last]:
            if (every and checkpoint_step(path) % every == 0) or (path == best and _eval_loss(path) < math.inf):
                continue
            if checkpoint_step(path) == self.best_step:  # evaluated after a resume, so that it does not know it itself
                continue
            try:
                aside = path.with_name(path.name + TEMPORARY_SUFFIX)  # never half a checkpoint under its own name
                path.rename(aside)
                shutil.rmtree(aside)
            except OSError as error:
                print(f"warning: {path} could not be deleted ({error}); it takes disk space", flush=True)

    def _extra_files(self) -> dict[str, bytes]:
        """config.json, and the tokenizer where the data has one, so that the folder is a Hugging Face model."""
        data = Path("".join(self.config.train_files[:1])).parent
        meta = json.loads((data / "meta.json").read_text(encoding="utf-8")) if (data / "meta.json").is_file() else {}
        description = to_hf_config(self.config, meta.get("eos_id"))
        files = {"config.json": (json.dumps(description, indent=1) + "\n").encode()}
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (data / name).is_file():
                files[name] = (data / name).read_bytes()
        return files


def _eval_loss(path: Path) -> float:
    """Return the eval loss measured at the checkpoint's own step; infinite where there is none."""
    try:
        state = json.loads((path / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        report = state["report"]
        loss = float(report["eval_loss"]) if report.get("eval_step") == state["step"] else math.inf
        return loss if math.isfinite(loss) else math.inf
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def _rename_damaged(path: Path, problems: list[str]) -> None:
    """Say loudly what is wrong with a checkpoint, and rename it so that it is neither tried again nor lost."""
    taken = sum(1 for other in path.parent.iterdir() if other.name.startswith(path.name + DAMAGED_SUFFIX))
    aside = path.with_name(path.name + DAMAGED_SUFFIX + (f"-{taken + 1}" if taken else ""))
    print(f"DAMAGED CHECKPOINT, set aside as {aside.name}: " + "; ".join(problems), flush=True)
    try:
        path.rename(aside)
    except OSError as error:
        print(f"warning: {path} could not be renamed ({error.strerror}); it is passed over", flush=True)
