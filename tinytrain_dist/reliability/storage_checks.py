"""Check before step 1 that a run folder is shared and writable, and that disk and host memory suffice.

Must not know models or the training loop. Rank 0 checks, and all ranks get the result. Each message names the host.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from tinytrain_dist.config.run_folder import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    ERROR_FILE,
    LOCK_FILE,
    LOGS_FOLDER,
    REPLACED_SUFFIX,
    STATE_FILE,
    STOP_FILE,
    abort_file,
    checkpoint_lock_file,
    records_file,
)
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import CheckpointError, TrainingError
from tinytrain_dist.utils.regular_files import DEAD_LINK, KINDS, kind_of
from tinytrain_dist.utils.stale_files import owner

# settings that need buffers in host memory: what for, and the error if there is too little
HOST_BUFFERS = {
    "ckpt_async": ("saving in the background", CheckpointError),
    "activation_offload": ("keeping inputs of blocks on the host", TrainingError),
}


def check_shared_storage(folder: Path, context: DistributedContext, setting: str = "target_dir") -> None:
    """Check that rank 0 can write, sync and rename in `folder`, and that every rank sees what it wrote. A collective.

    setting: the one that names the folder. Errors: CheckpointError naming the folder, and the hosts that do not see it.
    """
    probe = folder / f".probe-{owner()}-{secrets.token_hex(6)}"
    nonce = secrets.token_hex(16)
    error = None
    if context.is_main:
        try:
            _write_probe(probe, nonce)
        except OSError as caught:
            error = CheckpointError(
                f"{folder}: cannot be written on {context.host} ({caught.strerror}); set another {setting}"
            )
    collectives.raise_on_all_ranks(error)
    probe, nonce = context.broadcast_object((probe, nonce))
    try:
        sees_probe = probe.read_text(encoding="utf-8") == nonce
    except OSError:
        sees_probe = False
    by_rank = context.all_gather_object((context.host, sees_probe))
    blind_hosts = sorted({host for host, sees in by_rank if not sees})
    if context.is_main:
        probe.unlink(missing_ok=True)
    if blind_hosts:
        raise CheckpointError(
            f"{folder}: files that rank 0 writes there cannot be seen on {', '.join(blind_hosts)}; put {setting} on a "
            "file system that all nodes share"
        )


def check_run_files(config: TrainingConfig, context: DistributedContext) -> None:
    """Check that nothing else is where a run writes its files, or makes its folders. A collective.

    Errors: CheckpointError naming the first such path, what is there, and what to do.
    """
    collectives.raise_on_all_ranks(_misplaced(config) if context.is_main else None)


def _misplaced(config: TrainingConfig) -> CheckpointError | None:
    """Return an error for the first path of a run at which there is something else than the run needs there."""
    run, logs = Path(config.target_dir), config.logs_dir
    records = records_file(logs, config.log_save_prefix)
    replaced = [run / name for name in (CONFIG_FILE, ENVIRONMENT_FILE, STATE_FILE, ERROR_FILE, STOP_FILE)]
    checkpoint_lock = checkpoint_lock_file(config.checkpoints_dir, config.ckpt_save_prefix)
    opened = [run / LOCK_FILE, checkpoint_lock, records, records.with_suffix(REPLACED_SUFFIX)]
    # A file is put in place of anything but a folder. What is opened must not be a pipe or a device.
    other = {name for _, name in KINDS} - {"a file", "a folder"}
    wrong = {path: {"a folder"} for path in (*replaced, abort_file(run))}
    wrong |= {path: {"a folder", *other} for path in opened}
    wrong |= {path: {"a file", DEAD_LINK, *other} for path in (run, run / LOGS_FOLDER, logs)}
    for path, kinds in wrong.items():
        with contextlib.suppress(OSError):  # such as no permission; making the folders reports it
            if (kind := kind_of(path)) in kinds:
                expected = "a folder" if DEAD_LINK in kinds else "a file"
                setting = "log_dir" if config.log_dir and path.is_relative_to(logs) else "target_dir"
                return CheckpointError(
                    f"{path}: is {kind}, but the run needs {expected} there; move it away, or set another {setting}"
                )
    return None


def _write_probe(path: Path, text: str) -> None:
    """Write a file as checkpoints are written: under another name, then synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def check_disk_space(
    folder: Path, checkpoint_bytes: int, wanted: int, existing: int, context: DistributedContext
) -> None:
    """Check that the disk has room for `wanted` checkpoints of this size, `existing` of which are there already.

    There must be room for at least one more. A collective. Errors: CheckpointError with both numbers.
    """
    error = None
    if context.is_main:
        needed_bytes = max(1, wanted - existing) * checkpoint_bytes
        free_bytes = shutil.disk_usage(folder).free
        if needed_bytes > free_bytes:
            fitting = existing + free_bytes // checkpoint_bytes - 1 if free_bytes >= checkpoint_bytes else 0
            lower = f", or set keep_last = {fitting}" if fitting >= 1 else ""
            error = CheckpointError(
                f"{folder}: {_format_size(free_bytes)} is free, but {_format_size(needed_bytes)} more is needed for "
                f"keep_last + 1 = {wanted} checkpoints of {_format_size(checkpoint_bytes)}; make room{lower}"
            )
    collectives.raise_on_all_ranks(error)


def check_host_memory(buffer_bytes: int, context: DistributedContext, setting: str = "ckpt_async") -> None:
    """Check that the free memory of each host holds the buffers that all its ranks need for a setting.

    buffer_bytes: of this rank. setting: a key of HOST_BUFFERS. A host whose system does not report its free memory is
    not checked. A collective. Errors: CheckpointError or TrainingError, naming the setting, the host and both numbers.
    """
    purpose, error = HOST_BUFFERS[setting]
    free_bytes = 0  # unknown
    with contextlib.suppress(OSError, ValueError, IndexError):
        free_bytes = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    needed_by_host: dict[str, int] = {}
    free_by_host: dict[str, int] = {}
    for host, needed, free in context.all_gather_object((context.host, buffer_bytes, free_bytes)):
        needed_by_host[host] = needed_by_host.get(host, 0) + needed
        free_by_host[host] = free
    for host, needed in needed_by_host.items():
        if 0 < free_by_host[host] < needed:
            raise error(
                f"{setting}: {purpose} needs {_format_size(needed)} of buffers on {host}, where only "
                f"{_format_size(free_by_host[host])} is free; set {setting} = false, or use more hosts"
            )


def _format_size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3f} MB"
