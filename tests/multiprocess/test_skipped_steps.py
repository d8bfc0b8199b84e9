"""Check spikes, steps that are not finite and steps that are left out: in every layout, and across a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for
from tests.training.test_trainer import fit_error

pytestmark = pytest.mark.multiprocess

SPIKES, NOT_FINITE = (11, 15), 13
LONG: dict[str, Any] = {
    "total_steps": 18,
    "skip_spikes": 6.0,
    "spike_window": 8,
    "skip_steps": "5:6,17:17",
    "reproducible": True,
    "eval_every": 99,
    "ckpt_every": 4,
    "keep_last": 9,
}


def plant(trainer: Any) -> None:
    """Multiply the loss of two steps by 8, so that their norm grows as well, and make another NaN."""

    def hook(_: Any, __: Any, loss: torch.Tensor) -> torch.Tensor:
        step = trainer.step + 1
        factor = 8.0 if step in SPIKES else float("nan") if step == NOT_FINITE else 1.0
        return loss * factor if torch.is_grad_enabled() and factor != 1.0 else loss

    trainer.train_step.model.register_forward_hook(hook)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same run in one process, on two DDP ranks, and on two FSDP ranks with a resume between the spikes."""
    folder = tmp_path_factory.mktemp("skipped")
    run_ranks(1, fit, settings_for(folder, "alone", parallel="none", **LONG), plant)
    run_ranks(2, fit, settings_for(folder, "ddp", parallel="ddp", **LONG), plant)
    fsdp = settings_for(folder, "fsdp", parallel="fsdp", **LONG)
    run_ranks(2, fit, {**fsdp, "stop_at_step": 14}, plant)
    run_ranks(2, fit, fsdp, plant)
    return {name: Run(folder / name) for name in ("alone", "ddp", "fsdp")}


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [record for record in run.records if record["kind"] == kind]


def test_every_layout_and_a_resume_skip_the_same_steps_and_have_the_same_bits(runs: dict[str, Run]) -> None:
    alone = runs["alone"]
    for run in runs.values():
        assert [event["step"] for event in events(run, "skipped")] == [11, 13, 15]
        assert run.digests() == alone.digests()
        assert run.values("train", "loss") == alone.values("train", "loss")
        assert [event["deviations"] for event in events(run, "skipped") if "deviations" in event] == [
            event["deviations"] for event in events(alone, "skipped") if "deviations" in event
        ]
    state = json.loads((runs["fsdp"].folder / "checkpoints/checkpoint-00000014/trainer_state.json").read_text())
    assert {name: len(values) for name, values in state["report"]["spike_window"].items()} == {
        "loss": 8,
        "grad_norm": 8,
    }


def test_a_skipped_step_is_recorded_with_its_reason_and_its_windows(runs: dict[str, Run]) -> None:
    for run in runs.values():
        spike, not_finite, _ = events(run, "skipped")
        losses = {record["step"]: record["loss"] for record in events(run, "train")}
        assert not_finite["reason"] == "not_finite"
        assert spike["reason"] in ("loss", "grad_norm")
        assert spike["loss"] == losses[11]
        assert spike["mean"] < spike[spike["reason"]]
        assert spike["deviations"] > 6
        assert len(spike["slots"]) == len(spike["windows"]) == 1, "of the micro-batch with the highest loss"
        slots = ", ".join(map(str, spike["slots"]))
        assert f"slots {slots}, windows starting at {spike['windows'][0]}" in spike["text"]
        assert "standard deviations above its mean" in spike["text"]


def test_steps_that_are_left_out_change_nothing_and_have_no_record(runs: dict[str, Run]) -> None:
    for run in runs.values():
        assert [record["step"] for record in events(run, "train")] == [*range(1, 5), *range(7, 17), 18]
        told = events(run, "left_out")
        assert [(event["step"], event["steps"]) for event in told] == [(5, [5, 6]), (17, [17, 17])]
    checkpoints = runs["alone"].folder / "checkpoints"
    names = sorted(path.name.removeprefix("checkpoint-000000") for path in checkpoints.iterdir())
    assert names == ["04", "08", "12", "16", "18"]


def test_left_out_steps_of_the_past_may_not_change(tmp_path: Path) -> None:
    """Steps 3 and 4 are left out by a run that saved step 2; later, another range before the checkpoint is refused."""
    settings = settings_for(tmp_path, "run", ckpt_every=99, eval_every=99, keep_last=9)
    run_ranks(1, fit, {**settings, "stop_at_step": 2})
    (end,) = run_ranks(1, fit, {**settings, "skip_steps": "3:4", "stop_at_step": 4})
    assert (end["state"], end["step"], end["skipped"]) == ("done", 4, 0)
    digests = []
    for step in (2, 4):
        manifest = json.loads((tmp_path / f"run/checkpoints/checkpoint-0000000{step}/manifest.json").read_text())
        digests.append(manifest["tensors"])
    assert digests[0] == digests[1], "weights and optimizer state are those from before"
    (message,) = run_ranks(1, fit_error, {**settings, "skip_steps": "1:1,3:3"})
    assert "skip_steps: of the steps 1 to 4, 3:4 left out in the checkpoint, 1:1,3:3 now" in message
    assert "allow = skip_steps" in message
    (end,) = run_ranks(1, fit, {**settings, "skip_steps": "3:4,6:6"})
    assert (end["state"], end["step"]) == ("done", 6)


def only_spikes(trainer: Any) -> None:
    trainer.train_step.model.register_forward_hook(
        lambda _, __, loss: loss * 1e3 if trainer.step >= 6 and torch.is_grad_enabled() else loss
    )


def test_spikes_in_a_row_stop_the_run_with_a_message_and_can_be_left_out(tmp_path: Path) -> None:
    changes = {"max_skipped_steps": 2, "skip_steps": None, "ckpt_every": 1, "total_steps": 8}
    settings = settings_for(tmp_path, "run", **LONG | changes)
    (message,) = run_ranks(1, fit_error, settings, only_spikes)
    assert message.startswith("DivergenceError: step 8: spike: ")
    assert "skipped steps in a row: 2 (2 spikes), max_skipped_steps: 2, so the run stops" in message
    assert "from before the skipped steps (from step 7 on) is " in message
    assert "checkpoint-00000006; the same command resumes from it" in message
    assert "leave their steps out with skip_steps = 7:8" in message
    (end,) = run_ranks(1, fit, {**settings, "skip_steps": "7:8"}, only_spikes)
    assert (end["state"], end["step"], end["skipped"]) == ("done", 8, 0)


def stop_at_the_spike(trainer: Any) -> None:
    plant(trainer)
    trainer.stop_requests.reason = lambda _: "a test" if trainer.step >= SPIKES[0] - 2 else ""


def test_a_run_that_is_stopped_at_a_spike_is_saved(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", **LONG | {"total_steps": 12, "skip_steps": None, "ckpt_every": 99})
    (end,) = run_ranks(1, fit, settings, stop_at_the_spike)
    assert (end["state"], end["step"], end["skipped"]) == ("preempted", 11, 1)
    assert Run(tmp_path / "run").checkpoint.name == "checkpoint-00000011"
