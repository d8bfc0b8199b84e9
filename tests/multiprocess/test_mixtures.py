"""Runs on several token files: on any number of ranks, resumed, evaluated, and refused when the files change."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import TINY, VOCABULARY, Run, train
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.data.window_sampling import EVAL_STREAM
from tinytrain_dist.errors import TinytrainError

pytestmark = pytest.mark.multiprocess

BYTES_PER_TOKEN = np.array([0] + [1 + token_id % 4 for token_id in range(1, VOCABULARY)])


class MixtureRun(NamedTuple):
    """A run on several files, and what another run needs to be the same one."""

    folder: Path
    settings: dict[str, Any]
    run: Run


def write_mixture(folder: Path) -> dict[str, Any]:
    """Write two files of different type and length to train on and two to evaluate on; return the run's settings."""
    rng = np.random.default_rng(7)
    for name, count, dtype in (("a", 3000, "uint16"), ("b", 900, "int32")):
        (folder / name).mkdir(exist_ok=True)
        for side in ("train", "val"):
            np.save(folder / name / f"{side}.npy", rng.integers(0, VOCABULARY, count).astype(dtype))
    return {
        **TINY,
        "vocab_size": VOCABULARY,
        "reproducible": True,
        "train_data": [str(folder / name / "train.npy") for name in "ab"],
        "train_weights": [0.6, 0.4],
        "val_data": [str(folder / name / "val.npy") for name in "ab"],
    }


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> MixtureRun:
    """A run of one rank, with a table of the bytes of each token ID beside the data."""
    folder = tmp_path_factory.mktemp("mixture")
    settings = write_mixture(folder)
    np.save(folder / "a" / "token_bytes.npy", BYTES_PER_TOKEN)
    return MixtureRun(folder, settings, train(folder, "whole", 1, **settings))


def evaluations(run: Run) -> list[dict[str, Any]]:
    return [record for record in run.records if record["kind"] == "eval"]


def test_two_ranks_and_a_resume_in_the_middle_give_the_same_run(mixture: MixtureRun) -> None:
    folder, settings, expected = mixture
    interrupted = train(folder, "run", 2, **settings, stop_at_step=4)
    assert interrupted.checkpoint.name == "checkpoint-00000004"
    resumed = train(folder, "run", 2, **settings)
    assert resumed.digests() == expected.digests()
    for name in ("loss", "grad_norm"):
        assert resumed.values("train", name) == expected.values("train", name)
    by_step = {record["step"]: record for record in evaluations(resumed)}  # the stop at step 4 adds an evaluation
    for record in evaluations(expected):
        for name in ("loss", "loss/a/val.npy", "loss/b/val.npy", "bits_per_byte"):
            assert by_step[record["step"]][name] == record[name]


def test_evaluation_of_several_files_and_bits_per_byte(mixture: MixtureRun) -> None:
    record = evaluations(mixture.run)[0]
    assert record["loss"] == pytest.approx((record["loss/a/val.npy"] + record["loss/b/val.npy"]) / 2, rel=1e-12)
    assert record["loss/a/val.npy"] != record["loss/b/val.npy"]
    slots, context_len = range(TINY["batch_size"]), TINY["context_len"]
    num_bytes = 0
    for path in mixture.settings["val_data"]:
        dataset = TokenDataset([path], context_len)
        targets = dataset.read(*dataset.draw(0, 0, slots, EVAL_STREAM)).tokens[:, 1:].numpy()
        num_bytes += int(BYTES_PER_TOKEN[targets].sum())
    nats = record["loss"] * 2 * len(slots) * context_len
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-12)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(mixture.run.folder / "logs"))
    events.Reload()
    assert {"eval/bits_per_byte", "eval/loss/a/val.npy", "eval/loss/b/val.npy"} <= set(events.Tags()["scalars"])
    assert events.Scalars("eval/bits_per_byte")[0].value == pytest.approx(record["bits_per_byte"], rel=1e-6)


def errors_of(runs: list[dict[str, Any]]) -> list[str]:
    """On a rank: start these runs one after the other; return the error of each, or that there was none."""
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.training.trainer import Trainer

    context = init_distributed("cpu")
    errors = []
    for settings in runs:
        try:
            Trainer.build(TrainingConfig(**settings), context).fit()
            errors.append("no error")
        except TinytrainError as error:
            errors.append(str(error))
    return errors


def test_other_files_order_or_weights_are_another_run_unless_allowed(mixture: MixtureRun, tmp_path: Path) -> None:
    folder, settings, run = mixture
    state = json.loads((run.checkpoint / "trainer_state.json").read_text())
    assert [file["tokens"] for file in state["data"]["train"]] == [3000, 900]
    shutil.copytree(folder, tmp_path / "copy")
    longer = {**settings, "target_dir": str(tmp_path / "copy" / "whole"), "total_steps": 7}
    changed_file = tmp_path / "copy" / "b" / "train.npy"
    ids = np.load(changed_file)
    ids[-1] ^= 1
    np.save(changed_file, ids)
    reordered = {**longer, "train_data": settings["train_data"][::-1]}
    other_weights, no_weights, *other_data, allowed = run_ranks(
        1,
        errors_of,
        [
            {**longer, "train_weights": [0.5, 0.5]},
            {**longer, "train_weights": None},
            reordered,
            {**longer, "train_data": [settings["train_data"][0], str(changed_file)]},
            {**longer, "train_data": settings["train_data"][0], "train_weights": None},
            {**reordered, "allow": "train_data"},
        ],
    )[0]
    for message in (other_weights, no_weights):
        assert "train_weights: [0.6, 0.4] in the checkpoint" in message
        assert "train_data:" not in message
    assert len(other_data) == 3
    for message in other_data:
        assert "train_data: {'train': [{" in message
    assert allowed == "no error"


def test_a_run_on_one_file_has_the_checkpoint_and_records_that_it_always_had(tmp_path: Path) -> None:
    settings = write_mixture(tmp_path)
    one_file = {"train_data": settings["train_data"][0], "train_weights": None, "val_data": settings["val_data"][0]}
    settings |= one_file
    run = train(tmp_path, "one", 1, **settings)
    state = json.loads((run.checkpoint / "trainer_state.json").read_text())
    assert state["data"]["train"] == TokenDataset([settings["train_data"]], 4).fingerprints[0]
    assert evaluations(run)[0].keys() == {"kind", "step", "time", "loss", "perplexity", "seconds"}, (
        "without a table of bytes there are no bits per byte"
    )
    resumed = train(tmp_path, "one", 1, **settings | {"train_data": [settings["train_data"]], "total_steps": 7})
    assert resumed.values("resumed", "step") == [6]
