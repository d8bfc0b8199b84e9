"""Let one process at a time write to a run folder, and take over the lock of a process that is gone."""

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

TOUCH_SECONDS, STALE_SECONDS = 10.0, 120.0


class RunLock:
    """One process writes to a run folder at a time: `lock.json` says which, and is touched while it lives."""

    def __init__(self, folder: Path, context: DistributedContext) -> None:
        """Take the lock. A collective. Errors: CheckpointError naming host and process that hold it.

        A lock is stale, and taken over, if its process is gone (same host), if it is of an earlier attempt of the same
        Slurm job, or if it was not touched for two minutes (another host).
        """
        self.path, self._end, error = folder / LOCK_FILE, threading.Event(), None
        self._held = False
        mine = {
            "host": context.host,
            "pid": os.getpid(),
            "started": process_start_time(os.getpid()),
            "job": _slurm_job(),
        }
        self._record = context.broadcast_object(mine)
        if context.is_main:
            try:
                self._take(mine)
            except CheckpointError as caught:
                error = caught
        collectives.raise_on_all_ranks(error)
        if self._held:
            threading.Thread(target=self._touch, name="lock", daemon=True).start()

    def _take(self, mine: dict[str, Any]) -> None:
        private = self.path.with_name(f"lock-{secrets.token_hex(6)}")
        private.write_text(json.dumps(mine), encoding="utf-8")
        try:
            for _ in range(3):
                try:
                    os.link(private, self.path)  # it appears complete, or somebody else's is there
                    self._held = True
                    return
                except FileExistsError:
                    self._remove_stale(mine)
        finally:
            private.unlink(missing_ok=True)
        raise CheckpointError(f"{self.path}: other processes keep taking this lock; start only one run per folder")

    def _remove_stale(self, mine: dict[str, Any]) -> None:
        """Errors: CheckpointError if the lock is somebody's. Of several that find it stale, one removes it."""
        holder, seen = self._holder(), self._touched()
        while not self._is_stale(holder, mine):
            if holder is not None and holder["host"] != mine["host"] and self._touched() == seen:
                time.sleep(1.0)  # on a node that was lost it stays as it is; where somebody lives it is touched
                continue
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise CheckpointError(
                f"{self.path.parent}: {who} trains into this folder; stop it, or set another target_dir"
            )
        aside = self.path.with_name(f"lock-stale-{secrets.token_hex(6)}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            aside.unlink()

    def _touched(self) -> float:
        with contextlib.suppress(OSError):
            return self.path.stat().st_mtime
        return 0.0

    def _holder(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            return found if {"host", "pid", "started", "job"} <= found.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def _is_stale(self, holder: dict[str, Any] | None, mine: dict[str, Any]) -> bool:
        if holder is not None and holder == mine:
            return True  # this very process, after a failed start
        if holder is not None and holder["host"] == mine["host"]:
            return bool(process_start_time(int(holder["pid"])) != holder["started"])
        if holder is not None and holder["job"] is not None and holder["job"] == mine["job"]:
            return True
        # the file system's clock on both sides: the hosts' clocks may differ
        now = self.path.with_name(self.path.name + ".now")
        now.touch()
        age = now.stat().st_mtime - self.path.stat().st_mtime
        now.unlink(missing_ok=True)
        return age > STALE_SECONDS

    def taken(self) -> bool:
        """Whether another process holds the folder by now; true on every rank of the one that lost it."""
        holder = self._holder()
        return holder is not None and holder != self._record

    def _touch(self) -> None:
        while not self._end.wait(TOUCH_SECONDS) and not self.taken():
            try:
                os.utime(self.path)
            except OSError:
                return

    def release(self) -> None:
        """Give the folder back."""
        self._end.set()
        if self._held and not self.taken():
            self.path.unlink(missing_ok=True)


def process_start_time(pid: int) -> str | None:
    """When a process of this host began, in its kernel's words; None if there is none. Tells reused ids apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
        return "running"
    except (ProcessLookupError, PermissionError):
        return None


def _slurm_job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")
