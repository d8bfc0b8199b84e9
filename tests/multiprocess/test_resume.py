"""Which checkpoint a run resumes from, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoint_runs import RUN
from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for, train
from tests.training.test_trainer import fit_error

pytestmark = pytest.mark.multiprocess


def test_allow_names_what_may_change(tmp_path: Path) -> None:
    train(tmp_path, "run", 1, stop_at_step=3)
    refused = settings_for(tmp_path, "run", seed=3, context_len=11)
    assert "context_len: 12 in the checkpoint, 11 now" in run_ranks(1, fit_error, {**refused, "allow": "seed"})[0]
    assert run_ranks(1, fit_error, {**refused, "allow": "seed, context_len"})[0] == "no error"


def test_branch_inside_the_folder_is_refused_and_a_requeued_start_continues(tmp_path: Path) -> None:
    first = train(tmp_path, "first", 1, keep_last=9)
    earlier = first.folder / "checkpoints" / "checkpoint-00000003"
    message = run_ranks(1, fit_error, settings_for(tmp_path, "first", resume=str(earlier)))[0]
    assert "its folder also holds 1 later checkpoint(s)" in message
    branch = settings_for(tmp_path, "branch", resume=str(earlier), ckpt_every=1)
    run_ranks(1, fit, {**branch, "stop_at_step": 5})
    run_ranks(1, fit, branch)
    texts = Run(tmp_path / "branch").values("resumed", "text")
    assert "first/checkpoints/checkpoint-00000003" in texts[0]
    assert "branch/checkpoints/checkpoint-00000005" in texts[1]


def test_finished_run_started_again_records_nothing_twice(tmp_path: Path) -> None:
    run = train(tmp_path, "run", 1)
    before = [(r["kind"], r["step"]) for r in run.records if r["kind"] in ("train", "eval", "saved")]
    again = train(tmp_path, "run", 1)
    assert [(r["kind"], r["step"]) for r in again.records if r["kind"] in ("train", "eval", "saved")] == before
    content = {path: path.read_bytes() for path in (run.folder / "checkpoints").rglob("*") if path.is_file()}
    message = run_ranks(1, fit_error, settings_for(tmp_path, "run", total_steps=5))[0]
    assert message.startswith("CheckpointError: total_steps: 5 is less than 6, the step of ")
    assert {path: path.read_bytes() for path in content} == content


def test_a_run_that_stop_at_step_keeps_from_training_says_so(tmp_path: Path) -> None:
    for stop in (3, 2):
        run = train(tmp_path, "run", 1, stop_at_step=stop)
    assert run.values("stopped", "text") == [
        "done at step 3 of 6",
        "done (nothing was trained, because stop_at_step 2 is not beyond step 3, from which this run continued; set it "
        "to more than 3, or leave it out) at step 3 of 6",
    ]


def data_of_rank_1_is_gone(settings: dict[str, Any]) -> str:
    from tinytrain_dist.data import token_source

    if os.environ["RANK"] == "1":  # its node has not mounted the folder
        plain = token_source.find_layout
        token_source.find_layout = lambda path, *rest: plain(path.with_name(f"{path.name}.gone"), *rest)
    return fit_error(settings)


def test_error_of_one_rank_is_raised_on_all(folder: Path) -> None:
    messages = run_ranks(2, data_of_rank_1_is_gone, settings_for(folder, "gone", **RUN))
    assert messages[0] == messages[1]
    assert "train.npy.gone: no such token file" in messages[0]
