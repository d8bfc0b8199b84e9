"""Check runs that diverge: which checkpoints are saved, kept and named after skipped updates or jumps of the loss."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for
from tests.training.test_trainer import fit_error, poison

pytestmark = pytest.mark.multiprocess

SAVES = {"total_steps": 12, "ckpt_every": 1, "keep_last": 1, "eval_every": 99, "max_skipped_steps": 3}


def names(folder: Path) -> list[str]:
    checkpoints = (folder / "run" / "checkpoints").glob("checkpoint-*")
    return sorted(path.name.removeprefix("checkpoint-") for path in checkpoints)


def advised_settings(message: str) -> dict[str, Any]:
    """Return the settings that a message gives as an example."""
    (text,) = re.findall(r"for example ([^;]*);", message)
    pairs = [pair.split(" = ") for pair in text.split(", ")]
    return {name: float(value) if name.startswith("lr") else value for name, value in pairs}


def resumed_from(folder: Path) -> str:
    return str(Run(folder / "run").values("resumed", "text")[-1]).partition(";")[0]


@pytest.mark.parametrize("resume", ["auto", "checkpoint-00000002"])
def test_nothing_is_saved_in_a_streak_and_the_advice_works(tmp_path: Path, resume: str) -> None:
    settings = settings_for(tmp_path, "run", parallel="ddp", **SAVES)
    if resume != "auto":  # `resume` names a checkpoint of the run itself, and a later one lies beside it afterwards
        run_ranks(1, fit, {**settings, "stop_at_step": 2})
        settings["resume"] = str(tmp_path / "run" / "checkpoints" / resume)
    messages = run_ranks(2, fit_error, settings, functools.partial(poison, steps=range(3, 99)))
    assert messages[0] == messages[1]
    assert "skipped steps in a row: 3 (3 not finite), max_skipped_steps: 3" in messages[0]
    kept = tmp_path / "run" / "checkpoints" / "checkpoint-00000003"
    assert f"The newest checkpoint from before the skipped steps (from step 4 on) is {kept};" in messages[0]
    assert names(tmp_path)[-1] == "00000003"
    (end,) = run_ranks(1, fit, settings | advised_settings(messages[0]))
    assert (end["state"], end["step"]) == ("done", 12)
    assert resumed_from(tmp_path) == f"resumed from {kept}"


def test_weights_that_blew_up_but_are_finite_are_not_returned_to(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", **SAVES | {"max_skipped_steps": 10})
    run_ranks(1, fit, {**settings, "stop_at_step": 4})
    (message,) = run_ranks(1, fit_error, {**settings, "lr_max": 300_000.0, "grad_clip_norm": 1e30})
    assert re.match(r"DivergenceError: step 12: the run ends here, but its last [67] update\(s\) were skipped", message)
    assert f"is {tmp_path}/run/checkpoints/checkpoint-00000004;" in message
    moved = names(tmp_path)[1:]
    assert moved
    assert all(name.endswith(".diverged") for name in moved)
    assert all(name in message for name in moved)
    (end,) = run_ranks(1, fit, settings)
    assert (end["state"], end["skipped"]) == ("done", 0)
    assert "checkpoint-00000004" in resumed_from(tmp_path)


def blow_up(trainer: Any, factors: dict[int, float]) -> None:
    """Multiply the weights of the head before the given steps."""
    from tinytrain_dist.distributed.dtensor import local_tensor
    from tinytrain_dist.parallel.wrappers import unwrap

    plain = trainer.run_step

    def run_step() -> Any:
        if trainer.step in factors:
            with torch.no_grad():
                local_tensor(unwrap(trainer.train_step.model).lm_head.weight).mul_(factors[trainer.step])
        return plain()

    trainer.run_step = run_step


def test_a_jump_of_the_loss_before_the_streak_leads_back_before_the_jump(tmp_path: Path) -> None:
    """The loss jumps at step 5; the run is stopped, continues on one rank, and is not finite from step 9 on."""
    settings = settings_for(tmp_path, "run", **SAVES)
    jump = functools.partial(blow_up, factors={4: 1000.0})
    run_ranks(2, fit, {**settings, "parallel": "fsdp", "stop_at_step": 6}, jump)
    losses = Run(tmp_path / "run").values("train", "loss")
    assert losses[4] > 10 * losses[3]
    (message,) = run_ranks(1, fit_error, settings, functools.partial(blow_up, factors={8: 1e38}))
    assert re.search(r"from before the jump of the loss \(above \d\.\d+ at step 5\) is ", message)
    assert f"{tmp_path}/run/checkpoints/checkpoint-00000003;" in message
    assert names(tmp_path)[0] == "00000003"
    assert all(name.endswith(".diverged") for name in names(tmp_path)[1:])
    (end,) = run_ranks(1, fit, settings | advised_settings(message))
    assert (end["state"], end["step"]) == ("done", 12)
    assert "checkpoint-00000003" in resumed_from(tmp_path)
    assert max(Run(tmp_path / "run").values("train", "loss")) < losses[4] / 10


def stop_in_streak(trainer: Any) -> None:
    poison(trainer, range(3, 99))
    trainer.stop_requests.reason = lambda _: "a test" if trainer.step >= 5 else ""


def test_a_stop_in_a_streak_saves_nothing(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", parallel="ddp", **SAVES | {"max_skipped_steps": 9})
    ends = run_ranks(2, fit, settings, stop_in_streak)
    assert {end["state"] for end in ends} == {"preempted"}
    assert names(tmp_path)[-1] == "00000003"
    (end,) = run_ranks(1, fit, settings)
    assert (end["state"], end["step"]) == ("done", 12)
