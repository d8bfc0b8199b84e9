"""Kill ranks at every stage of a save; the next start ends with the same bits."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoint_runs import RUN
from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for

pytestmark = pytest.mark.multiprocess


def die_at(trainer: Any, stage: str, ranks: tuple[int, ...]) -> None:
    """Kill the given ranks when the save of step 4 reaches a stage, or when the save of step 6 deletes a checkpoint."""
    import torch.distributed

    from tinytrain_dist.checkpoint import async_save, manifest, sharded_io
    from tinytrain_dist.parallel import replica_check

    if trainer.context.rank not in ranks:
        return
    owner, name = {
        "copy": (async_save.HostBuffers, "copy"),
        "compare": (replica_check.ReplicaComparison, "finish"),
        "gather": (torch.distributed, "isend" if trainer.context.rank else "irecv"),
        "between files": (sharded_io, "write_index"),
        "before the manifest": (sharded_io, "commit_folder"),
        "before the rename": (manifest, "fsync_folder"),
        "retention": (shutil, "rmtree"),
    }[stage]
    plain, calls = getattr(owner, name), [0]
    copies = [0]
    which_save = 3 if stage == "retention" else 2
    copy = async_save.HostBuffers.copy

    def counted_copy(self: Any) -> Any:
        copies[0] += 1
        if stage == "copy" and copies[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return copy(self)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if copies[0] == which_save:
            calls[0] += 1
            if calls[0] == WHICH_CALL.get(stage, 1):
                os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    if stage != "copy":
        setattr(owner, name, deadly)
    async_save.HostBuffers.copy = counted_copy  # type: ignore[method-assign]


WHICH_CALL = {"gather": 5}


STAGES = [
    ("copy", (0,)), ("copy", (0, 1)), ("compare", (0,)), ("compare", (1,)), ("gather", (1,)), ("gather", (0,)),
    ("gather", (0, 1)), ("between files", (0,)), ("before the manifest", (0,)), ("before the rename", (0,)),
    ("retention", (0,)),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "ranks"), STAGES, ids=[f"{stage} {ranks}" for stage, ranks in STAGES])
def test_after_a_kill_in_a_save_the_next_start_continues_to_the_same_bits(
    folder: Path, undisturbed: Run, stage: str, ranks: tuple[int, ...]
) -> None:
    name = f"killed-{stage}-{len(ranks)}-{ranks[0]}".replace(" ", "-")
    # one checkpoint is kept, so that the save of step 6 has something to delete: step 5 has shown that training
    # continues well from step 4. Replicas compare what they hold.
    settings = settings_for(folder, name, **RUN | {"parallel": "ddp" if stage == "compare" else "fsdp"}, keep_last=1)
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(2, fit, settings, functools.partial(die_at, stage=stage, ranks=ranks))
    run_ranks(2, fit, settings)
    run = Run(folder / name)
    (text,) = run.values("resumed", "text")
    assert f"checkpoint-0000000{4 if stage == 'retention' else 2}" in text, "at most one interval is lost"
    assert run.digests() == undisturbed.digests()
    assert not list((folder / name / "checkpoints").glob("*.tmp")), "what was half-written is cleared away"
