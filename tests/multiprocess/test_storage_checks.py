"""Disk, host memory and shared storage are checked before step 1."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoint_runs import RUN
from tests.helpers.ranks import run_ranks
from tests.helpers.training import settings_for
from tests.training.test_trainer import fit_error

pytestmark = pytest.mark.multiprocess


def no_room(settings: dict[str, Any]) -> str:

    usage = namedtuple("usage", "total used free")
    shutil.disk_usage = lambda _: usage(10**6, 10**6, 9999)  # type: ignore[assignment]
    return fit_error(settings)


def test_too_little_disk_is_an_error_before_step_one(folder: Path) -> None:
    messages = run_ranks(2, no_room, settings_for(folder, "small", **RUN))
    assert messages[0] == messages[1]
    assert "0.010 MB is free" in messages[0]
    assert "keep_last + 1 = 3 checkpoints" in messages[0]
    assert not (folder / "small" / "logs").exists()


def no_memory(settings: dict[str, Any]) -> str:
    from tinytrain_dist.reliability import storage_checks

    class Meminfo:
        def __init__(self, *_: Any) -> None: ...

        def read_text(self) -> str:
            return "MemTotal: 9 kB\nMemAvailable:  1 kB\n"

    storage_checks.Path = Meminfo  # type: ignore[misc, assignment]
    try:
        storage_checks.check_host_memory(2**20, start_context())
    except ValueError as error:
        return str(error)
    return "no error"


def start_context() -> Any:
    from tinytrain_dist.distributed.context import init_distributed

    return init_distributed("cpu")


def test_too_little_host_memory_is_an_error(folder: Path) -> None:
    message = run_ranks(2, no_memory, settings_for(folder, "memory", **RUN))[0]
    assert "ckpt_async: saving in the background needs 2.097 MB" in message
    assert "ckpt_async = false" in message


def blind_rank(settings: dict[str, Any]) -> str:
    """Make rank 1 see another disk under the path of the run folder."""
    import dataclasses

    from tinytrain_dist.reliability.storage_checks import check_shared_storage

    context = start_context()
    place = Path(settings["target_dir"])
    context = dataclasses.replace(context, host=f"node{context.rank}")
    if context.rank == 1:
        os.chdir("/")
        os.environ["HOME"] = "/"
        real = Path.read_text
        Path.read_text = lambda self, **k: "other" if ".probe" in self.name else real(self, **k)  # type: ignore
    try:
        check_shared_storage(place, context)
    except ValueError as error:
        return str(error)
    return "no error"


def test_node_that_does_not_see_the_folder_is_named(folder: Path) -> None:
    messages = run_ranks(2, blind_rank, settings_for(folder, "blind"))
    assert messages[0] == messages[1]
    assert "cannot be seen on node1" in messages[0]
    assert not list((folder / "blind").iterdir())
