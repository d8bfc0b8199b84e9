"""Let only one run at a time write to a folder, and take over the lock of a process that has ended.

A run locks its run folder with `lock.json`, and the checkpoints of its prefix with `PREFIX.lock.json` beside them:
with `ckpt_dir`, runs with different run folders may save to the same place. A lock names the process that holds it.
That process touches the file as long as it runs. A lock is stale if

- its process was on this host and has ended,
- its process belonged to an earlier attempt of the same run in the same Slurm job,
- its process belonged to an earlier world of the same elastic run, or
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

from tinytrain_dist.config.run_folder import LOCK_FILE, checkpoint_lock_file
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.reliability.world import own_world
from tinytrain_dist.utils.json_files import is_whole_number, read_json_dict, to_json
from tinytrain_dist.utils.processes import has_ended, process_start_time
from tinytrain_dist.utils.stale_files import owner, temporary_path
from tinytrain_dist.utils.waiting import WaitNotice

TOUCH_SECONDS = 10.0  # between two touches of a lock
STALE_SECONDS = 120.0  # without a touch
CREATE_ATTEMPTS = 3  # another process may take the lock between two attempts

LockRecord = dict[str, Any]  # host, pid, started (see process_start_time), job (of Slurm), run (the run folder)
LOCK_KEYS = {"host", "pid", "started", "job"}  # earlier versions did not write the run


class RunLock:
    """The locks of a run: held by rank 0 for all its ranks, from `acquire` to `release`."""

    def __init__(self, files: list[LockFile], holds_files: bool) -> None:
        """Describe locks without taking them. holds_files: whether this is rank 0."""
        self._files = files
        self._holds_files = holds_files
        self.waited_seconds = 0.0  # until it was known whether the previous holders are alive

    @classmethod
    def acquire(cls, folder: Path, context: DistributedContext, checkpoints: tuple[Path, str] | None = None) -> RunLock:
        """Take the lock of a run folder, and that of checkpoints. A collective.

        checkpoints: their folder, which must exist, and the prefix of their names; None: only the run folder.
        Errors: CheckpointError on all ranks, naming host, process and run folder of the holder; then no lock is taken.
        """
        own_record: LockRecord = {
            "host": context.host,
            "pid": os.getpid(),
            "started": process_start_time(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "run": str(folder.resolve()),
        }
        if world := own_world():
            own_record |= {"session": world.session, "round": world.round}
        record = context.broadcast_object(own_record)
        paths = [folder / LOCK_FILE, *([checkpoint_lock_file(*checkpoints)] if checkpoints else [])]
        lock = cls([LockFile(path, record) for path in paths], holds_files=context.is_main)
        error = None
        started = time.monotonic()
        if context.is_main:
            try:
                lock._take()
            except CheckpointError as caught:
                error = caught
        collectives.raise_on_all_ranks(error)  # here the other ranks wait for rank 0
        lock.waited_seconds = time.monotonic() - started
        return lock

    def taken_over(self) -> bool:
        """Return whether another process has taken over a lock. Every rank can ask: each knows rank 0's process."""
        return any(file.taken_over() for file in self._files)

    def release(self) -> None:
        """Remove the locks, except for those that another process has taken over."""
        if self._holds_files:
            for file in self._files:
                file.release()

    def _take(self) -> None:
        """Take all locks, or none. Errors: CheckpointError."""
        try:
            for file in self._files:
                file.take()
        except CheckpointError:
            self.release()
            raise


class LockFile:
    """The file of one lock, which this process may hold."""

    def __init__(self, path: Path, record: LockRecord) -> None:
        """Describe a lock without taking it. record: names the process that is to hold it."""
        self.path = path
        self._record = record
        self._released = threading.Event()

    def take(self) -> None:
        """Create the file, and touch it from now on. Errors: CheckpointError if another process holds the lock."""
        try:
            self._create()
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written ({error.strerror}); free disk space, or set another target_dir or "
                "ckpt_dir"
            ) from None
        threading.Thread(target=self._keep_touching, name="lock", daemon=True).start()

    def taken_over(self) -> bool:
        """Return whether another process has taken over the lock."""
        holder = self._read_holder()
        return holder is not None and holder != self._record

    def release(self) -> None:
        """Remove the file if it is this process's."""
        self._released.set()
        if self._read_holder() == self._record:
            self.path.unlink(missing_ok=True)

    def _create(self) -> None:
        """Create the file. Errors: CheckpointError if another process holds the lock; OSError."""
        own_file = self.path.with_name(f"lock-{owner()}-{secrets.token_hex(6)}")
        own_file.write_text(to_json(self._record), encoding="utf-8")
        try:
            for _ in range(CREATE_ATTEMPTS):
                try:
                    # The link appears with its whole content, or fails because there is a lock.
                    _link(own_file, self.path)
                    return
                except FileExistsError:
                    self._remove_if_stale()
        finally:
            own_file.unlink(missing_ok=True)
        raise CheckpointError(f"{self.path}: other processes keep taking this lock; start only one run for each folder")

    def _remove_if_stale(self) -> None:
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
            raise CheckpointError(self._describe_conflict(holder, holder_name))
        aside = self.path.with_name(f"lock-stale-{owner()}-{secrets.token_hex(6)}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            self.path.rename(aside)
            aside.unlink()

    def _describe_conflict(self, holder: LockRecord | None, holder_name: str) -> str:
        if self.path.name == LOCK_FILE:
            return (
                f"{self.path.parent}: {holder_name} is already training in this folder; stop it, or set another "
                "target_dir"
            )
        run = f" for the run {holder['run']}" if holder and holder.get("run") else ""
        return (
            f"{self.path.parent}: {holder_name} already saves checkpoints of this name here{run}, and each run would "
            "delete those of the other; stop it, or set another ckpt_dir or ckpt_save_prefix"
        )

    def _is_stale(self, holder: LockRecord | None) -> bool:
        if holder is not None:
            if holder == self._record:
                return True  # this process took it in a start that failed
            session, number = holder.get("session"), holder.get("round")
            if session is not None and session == self._record.get("session") and number != self._record["round"]:
                return True  # of an earlier world of this run; its node was lost, or is cut off
            if holder["host"] == self._record["host"]:
                return has_ended(holder["pid"], holder["started"])
            own_job, own_run = self._record["job"], self._record.get("run")
            if own_job is not None and (holder["job"], holder.get("run", own_run)) == (own_job, own_run):
                return True
        # Compare two times of the file system's clock, because the clocks of hosts may differ.
        now_file = temporary_path(self.path)
        try:
            now_file.touch()
            age_seconds = now_file.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:  # the holder has ended meanwhile
            return True
        finally:
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
            except FileNotFoundError:
                return
            except OSError:  # of a shared file system, which may recover before another process takes the lock over
                continue


def _link(own_file: Path, path: Path) -> None:
    """Let a file appear at `path` with its whole content. Errors: FileExistsError; other OSErrors."""
    try:
        os.link(own_file, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with open(path, "x", encoding="utf-8") as file:
            file.write(own_file.read_text(encoding="utf-8"))
