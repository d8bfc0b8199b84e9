"""micro_batch_size = auto: the largest size that fits on all ranks, or an error that lists the memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.parallel_dims import ParallelDims
from tinytrain_dist.training import memory_estimate


def out_of_memory_above(most: int, rank: int) -> None:
    """Let the blocks of one rank run out of memory in forward when they get more than `most` sequences."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    from tinytrain_dist.model.transformer import TransformerBlock

    plain = TransformerBlock.forward

    def forward(self: Any, x: Any, *args: Any) -> Any:
        if x.shape[0] > most and collectives.get_rank() == rank and not isinstance(x, FakeTensor):
            raise torch.OutOfMemoryError("injected")
        return plain(self, x, *args)

    TransformerBlock.forward = forward  # type: ignore[method-assign]


def fit_small(settings: dict[str, Any], most: int | None, room: float | None = None) -> str:
    """On a rank: train with little memory; return the error, if there is one."""
    from tinytrain_dist.training import memory_fitting

    if most is not None:
        out_of_memory_above(most, rank=1)
    if room is not None:
        memory_fitting.free_memory_bytes = lambda *_: room / memory_estimate.USABLE_MEMORY
    try:
        fit(settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.multiprocess
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_out_of_memory_on_one_rank_makes_all_fall_back(mode: str, tmp_path: Path) -> None:
    auto = settings_for(tmp_path, "auto", parallel=mode, micro_batch_size="auto")
    errors = run_ranks(2, fit_small, auto, 1)
    assert errors == ["", ""]
    fixed = settings_for(tmp_path, "fixed", parallel=mode, micro_batch_size=1)
    run_ranks(2, fit_small, fixed, None)
    assert "micro_batch_size = 1\n" in (tmp_path / "auto" / "config.toml").read_text()
    assert Run(tmp_path / "auto").digests() == Run(tmp_path / "fixed").digests(), "a trial must leave no trace"


@pytest.mark.multiprocess
def test_auto_chooses_the_largest_size_within_the_estimate_and_reports_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], world: DistributedContext
) -> None:
    settings = settings_for(tmp_path, "auto", parallel="none", micro_batch_size="auto", vocab_size=600)
    config = TrainingConfig(**{**settings, "micro_batch_size": 4})
    alone = dataclasses.replace(world, parallel_dims=ParallelDims("none", 1, 1, ""))
    room = memory_estimate.estimate_memory(config, alone).nbytes + 1
    assert run_ranks(1, fit_small, settings, None, room) == [""]
    assert "micro_batch_size = auto: 4\nbatch_size 8 = micro_batch_size 4 x 1 ranks x 2" in capfd.readouterr().out


@pytest.mark.multiprocess
def test_out_of_memory_with_a_fixed_size_shows_what_is_held_and_what_helps(tmp_path: Path) -> None:
    fixed = settings_for(tmp_path, "fixed", parallel="ddp", micro_batch_size=4, vocab_size=600, context_len=64)
    with pytest.raises(AssertionError, match="rank 1 of 2 failed") as caught:
        run_ranks(2, fit, fixed, out_of_memory_at_two)
    text = str(caught.value)
    assert "OutOfMemoryError: injected\nestimated memory of one step on one rank" in text
    for line in ("master weights", "optimizer state", "at the peak (", "with micro_batch_size = 2"):
        assert line in text


def out_of_memory_at_two(trainer: Any) -> None:
    out_of_memory_above(2, rank=1)


@pytest.mark.multiprocess
def test_when_nothing_fits_every_rank_reports_it(tmp_path: Path) -> None:
    auto = settings_for(tmp_path, "auto", parallel="fsdp", micro_batch_size="auto")
    errors = run_ranks(2, fit_small, auto, 0)
    assert all("micro_batch_size: not even 1 fits in memory\nestimated memory of one step" in error for error in errors)
