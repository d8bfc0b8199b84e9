"""Owns what is seen of a run while it trains: who is slow, whose memory is bad, where time goes, and that nobody waits.

Must not know how it is drawn; test_metrics reads the event files.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for, train
from tinytrain_dist.errors import TinytrainError
from tinytrain_dist.metrics.step_metrics import LAYER_NORMS_EVERY, PHASES, StepMetrics
from tinytrain_dist.parallel.replica_check import fingerprints, weighted_bit_sum
from tinytrain_dist.parallel.wrappers import unwrap

# ---------------------------------------------------------------- who is slow


def slow_down(trainer: Any, where: str) -> None:
    """Rank 1 sleeps in each forward pass of a block, or each time it reads a batch."""
    if trainer.context.rank != 1:
        return
    if where == "forward":
        unwrap(trainer.train_step.model).model.layers[0].mlp.register_forward_hook(lambda *_: time.sleep(0.05))
    else:
        read = trainer._read_rows
        trainer._read_rows = lambda step: (time.sleep(0.25), read(step))[1]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("mode", "where"), [("ddp", "forward"), ("fsdp", "forward"), ("ddp", "data")])
def test_a_slow_rank_is_named_once_although_all_steps_take_as_long(tmp_path: Path, mode: str, where: str) -> None:
    settings = settings_for(tmp_path, "run", parallel=mode, log_every=2, total_steps=10, eval_every=99, ckpt_every=99)
    run_ranks(2, fit, settings, functools.partial(slow_down, where=where))
    run = Run(tmp_path / "run")
    (text,) = run.values("slow", "text")
    assert text.startswith("rank 1 (")
    waiting = float(text.split(" s of it waiting")[0].split()[-1])
    assert (waiting > 0.05) == (where == "data")
    assert run.values("train", "slowest_rank")[1:] == [1.0] * 4
    assert all(ratio > 1.2 for ratio in run.values("train", "slowest_to_median")[1:])
    work = run.values("train", "work_seconds_by_rank")
    seconds = run.values("train", "step_seconds")
    assert all(0 < fast < slow <= step * 1.01 for (fast, slow), step in zip(work[1:-1], seconds[1:-1], strict=True))


def named(works: list[list[float]]) -> list[tuple[int, str]]:
    """(step, start of the sentence) for the work of all ranks at logged steps 1, 2, ..."""
    events: list[tuple[int, str]] = []
    log = SimpleNamespace(event=lambda step, kind, text: events.append((step, text[:6])))
    observer: Any = SimpleNamespace(log=log, suspect=None, named=None, hosts=["a", "b", "c", "d"])
    for step, seconds in enumerate(works, 1):
        StepMetrics._slowest(observer, step, [0.0] * len(seconds), seconds)
    return events


def test_a_slow_rank_is_named_at_the_second_time_and_again_only_after_it_recovered() -> None:
    fine, slow_1, slow_3 = [1.0, 1.1, 1.0, 1.0], [1.0, 1.3, 1.0, 1.0], [1.0, 1.0, 1.0, 1.5]
    assert named([slow_1, fine, slow_1, fine]) == []
    assert named([slow_1, slow_1, slow_1, slow_1]) == [(2, "rank 1")]
    assert named([slow_1, slow_1, fine, slow_1, slow_1]) == [(2, "rank 1"), (5, "rank 1")]
    assert named([slow_1, slow_3, slow_3]) == [(3, "rank 3")]
    assert named([[1.0, 1.25], [1.0, 1.25]]) == [(2, "rank 1")], "of two ranks the faster one is the measure"
    assert named([[1.0], [1.0]]) == []
    assert named([[0.0, 0.0], [0.0, 0.0]]) == []


# ---------------------------------------------------------------- whose memory is bad


def flip_a_bit(trainer: Any, rank: int) -> None:
    """During step 5 a bit of one weight of `rank` turns over; not the last one, which an update may round away."""

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
    assert f"than on rank {right} (" in messages[0]
    assert ("which of them is wrong is not known" in messages[0]) == (ranks != 3), "three can outvote one"
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
    assert [path.name[-1] for path in (run.folder / "checkpoints").iterdir()] == ["3"] * (step == 6)
    if "ckpt_async" in how:
        assert max(record["step"] for record in run.records) == 6, "it trained on although it knew"


def flipped_and_watched(settings: dict[str, Any]) -> tuple[str, int]:
    """What ends the run, and after which step; each step waits until the save before it has ended."""

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
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.multiprocess
def test_fingerprints_between_saves_are_compared_with_the_next_log_line(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", parallel="ddp", ckpt_every=99, total_steps=9, fingerprint_every=1)
    messages = run_ranks(2, flipped, settings, 1)
    assert "replicas differ" in messages[0]
    run = Run(tmp_path / "run")
    assert [record["step"] for record in run.records if record["kind"] == "replicas_differ"] == [5]
    assert not list((run.folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "of",
    [lambda tensor: fingerprints([tensor]).item(), lambda tensor: weighted_bit_sum(tensor, 1 << 16).item()],
    ids=["CPU", "GPU"],
)
def test_a_fingerprint_sees_every_bit_and_every_exchange(of: Callable[[torch.Tensor], int]) -> None:
    """Those of a CPU, and those of a GPU, whose sum can be taken anywhere."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(3, 100_000, generator=generator)  # more than one block of the sum
    expected = of(tensor)
    for place in (0, 1, 65_535, 65_536, 299_999):
        for bit in (0, 15, 31):
            tensor.view(-1).view(torch.int32)[place] ^= torch.tensor(1 << bit).to(torch.int32)
            assert of(tensor) != expected
            tensor.view(-1).view(torch.int32)[place] ^= torch.tensor(1 << bit).to(torch.int32)
    assert of(tensor) == expected
    assert of(tensor.flip(1)) != expected
    assert of(-tensor) != expected
    for size in (1, 4_096, 65_536, 131_072):
        blocks = tensor.view(-1)[: 2 * size].view(2, -1)
        assert of(blocks) != of(blocks.flip(0).contiguous()), f"blocks of {size} exchanged"


def test_fingerprints_are_of_what_is_in_a_tensor_not_of_how_it_lies() -> None:
    wide = torch.arange(12.0).view(3, 4)
    kinds = [wide[:, 1], torch.tensor(1.0), torch.zeros(5, dtype=torch.bool), torch.empty(0), wide.bfloat16()[1:, 1:]]
    alike = [kind.clone(memory_format=torch.contiguous_format) for kind in kinds]
    assert fingerprints(kinds).tolist() == fingerprints(alike).tolist()
    assert len(set(fingerprints(kinds).tolist())) == len(kinds)
    assert torch.stack([weighted_bit_sum(kind) for kind in alike]).shape == (len(kinds),)


# ---------------------------------------------------------------- nobody waits

READS = ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__")


def reads_of(settings: dict[str, Any]) -> list[tuple[int, str]]:
    """On a rank: (step under way, function) for each read of a tensor's value by our code in the loop."""
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
    quiet = {"val_data": None, "eval_every": 99, "ckpt_every": 99, "log_every": 4, "total_steps": 10}
    found = run_ranks(ranks, reads_of, settings_for(tmp_path, "run", parallel=mode, **quiet))
    for reads in found:
        # the numbers of step k when step k + 1 has been queued; the vote is a number of the CPU's own
        assert [step for step, where in reads if where == "HostCopy.read"] == [*range(2, 11)]
        assert [step for step, where in reads if where == "Vote.result"] == [0, *range(2, 11)]  # 0: whether to begin
        rest = [(step, where) for step, where in reads if where not in ("HostCopy.read", "Vote.result")]
        assert rest == [(5, "DistributedContext.all_gather_numbers"), (9, "DistributedContext.all_gather_numbers")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA to report synchronisations")
def test_no_step_synchronises_with_the_gpu(tmp_path: Path) -> None:
    quiet = {"val_data": None, "eval_every": 99, "ckpt_every": 99, "log_every": 4, "total_steps": 10}
    run_ranks(1, fit_without_synchronising, settings_for(tmp_path, "run", parallel="none", **quiet, device="cuda"))


def fit_without_synchronising(settings: dict[str, Any]) -> None:
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.training.trainer import Trainer

    trainer = Trainer.build(TrainingConfig(**settings), init_distributed("cuda"))
    plain = trainer.run_step

    def strict(reason: str) -> Any:
        torch.cuda.set_sync_debug_mode("error" if trainer.step >= 2 else "default")  # the first steps allocate
        return plain(reason)

    trainer.run_step = strict  # type: ignore[method-assign]
    finish = trainer._finish
    trainer._finish = lambda: (torch.cuda.set_sync_debug_mode("default"), finish())[1]  # type: ignore[method-assign]
    assert trainer.fit() == "done"


# ---------------------------------------------------------------- where time goes, and what the layers do


def with_tokenizer(folder: Path) -> Path:
    """A folder whose token files have a tokenizer: 53 words, w0 w1 ..."""
    from tokenizers import Tokenizer, models

    folder.mkdir(exist_ok=True)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(53)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


LONG = {"total_steps": LAYER_NORMS_EVERY, "ckpt_every": LAYER_NORMS_EVERY - 1, "eval_every": 5, "reproducible": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same run alone and on two ranks that share the model, and alone without texts."""
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
def test_phases_and_goodput_say_where_time_goes(runs: dict[str, Run]) -> None:
    for run in runs.values():
        phases = run.values("train", "step_time")
        assert all(list(phase) == list(PHASES) for phase in phases)
        assert all(phase["forward_backward"] > 0 and phase["optimizer"] > 0 for phase in phases)
        # the evaluation after step 5 ends before step 6 is logged, and no other lies between two log lines
        assert [step for step, phase in enumerate(phases, 1) if phase["evaluation"] > 0] == [6]
        goodput = run.values("train", "goodput")
        assert all(0 < share < 1 for share in goodput)
        assert goodput[-1] * (1 + 1e-9) >= sum(run.values("train", "step_seconds")) / 600
