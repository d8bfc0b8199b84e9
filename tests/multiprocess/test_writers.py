"""Several ranks write the files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoint_runs import RUN
from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for, train
from tests.training.test_trainer import fit_error

pytestmark = pytest.mark.multiprocess


def send_in_many_parts(_: Any) -> None:
    """Ranks send a tensor in up to 53 parts, more than are requested at once; their order must stay the same."""
    from tinytrain_dist.checkpoint import sharded_io

    sharded_io.CHUNK_BYTES = 16


@pytest.mark.parametrize("mode", [{"parallel": "ddp"}, {"parallel": "fsdp"}, {"parallel": "hsdp", "dp_shard": 2}])
def test_several_writers_write_the_same_tensors(folder: Path, undisturbed: Run, mode: dict[str, Any]) -> None:
    name = f"writers-{mode['parallel']}"
    writers = {"ckpt_writers": 3, "max_shard_bytes": 3000}
    run_ranks(4, fit, settings_for(folder, name, **{**RUN, **mode}, **writers), send_in_many_parts)
    run = Run(folder / name)
    assert len(list(run.checkpoint.glob("*.safetensors"))) > 6
    assert run.digests() == undisturbed.digests()
    manifest, expected = (json.loads((r.checkpoint / "manifest.json").read_text()) for r in (run, undisturbed))
    assert list(manifest["tensors"]["model"]) == list(expected["tensors"]["model"])
    again = train(folder, name, 2, **RUN)
    assert again.values("resumed", "text")


def test_more_writers_than_ranks_are_refused(folder: Path) -> None:
    message = run_ranks(2, fit_error, settings_for(folder, "many", **RUN, ckpt_writers=3))[0]
    assert "ckpt_writers: 3 is more than the 2 ranks" in message
