"""A flipped bit in the memory of one rank ends the run before the bit is saved, with every way to save."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for
from tinytrain_dist.errors import TinytrainError
from tinytrain_dist.parallel.wrappers import unwrap


def flip_a_bit(trainer: Any, rank: int) -> None:
    """During step 5, flip a bit of one weight of `rank`; not the lowest bit, which an update may round away."""

    def hook(*_: Any) -> None:
        if trainer.context.rank == rank and trainer.step == 4 and not done:
            done.append(True)
            weight = unwrap(trainer.train_step.model).model.layers[1].mlp.up_proj.weight
            getattr(weight, "_local_tensor", weight).data.view(torch.int32)[0, 3] ^= 1 << 12

    done: list[bool] = []
    trainer.train_step.model.register_forward_pre_hook(hook)


def flipped(settings: dict[str, Any], rank: int) -> str:
    try:
        fit(settings, functools.partial(flip_a_bit, rank=rank))
    except TinytrainError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("mode", "ranks", "bad", "right"), [("ddp", 2, 1, 0), ("ddp", 3, 0, 1), ("hsdp", 4, 3, 1)], ids=str
)
def test_a_flipped_bit_stops_the_run_before_it_is_saved(
    tmp_path: Path, mode: str, ranks: int, bad: int, right: int
) -> None:
    grid = {"dp_replicate": 2, "dp_shard": 2} if mode == "hsdp" else {}
    settings = settings_for(tmp_path, "run", parallel=mode, batch_size=12, total_steps=9, **grid)
    messages = run_ranks(ranks, flipped, settings, bad)
    assert len(set(messages)) == 1
    assert messages[0].startswith("ReplicaMismatchError: replicas differ: model.layers.1.mlp.up_proj.weight")
    assert f"on rank {bad} (" in messages[0]
    assert f"from those on rank {right} (" in messages[0]
    assert ("it is not known which of them is wrong" in messages[0]) == (ranks != 3), "three can outvote one"
    run = Run(tmp_path / "run")
    assert [record["step"] for record in run.records if record["kind"] == "replicas_differ"] == [6]
    assert run.checkpoint.name == "checkpoint-00000003"
    assert json.loads((run.checkpoint / "trainer_state.json").read_text())["step"] == 3


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("how", "step"),
    [({"ckpt_async": False}, 6), ({"ckpt_every": 99}, 9), ({"ckpt_writers": 2, "max_shard_bytes": 4096}, 6)],
    ids=["in the foreground", "the last save", "two writers"],
)
@pytest.mark.parametrize("bad", [0, 1])
def test_every_way_to_save_compares_replicas(tmp_path: Path, how: dict[str, Any], step: int, bad: int) -> None:
    settings = settings_for(tmp_path, "run", **{"parallel": "ddp", "total_steps": 9, **how})
    assert "replicas differ: model.layers.1.mlp.up_proj.weight" in run_ranks(2, flipped, settings, bad)[0]
    run = Run(tmp_path / "run")
    assert [record["step"] for record in run.records if record["kind"] == "replicas_differ"] == [step]
    assert [path.name[-1] for path in (run.folder / "checkpoints").glob("checkpoint-*")] == ["3"] * (step == 6)
    if "ckpt_async" in how:
        assert max(record["step"] for record in run.records) == 6, "it trained on although it knew"


def flipped_and_watched(settings: dict[str, Any]) -> tuple[str, int]:
    """Return the error that ends the run, and after which step. Each step waits until the save before it has ended."""

    def prepare(trainer: Any) -> None:
        def wait_for_the_save(*_: Any) -> None:
            trainers.append(trainer)
            if trainer.checkpoints.pending is not None:
                trainer.checkpoints.pending.join()

        flip_a_bit(trainer, rank=1)
        trainer.train_step.model.register_forward_pre_hook(wait_for_the_save)

    trainers: list[Any] = []
    try:
        fit(settings, prepare)
    except TinytrainError as error:
        return str(error), trainers[-1].step
    return "", trainers[-1].step


@pytest.mark.multiprocess
def test_a_run_whose_replicas_differ_does_not_train_on_to_the_next_save(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", parallel="ddp", ckpt_every=6, total_steps=60)
    for message, step in run_ranks(2, flipped_and_watched, settings):
        assert "replicas differ" in message
        assert step < 12
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.multiprocess
def test_fingerprints_between_saves_are_compared_with_the_next_log_line(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", parallel="ddp", ckpt_every=99, total_steps=9, fingerprint_every=1)
    messages = run_ranks(2, flipped, settings, 1)
    assert "replicas differ" in messages[0]
    run = Run(tmp_path / "run")
    assert [record["step"] for record in run.records if record["kind"] == "replicas_differ"] == [5]
    assert not list((run.folder / "checkpoints").glob("checkpoint-*"))
