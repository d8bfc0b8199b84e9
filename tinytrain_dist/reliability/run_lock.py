"""Let one process at a time write to a run folder, and take over the lock of a process that is gone.

`lock.json` names the process, and that process touches the file as long as it lives. A lock is stale if

- its process is gone, and was on this host,
- it belongs to an earlier attempt of the same Slurm job, or
- it is of another host and was not touched for two minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from tinytrain_dist.config.run_folder import LOCK_FILE
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.regular_files import read_text

TOUCH_SECONDS = 10.0  # between two touches of a lock
STALE_SECONDS = 120.0  # without a touch
CREATE_ATTEMPTS = 3  # other processes may take the lock between two of them

LockRecord = dict[str, Any]  # host, pid, started (see process_start_time), job (of Slurm)
LOCK_KEYS = {"host", "pid", "started", "job"}


class RunLock:
    """The lock of a run folder: held by rank 0 for all ranks of a run, from `acquire` to `release`."""

    def __init__(self, path: Path, record: LockRecord, holds_file: bool) -> None:
        """Describe a lock; `acquire` takes it. record: names rank 0's process. holds_file: whether this is rank 0."""
        self.path = path
        self._record = record
        self._holds_file = holds_file
        self._released = threading.Event()

    @classmethod
    def acquire(cls, folder: Path, context: DistributedContext) -> RunLock:
        """Take the lock of a run folder. A collective.

        Errors: CheckpointError on all ranks, naming host and process of the holder.
        """
        own_record: LockRecord = {
            "host": context.host,
            "pid": os.getpid(),
            "started": process_start_time(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        lock = cls(folder / LOCK_FILE, context.broadcast_object(own_record), holds_file=context.is_main)
        error = None
        if context.is_main:
            try:
                lock._create_file()
            except CheckpointError as caught:
                error = caught
        collectives.raise_on_all_ranks(error)
        if context.is_main:
            threading.Thread(target=lock._keep_touching, name="lock", daemon=True).start()
        return lock

    def taken_over(self) -> bool:
        """Return whether another process holds the folder by now; the same on all ranks of the run that lost it."""
        holder = self._read_holder()
        return holder is not None and holder != self._record

    def release(self) -> None:
        """Remove the lock, unless another process has taken it over."""
        self._released.set()
        if self._holds_file and not self.taken_over():
            self.path.unlink(missing_ok=True)

    def _create_file(self) -> None:
        """Create lock.json. Errors: CheckpointError if another process holds it."""
        private = self.path.with_name(f"lock-{secrets.token_hex(6)}")
        private.write_text(json.dumps(self._record), encoding="utf-8")
        try:
            for _ in range(CREATE_ATTEMPTS):
                try:
                    # A link appears with its whole content, or fails because there is a lock.
                    os.link(private, self.path)
                    return
                except FileExistsError:
                    self._remove_stale_file()
        finally:
            private.unlink(missing_ok=True)
        raise CheckpointError(f"{self.path}: other processes keep taking this lock; start only one run per folder")

    def _remove_stale_file(self) -> None:
        """Remove the lock of a process that is gone. Of several processes that find it stale, one removes it.

        Errors: CheckpointError if its process lives.
        """
        holder = self._read_holder()
        first_touched = self._touched_at()
        while not self._is_stale(holder):
            if holder is not None and holder["host"] != self._record["host"] and self._touched_at() == first_touched:
                # The holder is on another host. If it lives, it touches the lock soon; if its node was lost, the lock
                # becomes stale.
                time.sleep(1.0)
                continue
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise CheckpointError(
                f"{self.path.parent}: {who} trains into this folder; stop it, or set another target_dir"
            )
        aside = self.path.with_name(f"lock-stale-{secrets.token_hex(6)}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            self.path.rename(aside)
            aside.unlink()

    def _is_stale(self, holder: LockRecord | None) -> bool:
        if holder is not None:
            if holder == self._record:
                return True  # of this very process, after a start that failed
            if holder["host"] == self._record["host"]:
                return bool(process_start_time(int(holder["pid"])) != holder["started"])
            if holder["job"] is not None and holder["job"] == self._record["job"]:
                return True
        # Compare two times of the file system's clock, because the clocks of hosts may differ.
        now_file = self.path.with_name(self.path.name + ".now")
        now_file.touch()
        age_seconds = now_file.stat().st_mtime - self.path.stat().st_mtime
        now_file.unlink(missing_ok=True)
        return age_seconds > STALE_SECONDS

    def _touched_at(self) -> float:
        with contextlib.suppress(OSError):
            return self.path.stat().st_mtime
        return 0.0

    def _read_holder(self) -> LockRecord | None:
        """Return what the lock file says; None if there is none, or it is not a lock."""
        try:
            record: LockRecord = json.loads(read_text(self.path))
            return record if record.keys() >= LOCK_KEYS else None
        except (OSError, ValueError, AttributeError):
            return None

    def _keep_touching(self) -> None:
        """Touch the lock until it is released or lost; the body of a thread."""
        while not self._released.wait(TOUCH_SECONDS) and not self.taken_over():
            try:
                os.utime(self.path)
            except OSError:
                return


def process_start_time(pid: int) -> str | None:
    """Return when a process of this host began, as its kernel counts; None if there is no such process.

    It tells a process from a later one with the same ID. Where there is no /proc, every process "started" the same:
    "running".
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
        return "running"
    except (ProcessLookupError, PermissionError):
        return None
