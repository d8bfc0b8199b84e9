"""Let only one run at a time write to a run folder, and take over the lock of a process that has ended.

`lock.json` names the process that holds the lock. That process touches the file as long as it runs. A lock is stale if

- its process was on this host and has ended,
- its process belonged to an earlier attempt of the same Slurm job, or
- its process is on another host and has not touched the file for two minutes.
"""

from __future__ import annotations

import contextlib
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
from tinytrain_dist.utils.json_files import is_whole_number, read_json_dict, to_json
from tinytrain_dist.utils.processes import has_ended, process_start_time
from tinytrain_dist.utils.stale_files import owner, temporary_path
from tinytrain_dist.utils.waiting import WaitNotice

TOUCH_SECONDS = 10.0  # between two touches of a lock
STALE_SECONDS = 120.0  # without a touch
CREATE_ATTEMPTS = 3  # another process may take the lock between two attempts

LockRecord = dict[str, Any]  # host, pid, started (see process_start_time), job (of Slurm)
LOCK_KEYS = {"host", "pid", "started", "job"}


class RunLock:
    """The lock of a run folder: held by rank 0 for all ranks of a run, from `acquire` to `release`."""

    def __init__(self, path: Path, record: LockRecord, holds_file: bool) -> None:
        """Describe a lock without taking it. record: names rank 0's process. holds_file: whether this is rank 0."""
        self.path = path
        self._record = record
        self._holds_file = holds_file
        self._released = threading.Event()
        self.waited_seconds = 0.0  # until it was known whether the previous holder is alive

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
        started = time.monotonic()
        if context.is_main:
            try:
                lock._create_file()
            except CheckpointError as caught:
                error = caught
        collectives.raise_on_all_ranks(error)  # here the other ranks wait for rank 0
        lock.waited_seconds = time.monotonic() - started
        if context.is_main:
            threading.Thread(target=lock._keep_touching, name="lock", daemon=True).start()
        return lock

    def taken_over(self) -> bool:
        """Return whether another process has taken over the lock. Every rank can ask: each knows rank 0's process."""
        holder = self._read_holder()
        return holder is not None and holder != self._record

    def release(self) -> None:
        """Remove the lock, unless another process has taken it over."""
        self._released.set()
        if self._holds_file and not self.taken_over():
            self.path.unlink(missing_ok=True)

    def _create_file(self) -> None:
        """Create lock.json. Errors: CheckpointError if another process holds it."""
        own_file = self.path.with_name(f"lock-{owner()}-{secrets.token_hex(6)}")
        own_file.write_text(to_json(self._record), encoding="utf-8")
        try:
            for _ in range(CREATE_ATTEMPTS):
                try:
                    # The link appears with its whole content, or fails because there is a lock.
                    os.link(own_file, self.path)
                    return
                except FileExistsError:
                    self._remove_stale_file()
        finally:
            own_file.unlink(missing_ok=True)
        raise CheckpointError(f"{self.path}: other processes keep taking this lock; start only one run per folder")

    def _remove_stale_file(self) -> None:
        """Remove a stale lock. If several processes find it stale, only one of them removes it.

        Errors: CheckpointError if the lock is not stale.
        """
        holder = self._read_holder()
        first_touched = self._touched_at()
        holder_name = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        notice = WaitNotice(
            lambda: f"a sign that {holder_name}, which holds the lock {self.path}, is alive; else it is taken over",
            STALE_SECONDS,
        )
        while not self._is_stale(holder):
            if holder is not None and holder["host"] != self._record["host"] and self._touched_at() == first_touched:
                # The holder is on another host. If it still runs, it soon touches the lock. If not, the lock becomes
                # stale.
                time.sleep(1.0)
                notice.check()
                continue
            raise CheckpointError(
                f"{self.path.parent}: {holder_name} is already training in this folder; stop it, or set another "
                "target_dir"
            )
        aside = self.path.with_name(f"lock-stale-{owner()}-{secrets.token_hex(6)}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            self.path.rename(aside)
            aside.unlink()

    def _is_stale(self, holder: LockRecord | None) -> bool:
        if holder is not None:
            if holder == self._record:
                return True  # this process took it in a start that failed
            if holder["host"] == self._record["host"]:
                return has_ended(holder["pid"], holder["started"])
            if holder["job"] is not None and holder["job"] == self._record["job"]:
                return True
        # Compare two times of the file system's clock, because the clocks of hosts may differ.
        now_file = temporary_path(self.path)
        now_file.touch()
        age_seconds = now_file.stat().st_mtime - self.path.stat().st_mtime
        now_file.unlink(missing_ok=True)
        return age_seconds > STALE_SECONDS

    def _touched_at(self) -> float:
        with contextlib.suppress(OSError):
            return self.path.stat().st_mtime
        return 0.0

    def _read_holder(self) -> LockRecord | None:
        """Return the content of the lock file; None if it is missing or not a lock."""
        try:
            record: LockRecord = read_json_dict(self.path)
        except (OSError, ValueError):
            return None
        is_lock = record.keys() >= LOCK_KEYS and isinstance(record["host"], str) and is_whole_number(record["pid"], 1)
        return record if is_lock else None

    def _keep_touching(self) -> None:
        """Touch the lock until it is released or lost; the body of a thread."""
        while not self._released.wait(TOUCH_SECONDS) and not self.taken_over():
            try:
                os.utime(self.path)
            except OSError:
                return
