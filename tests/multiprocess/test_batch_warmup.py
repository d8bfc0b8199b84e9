"""Runs whose batches grow: the same on one process, DDP and FSDP, and across resumes; tokens and epochs are right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.ranks import run_ranks
from tests.helpers.training import TINY, VOCABULARY, Run, fit_all
from tinytrain_dist.cli.plot import read_curve
from tinytrain_dist.cli.report_page.run_data import read_run
from tinytrain_dist.cli.status import read_status
from tinytrain_dist.config.run_folder import open_run
from tinytrain_dist.config.schema import FIELDS

pytestmark = pytest.mark.multiprocess

WINDOWS = 22 + 8  # of one epoch: 264 and 96 tokens in windows of 12
SIZES = [2, 2, 2, 4, 4, 8, 8]  # of the steps: together one epoch
BEFORE = [0, 2, 4, 6, 10, 14, 22, 30]


class WarmUpRuns:
    """Runs with a batch-size warm-up over one epoch of two sources, reproducible and not, on one and on two ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(7)
        for name, tokens in (("a", 264), ("b", 96)):
            np.save(folder / f"{name}.npy", rng.integers(0, VOCABULARY, tokens).astype("uint16"))
        self.settings: dict[str, Any] = {
            **TINY,
            "vocab_size": VOCABULARY,
            "reproducible": True,
            "train_data": [str(folder / f"{name}.npy") for name in "ab"],
            "train_weights": ["0: 1 1", "4: 3 1"],
            "val_data": str(folder / "b.npy"),
            "sampling": "shuffle",
            "batch_size_warmup": ["0: 2", "3: 4", "5: 8"],
            "epochs": 1.0,
            "total_steps": FIELDS["total_steps"].default,  # as if it were not set
            "ckpt_every": 10**6,
            "warmup_iters": 0,
        }
        native = {"reproducible": False}
        drawn = {"sampling": "random", "epochs": None, "total_steps": 7}
        small = {**drawn, "batch_size": 2, "batch_size_warmup": None, "stop_at_step": 3}
        alone = [self.named("one"), self.named("native", **native)]
        run_ranks(1, fit_all, [*alone, self.named("random", **drawn), self.named("small", **small)])
        fsdp = {"parallel": "fsdp"}
        two = [
            self.named("ddp", parallel="ddp", stop_at_step=4),  # one step after the first change, one before the next
            self.named("ddp", parallel="ddp"),
            self.named("fsdp", **fsdp),
            self.named("random_fsdp", **fsdp, **drawn),
            self.named("native_ddp", parallel="ddp", **native),
            self.named("native_fsdp", **fsdp, **native),
        ]
        run_ranks(2, fit_all, two)

    def named(self, name: str, **changes: Any) -> dict[str, Any]:
        return {**self.settings, **changes, "target_dir": str(self.folder / name)}

    def run(self, name: str) -> Run:
        return Run(self.folder / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> WarmUpRuns:
    return WarmUpRuns(tmp_path_factory.mktemp("warmup"))


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_ddp_resumed_and_fsdp_give_the_same_bits(runs: WarmUpRuns, name: str) -> None:
    run, expected = runs.run(name), runs.run("one")
    assert run.digests() == expected.digests()
    for key in ("loss", "grad_norm", "tokens", "epoch", "batch_size", "source_share", "source_loss", "source_epoch"):
        assert run.values("train", key) == expected.values("train", key)
    assert run.values("resumed", "step") == ([4] if name == "ddp" else [])
    evaluations = {record["step"]: record["loss"] for record in run.records if record["kind"] == "eval"}
    assert [evaluations[step] for step in (3, 6, 7)] == expected.values("eval", "loss")


@pytest.mark.parametrize("name", ["native_ddp", "native_fsdp"])
def test_the_order_of_sums_alone_differs_without_reproducible_mode(runs: WarmUpRuns, name: str) -> None:
    for key in ("loss", "grad_norm"):
        assert runs.run(name).values("train", key) == pytest.approx(runs.run("one").values("train", key), rel=1e-5)
        assert runs.run("native").values("train", key) == pytest.approx(runs.run("one").values("train", key), rel=1e-5)


def test_the_first_phase_is_a_run_with_its_batch_size(runs: WarmUpRuns) -> None:
    """So losses and gradients are divided by the tokens of the step's batch, and its windows are those of its slots."""
    small, run = runs.run("small"), runs.run("random")
    assert small.values("train", "step") == [1, 2, 3]
    assert "epoch" not in run.records[-2]  # the number of tokens is known, and not counted
    assert runs.run("random_fsdp").digests() == run.digests()
    for key in ("loss", "grad_norm", "tokens", "source_share"):
        assert run.values("train", key)[:3] == small.values("train", key)


def test_tokens_epochs_and_the_length_follow_from_the_sizes(runs: WarmUpRuns) -> None:
    run = runs.run("one")
    assert run.values("train", "step") == list(range(1, 8))
    assert run.values("train", "batch_size") == SIZES
    assert run.values("train", "tokens") == [12 * sequences for sequences in BEFORE[1:]]
    assert run.values("train", "epoch") == [sequences / WINDOWS for sequences in BEFORE[1:]]
    assert [record["step"] for record in run.records if record["kind"] == "epoch"] == [7]
    state = json.loads((run.checkpoint / "trainer_state.json").read_text())
    assert state["tokens"] == 12 * WINDOWS
    assert "total_steps = 7\n" in (run.folder / "config.toml").read_text()
    # the share of the first source is a half in the first four steps, and then three quarters
    for record in run.records:
        if record["kind"] == "train":
            sequences = BEFORE[record["step"]]
            drawn = sequences / 2 if record["step"] <= 4 else 5 + 0.75 * (sequences - 10)
            assert abs(record["source_epoch"]["a.npy"] * 22 - drawn) <= 1
    # the rate does not depend on the sizes
    assert run.values("train", "lr")[:3] == runs.run("small").values("train", "lr")
    speeds, seconds = run.values("train", "tokens_per_second"), run.values("train", "step_seconds")
    assert [speed * time for speed, time in zip(speeds, seconds, strict=True)] == pytest.approx([12 * n for n in SIZES])


def test_pictures_reports_and_the_status_count_the_tokens(runs: WarmUpRuns) -> None:
    run = runs.run("one")
    curve = read_curve(run.folder, "one", "tokens")
    assert curve.x.tolist() == run.values("train", "tokens")
    assert curve.eval_x.tolist() == [12 * BEFORE[step] for step in (3, 6, 7)]
    report = read_run(run.folder, "one", 100)
    assert (report.tokens(), report.token_phases) == (12 * 30, [(0, 0, 24), (3, 72, 48), (5, 168, 96)])
    events = EventAccumulator(str(run.folder / "logs" / "by_tokens"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss_by_tokens/train")] == run.values("train", "tokens")
    status = replace(read_status(open_run(run.folder)), alive=True, step=4)
    assert status.seconds_left == pytest.approx((30 - 10) / 4 * run.values("train", "step_seconds")[-1])


def test_another_warm_up_is_another_run(runs: WarmUpRuns, tmp_path: Path) -> None:
    from tinytrain_dist.checkpoint.resume_rules import check_same_run
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.errors import CheckpointError

    state = json.loads((runs.run("one").checkpoint / "trainer_state.json").read_text())
    for warmup in (None, ["0: 4", "5: 8"]):
        config = TrainingConfig(**runs.named("one", batch_size_warmup=warmup))
        with pytest.raises(CheckpointError, match="batch_size_warmup: "):
            check_same_run(tmp_path, state, config, state["data"])
    check_same_run(tmp_path, state, TrainingConfig(**runs.named("one")), state["data"])
    del state["config"]["batch_size_warmup"]  # a checkpoint of a version without the setting had no warm-up
    with pytest.raises(CheckpointError, match="batch_size_warmup: None in the checkpoint"):
        check_same_run(tmp_path, state, TrainingConfig(**runs.named("one")), state["data"])
