"""Check before step 1 that a run folder is shared and writable, and that disk and host memory suffice.

Must not know models or the loop. Rank 0 acts and all ranks get the result; each message names the host concerned.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import CheckpointError


def check_shared_storage(folder: Path, context: DistributedContext) -> None:
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
    collectives.raise_on_all_ranks(error)
    probe, nonce = context.broadcast_object((probe, nonce))
    try:
        seen = probe.read_text(encoding="utf-8") == nonce
    except OSError:
        seen = False
    blind = sorted({host for host, sees in context.all_gather_object((context.host, seen)) if not sees})
    if context.is_main:
        probe.unlink(missing_ok=True)
    if blind:
        raise CheckpointError(
            f"{folder}: what rank 0 writes there is not seen on {', '.join(blind)}; put target_dir on a file system "
            "that all nodes share"
        )


def check_disk_space(
    folder: Path, checkpoint_bytes: int, wanted: int, existing: int, context: DistributedContext
) -> None:
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
    collectives.raise_on_all_ranks(error)


def check_host_memory(buffer_bytes: int, context: DistributedContext) -> None:
    """Hold what all ranks of a host need for background saves against its free memory, where the system tells it.

    A collective. Errors: CheckpointError naming the host and both numbers.
    """
    free = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    needs: dict[str, int] = {}
    frees: dict[str, int] = {}
    for host, need, there in context.all_gather_object((context.host, buffer_bytes, free)):
        needs[host], frees[host] = needs.get(host, 0) + need, there
    for host, need in needs.items():
        if 0 < frees[host] < need:
            raise CheckpointError(
                f"ckpt_async: saving in the background needs {_size(need)} of buffers on {host}, where "
                f"{_size(frees[host])} are free; set ckpt_async = false, or use more hosts"
            )


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"
