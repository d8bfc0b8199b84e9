"""Decide which checkpoint is copied next, and have it copied while training continues.

Only rank 0 has a copier. Its thread only waits: a process of its own does the work. Must not know the training loop,
which collects what is to be logged.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.checkpoint_folder import CheckpointFolder
from tinytrain_dist.checkpoint.copies.copy_layout import manifest_digest, steps_to_keep
from tinytrain_dist.checkpoint.copies.remote_folder import CopyError
from tinytrain_dist.checkpoint.copies.worker_process import WorkerProcess
from tinytrain_dist.checkpoint.manifest import file_bytes
from tinytrain_dist.config.checkpoint_copies import shown_place
from tinytrain_dist.config.run_folder import COPIES_FILE, MANIFEST_FILE, checkpoint_step
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.reliability.run_state import lost_run
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.text import format_bytes

# After a failure: the first wait before the next try, and the longest; each is twice the one before.
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 10.0, 600.0
WARN_SECONDS = 900.0  # between two warnings while nothing can be copied
# Checkpoints that `copies_keep_every` keeps stay on the local disk until they are copied, but at most so many: a store
# that stays away must not let the disk fill up.
MOST_HELD = 2
STATUS_SECONDS = 5.0  # between two changes of copies.json that only show progress


@dataclass(frozen=True)
class CopyNews:
    """Something to log. kind: one of EVENTS in trackers/tags.py."""

    step: int
    kind: str
    text: str


@dataclass
class Claim:
    """That this start of a run is the one that copies to the URL."""

    request: dict[str, Any]  # of the worker: claim
    run: str = ""  # "" until the claim has succeeded
    copies: dict[str, str] = field(default_factory=dict)  # digest of each copy, by name
    worker: WorkerProcess | None = None
    problem: str = ""  # why it has not succeeded yet


class CheckpointCopier(threading.Thread):
    """Copy the checkpoints of one run, the newest first, until `end` is called."""

    def __init__(self, config: TrainingConfig, folder: CheckpointFolder, claim: Claim) -> None:
        """Prepare to copy the checkpoints in `folder`. `start` begins."""
        super().__init__(name="copies", daemon=True)
        self._config = config
        self._folder = folder
        self._claim = claim
        self._changed = threading.Condition()  # guards what is below; nothing is copied under it
        self._news: deque[CopyNews] = deque()
        self._awake = True  # there may be something to copy
        self._ending = False
        self._given_up = False
        self._current: Path | None = None
        self._progress = (0, 0)  # bytes of the current one: copied, all
        self._refused: set[tuple[str, str]] = set()  # (name, digest) of those that cannot be copied
        self._awaited: set[str] = set()  # those that copies_keep_every keeps and that are not copied yet
        self._digests: dict[tuple[str, int], str] = {}  # by name and time of the manifest
        self._problem, self._failures, self._warned_at = claim.problem, 0, -WARN_SECONDS
        self._status_at = 0.0

    # ---------------------------------------------------------------- for the thread that trains, and that of a save

    def hold(self) -> set[Path]:
        """Note that there may be a new checkpoint, and return those that must not be deleted yet.

        These are the one that is being copied, and few that wait.
        """
        with self._changed:
            self._awake = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            waiting = [path for path in self._pending() if self._is_multiple(checkpoint_step(path))]
            with self._changed:
                return {*waiting[:MOST_HELD], *([self._current] if self._current else [])}
        return {self._current} if self._current else set()

    def take_news(self) -> list[CopyNews]:
        """Return what is to be logged since the last call. Takes no time."""
        news = []
        while self._news:
            news.append(self._news.popleft())
        return news

    def end(self) -> None:
        """Let the thread end when all is copied, or at the next failure."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def give_up(self) -> None:
        """Let the thread end now. What is not copied is copied at the next start."""
        with self._changed:
            self._ending = self._given_up = True
            self._changed.notify_all()

    def progress(self) -> str:
        """Return what is being copied, and how much of it is done; "" if nothing is."""
        current, (done, total) = self._current, self._progress
        if current is None:
            return ""
        return f"copying {current.name}: {format_bytes(done)} of {format_bytes(total)}"

    # ---------------------------------------------------------------- the thread

    def run(self) -> None:
        """Copy what is to be copied, until the end."""
        wait_seconds = FIRST_RETRY_SECONDS
        self._write_status()
        while (path := self._next()) is not None:
            try:
                self._copy(path)
                wait_seconds = FIRST_RETRY_SECONDS
            except CopyError as error:
                if self._given_up or self._note_failure(path, error):
                    break
                if error.concerns or not path.exists():
                    continue
                with self._changed:
                    if self._ending or self._changed.wait_for(lambda: self._ending, wait_seconds):
                        break
                wait_seconds = min(2 * wait_seconds, LONGEST_RETRY_SECONDS)
            finally:
                self._current = None
        if self._claim.worker is not None:
            self._claim.worker.close()
        self._write_status()

    def _next(self) -> Path | None:
        """Wait for a checkpoint to copy, and hold it; None at the end, or if another process has the run."""
        while True:
            with self._changed:
                self._awake = False
            if lost_run(Path(self._config.target_dir)):
                return None
            pending = []
            with contextlib.suppress(OSError):
                pending = self._pending()
                self._note_lost(pending)
            with self._changed:
                if self._given_up:
                    return None
                if pending:
                    self._current, self._progress = pending[0], (0, file_bytes(pending[0]))
                    return pending[0]
                if not self._claim.run and not self._ending:
                    return self._folder.directory  # nothing to copy, but the claim is still to be made
                if self._ending:
                    return None
                self._changed.wait_for(lambda: self._awake or self._ending)

    def _pending(self) -> list[Path]:
        """Return the checkpoints to copy, the newest first: those that the rule for copies keeps. Errors: OSError."""
        local = {checkpoint_step(path): path for path in self._folder.committed()}
        newest = max(local, default=-1)
        copies = dict(self._claim.copies)
        copied_steps = {step for name in copies if (step := checkpoint_step(Path(name))) <= newest}
        kept = steps_to_keep({*local, *copied_steps}, self._config.copies_keep_last, self._config.copies_keep_every)
        pending = []
        for step in sorted(kept & local.keys(), reverse=True):
            path = local[step]
            digest = self._digest(path)
            if digest and copies.get(path.name) != digest and (path.name, digest) not in self._refused:
                pending.append(path)
        return pending

    def _digest(self, path: Path) -> str:
        """Return the digest of a manifest; "" if it cannot be read."""
        manifest = path / MANIFEST_FILE
        try:
            key = (path.name, manifest.stat().st_mtime_ns)
            if key not in self._digests:
                self._digests[key] = manifest_digest(manifest.read_bytes())
            return self._digests[key]
        except OSError:
            return ""

    def _is_multiple(self, step: int) -> bool:
        every = self._config.copies_keep_every
        return every is not None and step % every == 0

    def _note_lost(self, pending: list[Path]) -> None:
        """Report checkpoints that the rule keeps, but that were deleted before they could be copied."""
        names = {path.name for path in pending if self._is_multiple(checkpoint_step(path))}
        for name in sorted(self._awaited - names - self._claim.copies.keys()):
            if not (self._folder.directory / name).exists():
                text = (
                    f"WARNING: {name} was deleted before it was copied: at most {MOST_HELD} checkpoints of "
                    "copies_keep_every are kept for a store that is slow or away"
                )
                self._news.append(CopyNews(checkpoint_step(Path(name)), "copy_failed", text))
        self._awaited = names

    def _copy(self, path: Path) -> None:
        """Copy one checkpoint, or only claim the URL if `path` is the folder of them. Errors: CopyError."""
        started = time.monotonic()
        claim = self._claim
        if claim.worker is None or claim.worker.closed:
            claim.worker = WorkerProcess(opening(self._config, claim))
        if not claim.run:
            finish_claim(claim, self._is_given_up)
            self._recovered()
        if path == self._folder.directory:
            return
        newest = max(map(checkpoint_step, self._folder.committed()), default=checkpoint_step(path))
        self._write_status()
        request = {"do": "copy", "folder": str(path.absolute()), "newest_step": newest}
        result = claim.worker.request(request, self._on_reply, self._is_given_up)
        claim.copies = dict(result["copies"])
        seconds = time.monotonic() - started
        size = format_bytes(self._progress[1])
        text = f"copied {path.name} to {shown_place(str(self._config.checkpoint_copies))} ({size}, {seconds:.1f} s)"
        self._news.append(CopyNews(checkpoint_step(path), "copied", text))
        self._recovered()

    def _recovered(self) -> None:
        self._problem, self._failures, self._warned_at = "", 0, -WARN_SECONDS
        self._write_status()

    def _is_given_up(self) -> bool:
        return self._given_up or lost_run(Path(self._config.target_dir))

    def _on_reply(self, reply: dict[str, Any]) -> None:
        if reply["kind"] == "note":
            self._news.append(CopyNews(checkpoint_step(self._current or Path()), "copied", str(reply["text"])))
        elif reply["kind"] == "progress":
            self._progress = (int(reply["done"]), int(reply["total"]))
            if time.monotonic() - self._status_at > STATUS_SECONDS:
                self._write_status()

    def _note_failure(self, path: Path, error: CopyError) -> bool:
        """Record a failure, and report it now and then; return whether nothing more can be copied."""
        if not path.exists():  # deleted meanwhile, for example by `tinytrain prune`
            return False
        ends = error.concerns == "run"
        self._failures += 1
        self._problem = str(error)
        if error.concerns == "checkpoint":
            self._refused.add((path.name, self._digest(path)))
        now = time.monotonic()
        if error.concerns or now - self._warned_at >= WARN_SECONDS:
            self._warned_at = now
            name = path.name if path != self._folder.directory else "checkpoints"
            after = "no more copies are made" if ends else "it is skipped" if error.concerns else "it is tried again"
            text = f"COPY FAILED: {name} could not be copied ({error}); training continues, and {after}"
            self._news.append(CopyNews(max(0, checkpoint_step(path)), "copy_failed", text))
        self._write_status()
        return ends

    def _write_status(self) -> None:
        """Write copies.json, for `tinytrain status` and `tinytrain ls`. A full disk is no reason to end."""
        self._status_at = time.monotonic()
        if lost_run(Path(self._config.target_dir)):
            return
        status = {
            "url": shown_place(str(self._config.checkpoint_copies)),
            "run": self._claim.run or self._claim.request["run"],
            "copied": sorted(self._claim.copies),
            "copying": self._current.name if self._current and self._current != self._folder.directory else None,
            "bytes_copied": self._progress[0],
            "bytes": self._progress[1],
            "problem": self._problem,
            "failures": self._failures,
            "time": time.time(),
        }
        with contextlib.suppress(OSError):
            write_atomically(Path(self._config.target_dir) / COPIES_FILE, status)


def opening(config: TrainingConfig, claim: Claim) -> dict[str, Any]:
    """Return the opening of a worker that copies for this run."""
    return {
        "url": config.checkpoint_copies,
        "prefix": config.ckpt_save_prefix,
        "run": claim.run,
        "claim": claim.request["claim"],
        "keep_last": config.copies_keep_last,
        "keep_every": config.copies_keep_every,
    }


def finish_claim(claim: Claim, given_up: Any = lambda: False, limit_seconds: float | None = None) -> None:
    """Make the claim in its worker. Errors: CopyError; then the worker is closed."""
    assert claim.worker is not None
    result = claim.worker.request(claim.request, given_up=given_up, limit_seconds=limit_seconds)
    claim.run, claim.copies, claim.problem = str(result["run"]), dict(result["copies"]), ""


def new_claim(config: TrainingConfig, run: str | None, adopt: str | None, is_new: bool = False) -> Claim:
    """Return a claim that is still to be made. run: of the run folder; adopt, is_new: see CopyWorker.claim."""
    request = {
        "do": "claim",
        "run": run,
        "new_run": os.urandom(8).hex(),
        "target_dir": config.target_dir,
        "adopt": adopt,
        "is_new": is_new,
        "claim": os.urandom(8).hex(),
        "by": f"process {os.getpid()} on {os.uname().nodename}",
    }
    return Claim(request)
