"""Check what a run does besides computing: skip steps, stop, resume, refuse, and write files."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import launch_training, run_ranks, training_process
from tests.helpers.training import Run, fit, settings_for, train
from tinytrain_dist.config.loading import load_config
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import TinytrainError

pytestmark = pytest.mark.multiprocess


def fit_error(settings: dict[str, Any], prepare: Any = None) -> str:
    """On a rank: return the message of the error that ends the run; its type must be one of this project."""
    try:
        fit(settings, prepare)
    except TinytrainError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def poison(trainer: Any, steps: range) -> None:
    """Make the loss of rank 1's first micro-step not a number in some steps."""

    def hook(_: Any, __: Any, loss: torch.Tensor) -> torch.Tensor:
        bad = trainer.context.rank == 1 and trainer.step in steps and torch.is_grad_enabled()
        return loss * float("nan") if bad else loss

    trainer.train_step.model.register_forward_hook(hook)


def test_non_finite_step_is_skipped_by_all_ranks(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", parallel="fsdp", micro_batch_size=4)
    ends = run_ranks(2, fit, settings, functools.partial(poison, steps=range(2, 3)))
    assert [end["skipped"] for end in ends] == [1, 1]
    run = Run(tmp_path / "run")
    (text,) = run.values("skipped", "text")
    assert "rank(s) [1]" in text
    assert re.search(r", slots \d+(, \d+)*, windows starting at \S+:\d+", text)
    assert all(tensor.isfinite().all() for tensor in run.weights().values())
    assert len(run.values("train", "loss")) == 6


def test_skipped_step_changes_nothing(tmp_path: Path) -> None:
    """Steps 3 and 4 are skipped, so weights and moments after step 4, a last one, are those after step 2."""
    settings = settings_for(tmp_path, "run", parallel="ddp", ckpt_every=2, keep_last=9, eval_every=99)
    for end in ({"stop_at_step": 4}, {}):
        run_ranks(2, fit, settings | end, functools.partial(poison, steps=range(2, 4)))
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    tensors = [json.loads((path / "manifest.json").read_text())["tensors"] for path in checkpoints]
    assert [path.name[-1] for path in checkpoints] == ["2", "4", "6"]
    assert tensors[0] == tensors[1] != tensors[2]


def test_too_many_skipped_steps_stop_the_run(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", parallel="ddp", max_skipped_steps=2)
    messages = run_ranks(2, fit_error, settings, functools.partial(poison, steps=range(3, 99)))
    assert messages[0] == messages[1]
    assert messages[0].startswith("DivergenceError: step 5: not finite")
    assert "max_skipped_steps" in messages[0]
    assert Run(tmp_path / "run").checkpoint.name == "checkpoint-00000003"


def spoil_weights(trainer: Any) -> None:
    with torch.no_grad():
        next(iter(trainer.train_step.model.parameters()))[0] = float("inf")
    trainer.save()
    trainer.saver.collect(trainer.step, wait=True)


def test_non_finite_state_is_never_saved(tmp_path: Path) -> None:
    message = run_ranks(1, spoiled_save, settings_for(tmp_path, "run"))[0]
    assert "model.embed_tokens.weight: is not finite" in message
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def spoiled_save(settings: dict[str, Any]) -> str:
    return fit_error(settings, spoil_weights)


def differ(trainer: Any) -> None:
    from tinytrain_dist.checkpoint.state_collection import model_tensors
    from tinytrain_dist.parallel.replica_check import check_replicas

    if trainer.context.rank == 1:
        with torch.no_grad():
            trainer.train_step.model.module.model.norm.weight[3] += 2**-20
    check_replicas(model_tensors(trainer.train_step.model).items(), trainer.context)


def test_replicas_that_differ_are_named(tmp_path: Path) -> None:
    messages = run_ranks(2, fit_error, settings_for(tmp_path, "run", parallel="ddp"), differ)
    assert messages[0] == messages[1]
    assert "model.norm.weight on rank 1" in messages[0]


def same_slots(trainer: Any) -> None:
    share = replace(trainer.train_step.share(0), slots=(0, 1, 2, 3))
    trainer.train_step.share = lambda _: share
    from tinytrain_dist.training import build

    build._check_ranks(trainer.train_step, trainer.data, trainer.step)


def test_ranks_that_draw_the_same_slots_are_refused(tmp_path: Path) -> None:
    messages = run_ranks(2, fit_error, settings_for(tmp_path, "run", parallel="ddp"), same_slots)
    assert "ranks draw slots [0, 0, 1, 1" in messages[0]


def signal_self(trainer: Any) -> None:
    """Send a signal to rank 1 only, during step 3 (in the third of its four forward passes)."""
    from tinytrain_dist.reliability import stop_requests

    stop_requests.install_signal_handlers()

    def hook(*_: Any) -> None:
        if trainer.context.rank == 1 and trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.train_step.model.register_forward_pre_hook(hook)


def test_one_signalled_rank_stops_all_after_the_same_step_and_nothing_is_lost(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", parallel="ddp", ckpt_every=100)
    ends = run_ranks(2, fit, settings, signal_self)
    assert ends[0] == ends[1]
    assert ends[0]["state"] == "preempted"
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state == {"state": "preempted", "step": ends[0]["step"], "reason": "SIGTERM"}
    assert Run(tmp_path / "run").checkpoint.name == f"checkpoint-{state['step']:08d}"
    run_ranks(2, fit, settings)
    expected = train(tmp_path, "whole", 2, parallel="ddp", ckpt_every=100)
    assert Run(tmp_path / "run").digests() == expected.digests()
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "done"


@pytest.mark.parametrize("trigger", ["file", "time_limit"])
def test_stop_file_and_time_limit_stop_with_a_checkpoint(tmp_path: Path, trigger: str) -> None:
    limit = 1e-6 if trigger == "time_limit" else None
    settings = settings_for(tmp_path, "run", parallel="ddp", ckpt_every=100, time_limit=limit)
    if trigger == "file":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "stop").touch()
    ends = run_ranks(2, fit, settings)
    assert {end["state"] for end in ends} == {"preempted"}
    assert 1 <= ends[0]["step"] < 6
    assert Run(tmp_path / "run").checkpoint.name.endswith(str(ends[0]["step"]))
    assert (
        f"preempted ({'stop file' if trigger == 'file' else 'time_limit'}"
        in Run(tmp_path / "run").values("stopped", "text")[0]
    )
    assert not (tmp_path / "run" / "stop").exists(), "obeyed once"


def test_resume_refuses_what_makes_it_another_run_and_names_both_values(tmp_path: Path) -> None:
    train(tmp_path, "run", 1, stop_at_step=3)
    other = settings_for(tmp_path, "run", seed=5, d_ff=32)
    message = run_ranks(1, fit_error, other)[0]
    assert "seed: 0 in the checkpoint, 5 now" in message
    assert "d_ff: 24 in the checkpoint, 32 now" in message
    changed = tmp_path / "other"
    changed.mkdir()
    from tests.helpers.training import write_tokens

    data = write_tokens(changed, count=4001)
    assert "train_data" in run_ranks(1, fit_error, {**settings_for(tmp_path, "run"), **data})[0]


def test_resume_applies_and_reports_a_changed_learning_rate(tmp_path: Path) -> None:
    train(tmp_path, "run", 1, stop_at_step=3)
    run = train(tmp_path, "run", 1, lr_max=0.02)
    (text,) = run.values("resumed", "text")
    assert "lr_max: 0.01 -> 0.02" in text
    assert run.values("train", "lr")[3] > 0.01


def test_resume_never_and_missing_paths_are_errors(tmp_path: Path) -> None:
    train(tmp_path, "run", 1, stop_at_step=3)
    assert "resume = never" in run_ranks(1, fit_error, settings_for(tmp_path, "run", resume="never"))[0]
    gone = str(tmp_path / "gone")
    for name in ("resume", "ckpt_path_to_resume"):
        message = run_ranks(2, fit_error, settings_for(tmp_path, "new", parallel="ddp", **{name: gone}))[1]
        assert message.startswith(f"CheckpointError: resume = {gone}")
    assert not (tmp_path / "new").exists()


def test_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(tmp_path: Path) -> None:
    expected = train(tmp_path, "whole", 1)
    shutil.copytree(expected.folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    weights = next(run.checkpoint.glob("model-*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    again = train(tmp_path, "run", 2, parallel="fsdp")
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-00000006.damaged").is_dir()
    assert "checkpoint-00000003" in again.values("resumed", "text")[0]
    torch.testing.assert_close(again.weights(), expected.weights(), rtol=1e-4, atol=1e-6)
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("checkpoint-????????"):
        (checkpoint / "manifest.json").unlink()
    assert "none of 2 checkpoint(s) is valid" in run_ranks(1, fit_error, settings_for(tmp_path, "run"))[0]


def test_retention_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    run = train(tmp_path, "run", 1, total_steps=7, ckpt_every=1, keep_last=2, keep_every=3)
    names = sorted(path.name for path in (run.folder / "checkpoints").glob("checkpoint-*"))
    assert names == [f"checkpoint-{step:08d}" for step in (3, 6, 7)]


def test_the_run_folder_records_what_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    settings = settings_for(tmp_path, "run", parallel="ddp")
    run_ranks(2, fit, settings)
    config = load_config(tmp_path / "run" / "config.toml")
    assert (config.vocab_size, config.total_steps, config.lr_max) == (53, 6, 0.01)
    environment = (tmp_path / "run" / "environment.json").read_text()
    assert len(json.loads(environment)["ranks"]) == 2
    assert "hunter2" not in environment


def test_checkpoint_is_a_hugging_face_model_and_can_be_started_from(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = train(tmp_path, "run", 2, parallel="fsdp", tie_embeddings=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run.checkpoint, local_files_only=True)
    ids = torch.arange(12).reshape(1, 12)
    ours = run_ranks(1, logits_of, str(run.checkpoint), ids)[0]
    torch.testing.assert_close(ours, theirs(ids).logits.detach(), rtol=1e-4, atol=1e-4)
    started = settings_for(
        tmp_path, "second", tie_embeddings=True, init_from=str(run.checkpoint), lr_max=1e-12, lr_min=0.0
    )
    second = Run(tmp_path / "second") if run_ranks(1, fit, started) else None
    assert second is not None
    torch.testing.assert_close(second.weights(), run.weights(), rtol=1e-5, atol=1e-6)
    message = run_ranks(1, fit_error, {**started, "target_dir": str(tmp_path / "third"), "num_layers": 1})[0]
    assert "num_layers: is 1, but" in message


def logits_of(checkpoint: str, ids: torch.Tensor) -> torch.Tensor:
    from tinytrain_dist.checkpoint.safetensors_io import TensorReader
    from tinytrain_dist.checkpoint.sharded_io import load_tensors
    from tinytrain_dist.checkpoint.state_collection import model_tensors
    from tinytrain_dist.model.transformer import TransformerLM

    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    model = TransformerLM(TrainingConfig.from_dict(state["config"]))
    load_tensors(TensorReader(Path(checkpoint), "model"), model_tensors(model))
    with torch.no_grad():
        return model(ids)


def test_a_killed_run_continues_from_its_last_checkpoint(tmp_path: Path) -> None:
    """Start the training command, kill all ranks with SIGKILL, and start the same command again."""
    expected = train(tmp_path, "whole", 2, parallel="ddp", total_steps=40, ckpt_every=10, log_every=5)
    settings = settings_for(tmp_path, "run", parallel="ddp", total_steps=40, ckpt_every=10, log_every=5)
    config = tmp_path / "run.toml"
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    with training_process([str(config)], 2, tmp_path) as running:
        running.wait_for_output("saved")
        for pid in running.worker_pids():
            os.kill(pid, signal.SIGKILL)
        running.wait(60)
    done = launch_training([str(config), "--log-every", "5"], 2, tmp_path)
    assert done.returncode == 0, done.stdout
    run = Run(tmp_path / "run")
    assert run.digests() == expected.digests()
    assert run.values("train", "loss") == expected.values("train", "loss")


def test_wrong_settings_are_reported_without_a_traceback(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('weigth_decay = 0.1\ntrain_data = "x.npy"\n[model]\nbatch_size = 3\n')
    done = launch_training([str(config), "--num-heads", "5"], 2, tmp_path)
    assert done.returncode != 0
    assert done.stdout.count("weigth_decay: unknown setting; did you mean weight_decay?") == 1
    assert "batch_size: is under [model]; move it to [data]" in done.stdout
    assert "d_model: 512 (the default) is not a multiple of num_heads 5" in done.stdout
    assert 'tinytrain_dist/config.py", line' not in done.stdout
    missing = launch_training(["--train-data", "x.npy", "--vocab-size", "9"], 1, tmp_path)
    assert "x.npy: no such token file" in missing.stdout
    assert 'tinytrain_dist/data.py", line' not in missing.stdout


def compile_again(trainer: Any) -> None:
    """Make steps 1 and 5 compile new graphs."""
    from tinytrain_dist.training import trainer as module

    module.compiled_graph_count = lambda: (trainer.step >= 1) + (trainer.step >= 5)


def test_a_graph_that_is_compiled_late_is_reported(tmp_path: Path) -> None:
    run_ranks(1, fit, settings_for(tmp_path, "run"), compile_again)
    told = [record for record in Run(tmp_path / "run").records if record["kind"] == "recompiled"]
    assert [record["step"] for record in told] == [5]
    assert "compiled 1 graph(s) again" in told[0]["text"]


def watch_garbage(trainer: Any) -> None:
    from tinytrain_dist.training import trainer as module

    plain, collected = trainer.run_step, []
    module.GARBAGE_EVERY = 2

    def step() -> Any:
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 1000
        return plain()

    gc.collect()  # or Python may do so by itself before the first step
    gc.callbacks.append(lambda phase, _: collected.append(trainer.step) if phase == "stop" else None)
    trainer.run_step, trainer.save = step, lambda: None
    trainer.saver.saved_step, trainer.collected = 6, collected


def garbage(settings: dict[str, Any]) -> tuple[list[int], bool, int]:
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.training.trainer import Trainer

    gc.unfreeze()  # what the server of the ranks has frozen
    trainer = Trainer.build(TrainingConfig(**settings), init_distributed("cpu"))
    watch_garbage(trainer)
    trainer.fit()
    return trainer.collected, gc.isenabled(), gc.get_freeze_count()


def test_garbage_is_collected_on_schedule_and_never_between(tmp_path: Path) -> None:
    for collected, enabled, frozen in run_ranks(2, garbage, settings_for(tmp_path, "run")):
        assert collected[:4] == [0, 2, 4, 6]
        assert (enabled, frozen) == (True, 0), "a library's user gets the collector back"
