"""Owns what is found out before step 1: the run folder is shared, writable, large enough, and nobody else's.

Must not know models or the loop. Rank 0 acts, all ranks are told; each sentence names the host that is the odd one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from tinytrain_dist import distributed
from tinytrain_dist.distributed import DistributedContext
from tinytrain_dist.errors import CheckpointError

TOUCH_SECONDS, STALE_SECONDS = 10.0, 120.0


def prove_shared(folder: Path, context: DistributedContext) -> None:
    """Prove that `folder` can be written, synced and renamed in by rank 0, and that every rank sees what it wrote.

    A collective. Errors: CheckpointError naming the folder, and the hosts that do not see it.
    """
    error, probe, nonce = None, folder / f".probe-{secrets.token_hex(6)}", secrets.token_hex(16)
    if context.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            aside = probe.with_name(probe.name + ".tmp")
            with open(aside, "w", encoding="utf-8") as file:
                file.write(nonce)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(probe)
        except OSError as caught:
            error = CheckpointError(
                f"{folder}: cannot be written on {context.host} ({caught.strerror}); set another target_dir or ckpt_dir"
            )
    distributed.raise_together(error)
    probe, nonce = context.broadcast_object((probe, nonce))
    try:
        seen = probe.read_text(encoding="utf-8") == nonce
    except OSError:
        seen = False
    blind = sorted({host for host, sees in context.gather_objects((context.host, seen)) if not sees})
    if context.is_main:
        probe.unlink(missing_ok=True)
    if blind:
        raise CheckpointError(
            f"{folder}: what rank 0 writes there is not seen on {', '.join(blind)}; put target_dir on a file system "
            "that all nodes share"
        )


def check_space(folder: Path, checkpoint_bytes: int, wanted: int, existing: int, context: DistributedContext) -> None:
    """Hold `wanted` checkpoints of checkpoint_bytes each, `existing` of them there already, against free disk.

    A collective. Errors: CheckpointError with both numbers.
    """
    error = None
    if context.is_main:
        need, free = max(1, wanted - existing) * checkpoint_bytes, shutil.disk_usage(folder).free
        if need > free:
            error = CheckpointError(
                f"{folder}: {_size(free)} are free, but {_size(need)} more are needed for keep_last + 1 = {wanted} "
                f"checkpoints of {_size(checkpoint_bytes)}; make room, or lower keep_last"
            )
    distributed.raise_together(error)


def check_host_memory(buffer_bytes: int, context: DistributedContext) -> None:
    """Hold what all ranks of a host need for background saves against its free memory, where the system tells it.

    A collective. Errors: CheckpointError naming the host and both numbers.
    """
    free = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    needs: dict[str, int] = {}
    frees: dict[str, int] = {}
    for host, need, there in context.gather_objects((context.host, buffer_bytes, free)):
        needs[host], frees[host] = needs.get(host, 0) + need, there
    for host, need in needs.items():
        if 0 < frees[host] < need:
            raise CheckpointError(
                f"ckpt_async: saving in the background needs {_size(need)} of buffers on {host}, where "
                f"{_size(frees[host])} are free; set ckpt_async = false, or use more hosts"
            )


class RunLock:
    """One process writes to a run folder at a time: `lock.json` says which, and is touched while it lives."""

    def __init__(self, folder: Path, context: DistributedContext) -> None:
        """Take the lock. A collective. Errors: CheckpointError naming host and process that hold it.

        A lock is stale, and taken over, if its process is gone (same host), if it is of an earlier attempt of the same
        Slurm job, or if it was not touched for two minutes (another host).
        """
        self.path, self._end, error = folder / "lock.json", threading.Event(), None
        self._held = False
        mine = {"host": context.host, "pid": os.getpid(), "started": _started(os.getpid()), "job": _slurm_job()}
        self._record = context.broadcast_object(mine)
        if context.is_main:
            try:
                self._take(mine)
            except CheckpointError as caught:
                error = caught
        distributed.raise_together(error)
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
            who = f"process {holder['pid']} on {holder['host']}" if holder else "somebody"
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
            return bool(_started(int(holder["pid"])) != holder["started"])
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


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"


def _started(pid: int) -> str | None:
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
