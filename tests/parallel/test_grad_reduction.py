"""Check which collectives of the backend sum the gradients of all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.multiprocess


def where_collectives_go(settings: dict[str, Any]) -> list[str]:
    from tests.helpers.training import fit

    seen: set[str] = set()
    slow = ("reduce_scatter_tensor", "reduce_scatter_single", "all_gather_into_tensor", "all_gather_single")
    for name in ("isend", "all_to_all_single", *slow):
        plain = getattr(torch.distributed, name, None)  # the names of the slow ones depend on the version

        def noted(*args: Any, name: str = name, plain: Any = plain, **kwargs: Any) -> Any:
            seen.add(name)
            return plain(*args, **kwargs)

        setattr(torch.distributed, name, noted)
    fit(settings)
    return sorted(seen)


def test_fsdp_on_gloo_uses_the_fast_collectives_for_any_number_of_shards(tmp_path: Path) -> None:
    from tests.helpers.training import Run, settings_for

    common = {"total_steps": 3, "batch_size": 6, "micro_batch_size": 1, "eval_every": 100, "ckpt_every": 100}
    found = run_ranks(3, where_collectives_go, settings_for(tmp_path, "sharded", parallel="fsdp", **common))
    assert found == [["all_to_all_single", "isend"]] * 3
    run_ranks(1, where_collectives_go, settings_for(tmp_path, "alone", parallel="none", **common))
    losses = [Run(tmp_path / name).values("train", "loss") for name in ("sharded", "alone")]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
