"""Shuffled runs: the same on any number of ranks and after a resume; every token once per epoch; logs by source."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.helpers.training import TINY, VOCABULARY, Run, train

pytestmark = pytest.mark.multiprocess

CONTEXT_LEN = TINY["context_len"]
LENGTHS = {"a": [250, 100, 37], "b": [180]}  # tokens of each shard
WINDOWS = [33, 15]  # of each source: 387 and 180 tokens in windows of 12
SOURCES = ("a", "b.npy")


class ShuffledRun(NamedTuple):
    """A run of one rank over two epochs, and what another run needs to be the same one."""

    folder: Path
    settings: dict[str, Any]
    run: Run


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> ShuffledRun:
    folder = tmp_path_factory.mktemp("shuffled")
    rng = np.random.default_rng(7)
    (folder / "a").mkdir()
    for number, tokens in enumerate(LENGTHS["a"]):
        np.save(folder / "a" / f"{number}.npy", rng.integers(0, VOCABULARY, tokens).astype("uint16"))
    np.save(folder / "b.npy", rng.integers(0, VOCABULARY, LENGTHS["b"][0]).astype("int32"))
    settings = {
        **TINY,
        "vocab_size": VOCABULARY,
        "reproducible": True,
        "train_data": [str(folder / name) for name in SOURCES],
        "val_data": str(folder / "b.npy"),
        "sampling": "shuffle",
        "epochs": 2.0,
        "micro_batch_size": 2,
        "log_every": 2,
    }
    del settings["total_steps"]
    return ShuffledRun(folder, settings, train(folder, "whole", 1, **settings))


def test_epochs_give_the_length_of_the_run_and_are_logged(shuffled: ShuffledRun) -> None:
    run = shuffled.run
    steps = 2 * sum(WINDOWS) // TINY["batch_size"]
    assert run.values("train", "step")[-1] == steps == 12
    assert f"total_steps = {steps}\n" in (run.folder / "config.toml").read_text()
    assert "epochs" not in (run.folder / "config.toml").read_text()
    assert run.values("train", "epoch") == [step / 6 for step in range(2, 13, 2)]
    ended = [(record["step"], record["text"]) for record in run.records if record["kind"] == "epoch"]
    assert ended == [(6, "epoch 1 ended"), (12, "epoch 2 ended")]
    for record in run.records:
        if record["kind"] == "train":
            assert record["source_epoch"] == dict.fromkeys(SOURCES, pytest.approx(record["epoch"], abs=0.03))


def test_losses_of_sources_add_up_to_the_loss(shuffled: ShuffledRun, tmp_path: Path) -> None:
    """Over whole epochs the shares are known; in a single logged step the losses make up the logged loss."""
    shares = shuffled.run.values("train", "source_share")
    assert sum(share["a"] for share in shares[:3]) / 3 == pytest.approx(33 / 48)
    one = train(tmp_path, "one", 1, **shuffled.settings | {"log_every": 1, "total_steps": 3, "epochs": None})
    for record in one.records:
        if record["kind"] == "train":
            share, loss = record["source_share"], record["source_loss"]
            mean = sum(share[name] * loss[name] for name in SOURCES)
            assert mean == pytest.approx(record["loss"], rel=1e-5)
            assert loss["a"] != loss["b.npy"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_other_ranks_and_a_resume_give_the_same_run(shuffled: ShuffledRun, ranks: int) -> None:
    folder, settings, expected = shuffled
    name = f"run{ranks}"
    interrupted = train(folder, name, ranks, **settings, stop_at_step=4)
    assert interrupted.checkpoint.name == "checkpoint-00000004"
    resumed = train(folder, name, ranks // 2, **settings)
    assert resumed.values("resumed", "step") == [4]
    assert resumed.digests() == expected.digests()
    for key in ("loss", "grad_norm", "epoch", "source_share", "source_loss", "source_epoch"):
        assert resumed.values("train", key) == expected.values("train", key)
