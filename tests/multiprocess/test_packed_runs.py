"""Runs on packed documents: the same bits on any number of ranks, after a resume, and with documents one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F

from tests.helpers.training import TINY, VOCABULARY, Run, settings_for, train
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.training.run_data import open_training_data

pytestmark = pytest.mark.multiprocess
PACKED: dict[str, Any] = {
    "reproducible": True,
    "sampling": "shuffle",
    "packing": "best_fit",
    "document_mask": True,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("packed")
    settings = settings_for(folder, "one", **PACKED)
    for number, name in enumerate(("train", "val")):
        begins = np.random.default_rng(number).random(len(np.load(folder / f"{name}.npy"))) < 0.2
        begins[0] = True
        np.save(folder / f"{name}.documents.npy", np.flatnonzero(begins))
    return settings


@pytest.fixture(scope="module")
def one(settings: dict[str, Any]) -> Run:
    folder = Path(settings["target_dir"]).parent
    return train(folder, "one", 1, **settings)


def test_two_ranks_and_a_resume_compute_the_bits_of_one(settings: dict[str, Any], one: Run) -> None:
    folder = one.folder.parent
    settings = {**settings, "target_dir": str(folder / "two")}
    train(folder, "two", 1, **{**settings, "total_steps": 3, "cosine_iters": 6})
    two = train(folder, "two", 2, **{**settings, "parallel": "ddp"})
    assert two.digests() == one.digests()
    assert two.values("eval", "loss") == one.values("eval", "loss")


def test_the_first_loss_is_that_of_the_documents_one_by_one(settings: dict[str, Any], one: Run) -> None:
    config = TrainingConfig(**{**settings, "vocab_size": VOCABULARY})
    model = TransformerLM(config)
    windows = open_training_data(config).training_windows(0, 0, range(TINY["batch_size"]))
    assert windows.documents is not None
    assert windows.counted is not None
    total, count = 0.0, 0
    for row, counted, documents in zip(windows.tokens.long(), windows.counted, windows.documents, strict=True):
        for number in documents.unique():
            inputs = documents == number
            kept = counted[inputs]
            losses = F.cross_entropy(model(row[:-1][inputs][None])[0].double(), row[1:][inputs], reduction="none")
            total, count = total + float(losses[kept].detach().sum()), count + int(kept.sum())
    assert count > 0.7 * windows.counted.numel()
    assert one.values("train", "loss")[0] == pytest.approx(total / count, rel=1e-6)
