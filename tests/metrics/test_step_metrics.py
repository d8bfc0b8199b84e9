"""Check what is recorded of a run while it trains: slow ranks, phases, norms, and that no step waits for the device.

Must not know how it is drawn; test_tensorboard.py reads the event files.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for, train
from tinytrain_dist.data.batches import Prefetcher
from tinytrain_dist.metrics.phase_timer import STEP_PHASES
from tinytrain_dist.metrics.step_metrics import LAYER_NORMS_EVERY, Interval, RankTimes, StepResult, due
from tinytrain_dist.parallel.wrappers import unwrap


def slow_down(trainer: Any, where: str) -> None:
    """Make rank 1 sleep in each forward pass of a block, or each time it waits for a batch."""
    if trainer.context.rank != 1:
        return
    if where == "forward":
        unwrap(trainer.train_step.model).model.layers[0].mlp.register_forward_hook(lambda *_: time.sleep(0.05))
    else:
        # not the reading, which several threads do ahead of the steps
        get = Prefetcher.get
        Prefetcher.get = lambda self, step: (time.sleep(0.25), get(self, step))[1]  # type: ignore[method-assign]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("mode", "where"), [("ddp", "forward"), ("fsdp", "forward"), ("ddp", "data")])
def test_a_slow_rank_is_named_once_although_all_steps_take_as_long(tmp_path: Path, mode: str, where: str) -> None:
    settings = settings_for(tmp_path, "run", parallel=mode, log_every=2, total_steps=10, eval_every=99, ckpt_every=99)
    run_ranks(2, fit, settings, functools.partial(slow_down, where=where))
    run = Run(tmp_path / "run")
    (text,) = run.values("slow", "text")
    assert text.startswith("rank 1 (")
    waiting = float(text.split("waits for data for ")[1].split()[0])
    assert (waiting > 0.05) == (where == "data")
    assert run.values("train", "slowest_rank")[1:] == [1.0] * 4
    assert all(ratio > 1.2 for ratio in run.values("train", "slowest_to_median")[1:])
    work = run.values("train", "work_seconds_by_rank")
    seconds = run.values("train", "step_seconds")
    assert all(0 < fast < slow <= step * 1.01 for (fast, slow), step in zip(work[1:-1], seconds[1:-1], strict=True))


def slow_forward(trainer: Any) -> None:
    unwrap(trainer.train_step.model).model.layers[0].mlp.register_forward_hook(lambda *_: time.sleep(0.05))


@pytest.mark.multiprocess
def test_a_rank_with_more_micro_batches_than_another_is_not_slow(tmp_path: Path) -> None:
    # rank 0 has one of three micro-batches until step 3, and then two of four
    growing = {"batch_size": 4, "batch_size_warmup": ("0: 3", "3: 4")}
    settings = settings_for(tmp_path, "run", parallel="ddp", eval_every=99, ckpt_every=99, **growing)
    run_ranks(2, fit, settings, slow_forward)
    run = Run(tmp_path / "run")
    assert run.values("slow", "text") == []
    assert all(min(work) > 0.1 for work in run.values("train", "work_seconds_by_rank"))


READS = ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__")


def reads_of(settings: dict[str, Any]) -> list[tuple[int, str]]:
    """On a rank: return (step in progress, function) for each read of a tensor's value by this project in the loop."""
    found: list[tuple[int, str]] = []
    trainers: list[Any] = []

    def counted(plain: Any) -> Any:
        def read(self: Any, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            if trainers and "/torch/" not in frame.f_code.co_filename:
                found.append((trainers[0].step, frame.f_code.co_qualname))
            return plain(self, *args, **kwargs)

        return read

    def prepare(trainer: Any) -> None:
        trainers.append(trainer)
        finish = trainer._finish
        trainer._finish = lambda: (trainers.clear(), finish())[1]

    for name in READS:
        setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    fit(settings, prepare)
    return found


@pytest.mark.multiprocess
@pytest.mark.parametrize(("mode", "ranks"), [("none", 1), ("ddp", 2), ("fsdp", 2)])
def test_between_log_lines_only_finished_copies_are_read_and_one_step_late(
    tmp_path: Path, mode: str, ranks: int
) -> None:
    quiet = {"val_data": None, "eval_every": 99, "ckpt_every": 99, "log_every": 4, "total_steps": 10, "skip_spikes": 6}
    found = run_ranks(ranks, reads_of, settings_for(tmp_path, "run", parallel=mode, **quiet))
    for reads in found:
        # the numbers of step k are read when step k + 1 has been queued; votes on a CPU are plain CPU numbers
        assert [step for step, where in reads if where == "HostCopy.read"] == [*range(2, 11)]
        assert [step for step, where in reads if where == "Vote.results"] == [
            0,
            *range(2, 11),
        ]  # step 0: the decision to begin
        rest = [(step, where) for step, where in reads if where not in ("HostCopy.read", "Vote.results")]
        assert rest == [(5, "DistributedContext.all_gather_numbers"), (9, "DistributedContext.all_gather_numbers")]


def with_tokenizer(folder: Path) -> Path:
    """Make a folder with token files and a tokenizer of 53 words, w0 w1 ..."""
    from tokenizers import Tokenizer, models

    folder.mkdir(exist_ok=True)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(53)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


LONG = {"total_steps": LAYER_NORMS_EVERY, "ckpt_every": LAYER_NORMS_EVERY - 1, "eval_every": 5, "reproducible": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same run in one process, on two FSDP ranks, and in one process without samples."""
    folder = with_tokenizer(tmp_path_factory.mktemp("observed"))
    return {
        "alone": train(folder, "alone", 1, parallel="none", sample_tokens=4, **LONG),
        "fsdp": train(folder, "fsdp", 2, parallel="fsdp", sample_tokens=4, **LONG),
        "silent": train(folder, "silent", 1, parallel="none", sample_tokens=0, **LONG),
    }


@pytest.mark.multiprocess
def test_the_model_writes_the_same_texts_in_every_mode_and_trains_as_without(runs: dict[str, Run]) -> None:
    texts = runs["alone"].values("samples", "texts")
    assert [record["step"] for record in runs["alone"].records if record["kind"] == "samples"] == [5, 10]
    assert texts == runs["fsdp"].values("samples", "texts")
    assert texts[0] != texts[1]
    for beginning, continuation in texts[0]:
        assert len(beginning.split()) == 6, "half of context_len"
        assert len(continuation.split()) == 4, "sample_tokens"
    assert [beginning for beginning, _ in texts[0]] == [beginning for beginning, _ in texts[1]]
    assert runs["silent"].values("samples", "texts") == []
    assert runs["alone"].digests() == runs["fsdp"].digests() == runs["silent"].digests()
    assert runs["alone"].values("train", "loss") == runs["silent"].values("train", "loss")


@pytest.mark.multiprocess
def test_norms_by_layer_add_up_to_the_norm_and_are_those_of_the_weights(runs: dict[str, Run]) -> None:
    found = []
    for run in (runs["alone"], runs["fsdp"]):
        (record,) = [record for record in run.records if "grad_norm_by_layer" in record]
        assert record["step"] == LAYER_NORMS_EVERY
        grads, weights = record["grad_norm_by_layer"], record["weight_norm_by_layer"]
        assert list(grads) == list(weights) == ["embed_tokens", "layers.0", "layers.1", "norm", "lm_head"]
        assert math.hypot(*grads.values()) == pytest.approx(record["grad_norm"], rel=1e-6)
        found.append({**grads, **{f"w {name}": value for name, value in weights.items()}})
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    before = min(runs["alone"].folder.glob("checkpoints/checkpoint-????????"))
    from tinytrain_dist.checkpoint.safetensors_io import TensorReader

    reader = TensorReader(before, "model")
    first = [reader.read(name).norm().item() for name in reader.files if "layers.1." in name]
    assert math.hypot(*first) == pytest.approx(found[0]["w layers.1"], rel=1e-6)


@pytest.mark.multiprocess
def test_phases_and_goodput_show_where_time_is_spent(runs: dict[str, Run]) -> None:
    for run in runs.values():
        phases = run.values("train", "step_time")
        assert all(list(phase) == list(STEP_PHASES) for phase in phases)
        assert all(phase["forward_backward"] > 0 and phase["optimizer"] > 0 for phase in phases)
        # the evaluation after step 5 ends before step 6 is logged, and no other lies between two log lines
        assert [step for step, phase in enumerate(phases, 1) if phase["evaluation"] > 0] == [6]
        goodput = run.values("train", "goodput")
        assert all(0 < share < 1 for share in goodput)
        assert goodput[-1] * (1 + 1e-9) >= sum(run.values("train", "step_seconds")) / 600


def test_the_times_of_a_rank_survive_the_exchange() -> None:
    times = RankTimes(1.0, 0.25, 0.5, 2.0, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
    assert RankTimes.from_row(times.to_row()) == times
    assert times.work_seconds == 0.75


def test_an_interval_sums_its_steps_and_counts_those_that_were_not_skipped() -> None:
    interval = Interval()
    for skipped in (False, True):
        result: Any = StepResult(1, 0.1, None, None, None, 0.5, [], {"data": 1.0, "optimizer": 2.0}, None)  # type: ignore[arg-type]
        interval.add(result, forward_seconds=0.25, skipped=skipped)
    assert interval == Interval(1.0, 0.5, 1, {"data": 2.0, "optimizer": 4.0})


def test_something_is_due_after_every_so_many_steps() -> None:
    assert [step for step in range(1, 10) if due(step, 3)] == [3, 6, 9]
