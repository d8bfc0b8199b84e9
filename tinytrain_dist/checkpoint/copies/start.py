"""Claim the URL of the copies when a run starts, and download a copy if the run has no checkpoint.

Rank 0 does it, and the other ranks wait without their start limit running out while there is progress. Must not know
how a run is built.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.checkpoint_folder import CheckpointFolder
from tinytrain_dist.checkpoint.copies.copier import CheckpointCopier, Claim, finish_claim, new_claim, opening
from tinytrain_dist.checkpoint.copies.remote_folder import CopyError
from tinytrain_dist.checkpoint.copies.worker_process import WorkerProcess
from tinytrain_dist.config.checkpoint_copies import shown_place
from tinytrain_dist.config.run_folder import COPIES_FILE, checkpoint_step
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.atomic_files import read_json_object, write_atomically
from tinytrain_dist.utils.lost_output import print_line
from tinytrain_dist.utils.progress import Advance, progress_lines
from tinytrain_dist.utils.text import is_url

# How long the start of a run with checkpoints waits for the store. Copying then begins later, in the background.
CLAIM_SECONDS = 10.0
EMPTY_CLAIM_SECONDS = 300.0  # and a run without, which cannot begin before it knows what is there
TURN_SECONDS = 1.0  # between two messages to the ranks that wait


@dataclass
class StartedCopies:
    """What the start of a run has found at the URL of its copies."""

    claim: Claim | None = None  # on rank 0 of a run with checkpoint_copies
    claiming: Future[None] | None = None  # of a claim that is being made
    downloaded: str = ""  # the URL of the copy that was downloaded; "" if none was


def begin_copies(
    config: TrainingConfig, context: DistributedContext, folder: CheckpointFolder, begin: Callable[[], None]
) -> StartedCopies:
    """Begin to claim the URL of the copies; download the newest valid copy if the run has no checkpoint. A collective.

    `begin` is called whenever there was progress. Errors: CheckpointError if the URL holds the copies of another run;
    for a run without checkpoints also if the URL cannot be read or written, or no copy is valid.
    """
    started = StartedCopies()
    if config.checkpoint_copies is None and not is_url(config.resume_from):
        return started
    preparation = _Preparation(config, folder, started)
    with ThreadPoolExecutor(1, "copies-start") as background:
        work = background.submit(preparation.run) if context.is_main else None
        seen = -1.0
        while True:
            if work is not None:
                wait([work], TURN_SECONDS)
            state = (work is not None and work.done(), preparation.progress)
            is_done, progress = context.broadcast_object(state)
            if progress != seen:
                begin()
            seen = progress
            if is_done:
                break
    collectives.run_on_all_ranks(lambda: work.result() if work is not None else None)
    started.downloaded = context.broadcast_object(started.downloaded)
    return started


def finish_copies_start(
    config: TrainingConfig, context: DistributedContext, folder: CheckpointFolder, started: StartedCopies
) -> CheckpointCopier | None:
    """Wait a limited time for the claim, and start the copier on rank 0 of a run with copies. A collective.

    Errors: CheckpointError if the URL holds the copies of another run. Any other problem is a warning, because a run
    with checkpoints may have been started again by a machine.
    """

    def finish() -> None:
        claim = started.claim
        if claim is None or started.claiming is None:
            return
        try:
            started.claiming.result()
        except CopyError as error:
            if error.concerns == "run":
                raise CheckpointError(str(error)) from None
            claim.problem = str(error)
            print_line(f"WARNING: {error}; the run starts, and copies are made when that works again")

    collectives.run_on_all_ranks(finish)
    if started.claim is None:
        return None
    copier = CheckpointCopier(config, folder, started.claim)
    folder.hold = copier.hold
    copier.start()
    return copier


class _Preparation:
    """What rank 0 does in the background while all ranks wait."""

    def __init__(self, config: TrainingConfig, folder: CheckpointFolder, started: StartedCopies) -> None:
        self._config = config
        self._folder = folder
        self._started = started
        self._advance: Advance | None = None
        self.progress = 0.0  # bytes that were downloaded

    def run(self) -> None:
        """Claim the URL, and download a copy. Errors: CheckpointError."""
        try:
            self._run()
        except CopyError as error:
            raise CheckpointError(str(error)) from None

    def _run(self) -> None:
        config = self._config
        local = self._folder.committed()
        if config.checkpoint_copies is not None:
            claim = self._begin_claim(bool(local))
            if local:
                return
            self._finish_empty_claim(claim)
            if config.resume_from == "auto" and claim.worker is not None and claim.run:
                self._fetch(claim.worker, str(config.checkpoint_copies), None)
        if is_url(config.resume_from) and not local:
            place, name = _split(config.resume_from)
            worker = WorkerProcess({"url": place, "prefix": config.ckpt_save_prefix})
            try:
                self._fetch(worker, place, name)
            finally:
                worker.close()

    def _begin_claim(self, has_local: bool) -> Claim:
        """Start the worker, and let it make the claim while the checkpoint is loaded."""
        config = self._config
        known = read_json_object(Path(config.target_dir) / COPIES_FILE).get("run")
        run = known if isinstance(known, str) and known else None
        adopt: str | None = None
        if not has_local and config.resume_from == "auto":
            adopt = config.target_dir
        elif not has_local and is_url(config.resume_from):
            same_place = shown_place(_split(config.resume_from)[0]) == shown_place(str(config.checkpoint_copies))
            adopt = "any" if same_place else None
        if run is None and adopt is None:
            run = os.urandom(8).hex()  # noted first: a start that is killed after its claim must know it again
            with contextlib.suppress(OSError):
                write_atomically(Path(config.target_dir) / COPIES_FILE, {"run": run})
        claim = new_claim(config, run, adopt, is_new=not has_local and config.resume_from == "never")
        claim.worker = WorkerProcess(opening(config, claim))
        limit = CLAIM_SECONDS if has_local else EMPTY_CLAIM_SECONDS
        background = ThreadPoolExecutor(1, "copies-claim")
        self._started.claiming = background.submit(finish_claim, claim, limit_seconds=limit)
        background.shutdown(wait=False)
        self._started.claim = claim
        return claim

    def _finish_empty_claim(self, claim: Claim) -> None:
        """Wait for the claim of a run without checkpoints. Errors: CheckpointError."""
        assert self._started.claiming is not None
        try:
            self._started.claiming.result()
        except CopyError as error:
            if error.concerns == "run" or (self._config.resume_from == "never" and not error.may_pass):
                raise
            if self._config.resume_from != "never":
                raise CheckpointError(
                    f"{error}. This run has no checkpoint in {self._folder.directory}, and there may be copies, so it "
                    "does not begin at step 0; set resume = never to begin without them"
                ) from None

    def _fetch(self, worker: WorkerProcess, place: str, name: str | None) -> None:
        self._folder.directory.mkdir(parents=True, exist_ok=True)
        request = {
            "do": "fetch",
            "into": str(self._folder.directory.absolute()),
            "save_prefix": self._folder.prefix,
            "name": name,
        }
        found = worker.request(request, self._on_reply)["path"]
        if found is not None:
            self._started.downloaded = f"{shown_place(place)}/{name or Path(found).name}"
            print_line(f"downloaded {self._started.downloaded} to {found}")

    def _on_reply(self, reply: dict[str, Any]) -> None:
        if reply["kind"] == "note":
            print_line(f"WARNING: {reply['text']}")
        elif reply["kind"] == "progress":
            done, total = float(reply["done"]), float(reply["total"])
            if self._advance is None or done < self.progress:
                what = f"downloading a copy to {self._folder.directory}"
                self._advance, self.progress = progress_lines(what, total, print_line, "bytes"), 0.0
            self._advance(done - self.progress)
            self.progress = done


def _split(url: str) -> tuple[str, str]:
    """Return the place and the name of a checkpoint with a URL. Errors: CheckpointError if it names none."""
    place, _, name = url.rstrip("/").rpartition("/")
    if checkpoint_step(Path(name)) < 0:
        raise CheckpointError(
            f"resume = {shown_place(url)}: is not the URL of a checkpoint; its last part must be like "
            "checkpoint-00001000"
        )
    return place, name
