"""Check the equalities between runs: modes, ranks, accumulation, interruption, native and reproducible."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, fit_all, settings_for, train
from tinytrain_dist.errors import CheckpointError

pytestmark = pytest.mark.multiprocess

TIED = {"tie_embeddings": True}
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("ddp2", 2, {"parallel": "ddp"}),
    ("fsdp2", 2, {"parallel": "fsdp"}),
    ("fsdp1", 1, {"parallel": "fsdp"}),
    ("ddp4", 4, {"parallel": "ddp"}),
    ("fsdp4", 4, {"parallel": "fsdp"}),
    ("hsdp2x2", 4, {"parallel": "hsdp", "dp_shard": 2}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equivalence")


references: dict[tuple[Any, ...], Run] = {}


def one_process(folder: Path, **overrides: Any) -> Run:
    key = (folder, *sorted(overrides.items()))
    if key not in references:
        references[key] = train(folder, f"one{len(references)}", 1, parallel="none", **overrides)
    return references[key]


def assert_close(run: Run, expected: Run) -> None:
    torch.testing.assert_close(run.weights(), expected.weights(), rtol=2e-4, atol=2e-6)
    for name in ("loss", "grad_norm"):
        assert run.values("train", name) == pytest.approx(expected.values("train", name), rel=1e-5)
    assert run.values("eval", "loss") == pytest.approx(expected.values("eval", "loss"), rel=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("name", "ranks", "mode"), LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
def test_native_modes_agree_with_one_process(
    folder: Path, name: str, ranks: int, mode: dict[str, Any], tied: bool
) -> None:
    run = train(folder, f"native-{name}-{tied}", ranks, tie_embeddings=tied, **mode)
    assert_close(run, one_process(folder, tie_embeddings=tied))
    losses = run.values("train", "loss")
    assert losses[-1] < losses[0], "the model must learn, or equal losses say nothing"


@pytest.mark.parametrize("micro", [2, 4, 8])
def test_accumulation_is_the_same_batch(folder: Path, micro: int) -> None:
    assert_close(train(folder, f"micro{micro}", 1, parallel="none", micro_batch_size=micro), one_process(folder))


BITS = [
    pytest.param({}, id="fp32-untied"),
    pytest.param({**TIED, "qk_norm": True}, id="fp32-tied-qk_norm"),
    pytest.param({"precision": "bf16", "micro_batch_size": 2}, id="bf16"),
    pytest.param({"precision": "bf16", **TIED, "loss_chunk_tokens": 5}, id="bf16-tied-chunked"),
    pytest.param({"activation_checkpointing": "block"}, id="checkpointing"),
]


@pytest.mark.parametrize("variant", BITS)
def test_reproducible_runs_have_the_same_bits_on_any_layout(folder: Path, variant: dict[str, Any]) -> None:
    variant = {"reproducible": True, **variant}
    expected = one_process(folder, **variant)
    norms = expected.values("train", "grad_norm")
    assert min(norms) < 0.75 < max(norms), "clipping must be active in some steps only"
    for name, ranks, mode in LAYOUTS:
        run = train(folder, f"bits-{name}", ranks, **mode, **variant)
        assert run.digests() == expected.digests(), name
        for kind, value in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss")):
            assert run.values(kind, value) == expected.values(kind, value), (name, value)
        shutil.rmtree(run.folder)


# What depends on the shares of the ranks: a growing batch, sources, z-loss, Muon, the average, and what is measured.
EVERYTHING: dict[str, Any] = {
    "optimizer": "muon",
    "ema_decay": 0.9,
    "z_loss": 1e-3,
    "stability_every": 2,
    # 16 micro-batches on 3 ranks: rank 1 sends three sums of blocks, and the last backward of rank 2 adds two
    "batch_size": 16,
    "batch_size_warmup": ("0: 4", "2: 8", "4: 16"),
    "train_weights": (3.0, 1.0),
    "eval_steps": 2,
}
BF16 = {"precision": "bf16", **TIED, "loss_chunk_tokens": 5}
UNEVEN: dict[int, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {
    3: [
        ("ddp3", {"parallel": "ddp"}, {}),
        ("fsdp3", {"parallel": "fsdp"}, {}),
        ("ddp3-everything", {"parallel": "ddp", "fingerprint_every": 2}, EVERYTHING),
        ("fsdp3-everything", {"parallel": "fsdp"}, EVERYTHING),
    ],
    5: [
        ("ddp5-bf16", {"parallel": "ddp"}, BF16),
        ("fsdp5-bf16", {"parallel": "fsdp"}, BF16),
    ],
    6: [
        ("hsdp2x3", {"parallel": "hsdp", "dp_shard": 3}, {}),
        ("hsdp3x2", {"parallel": "hsdp", "dp_shard": 2}, {}),
        ("hsdp3x2-bf16", {"parallel": "hsdp", "dp_shard": 2}, BF16),
    ],
}


def sources(folder: Path, variant: dict[str, Any]) -> dict[str, Any]:
    """Return a variant with the files of its sources, which must exist."""
    settings_for(folder, "any")
    files = {"train_data": (str(folder / "train.npy"), str(folder / "val.npy"))} if "train_weights" in variant else {}
    return {**variant, **files}


@pytest.mark.parametrize("ranks", UNEVEN)
def test_uneven_shares_have_the_bits_of_one_process(folder: Path, ranks: int) -> None:
    """8 micro-batches on 3, 5 and 6 ranks, reproducible and native."""
    runs = []
    for name, mode, variant in UNEVEN[ranks]:
        for exact in (True, False):
            overrides = {**mode, **sources(folder, variant), "reproducible": exact}
            runs.append(settings_for(folder, f"{name}-{exact}", **overrides))
    run_ranks(ranks, fit_all, runs)
    for name, _, variant in UNEVEN[ranks]:
        expected = one_process(folder, **sources(folder, {**variant, "reproducible": True}))
        run = Run(folder / f"{name}-True")
        assert run.digests() == expected.digests(), name
        names = ["loss", "grad_norm", "tokens"]
        if variant is EVERYTHING:
            names += ["batch_size", "source_share", "source_loss", "z_loss"]
            measured = ["stability", "activation_rms_by_layer", "attention_logit_max_by_layer"]
            for group in measured:
                found = [record[group] for record in run.records if group in record]
                assert found == [record[group] for record in expected.records if group in record], (name, group)
                assert found
        for value in names:
            assert run.values("train", value) == expected.values("train", value), (name, value)
        assert run.values("eval", "loss") == expected.values("eval", "loss"), name
        native = Run(folder / f"{name}-False")
        for kind in ("train", "eval"):
            assert native.values(kind, "loss") == pytest.approx(expected.values(kind, "loss"), rel=2e-3), name
        norms = native.values("train", "grad_norm"), expected.values("train", "grad_norm")
        assert norms[0] == pytest.approx(norms[1], rel=2e-2), name
        assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-4), name


def test_interrupted_run_equals_the_uninterrupted_one(folder: Path) -> None:
    expected = one_process(folder)
    train(folder, "parts", 1, parallel="none", stop_at_step=2)
    run = train(folder, "parts", 1, parallel="none")
    assert run.digests() == expected.digests()
    assert run.values("train", "loss") == expected.values("train", "loss"), "each step is recorded once"


def test_a_reproducible_run_continues_with_other_ranks_and_modes(folder: Path) -> None:
    expected = one_process(folder, reproducible=True)
    train(folder, "moving", 3, parallel="fsdp", reproducible=True, stop_at_step=2)
    train(folder, "moving", 4, parallel="ddp", reproducible=True, stop_at_step=4)
    run = train(folder, "moving", 1, parallel="none", reproducible=True)
    assert run.digests() == expected.digests()


@pytest.mark.parametrize(("ranks", "mode"), [(1, "none"), (2, "ddp"), (3, "fsdp"), (4, "fsdp")])
def test_saved_on_four_loaded_on_any(folder: Path, ranks: int, mode: str) -> None:
    twelve = {"batch_size": 12, "micro_batch_size": 1}
    source = folder / "on-four"
    if not source.exists():
        train(folder, "on-four", 4, parallel="hsdp", dp_shard=2, stop_at_step=3, **twelve)
    shutil.copytree(source, folder / f"four-to-{mode}{ranks}")
    run = train(folder, f"four-to-{mode}{ranks}", ranks, parallel=mode, **twelve)
    assert_close(run, one_process(folder, **twelve))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_runs_have_the_same_bits_on_any_layout(folder: Path, precision: str) -> None:
    variant = {"reproducible": True, "compile": True, "total_steps": 3, "precision": precision}
    expected = one_process(folder, **variant)
    eager = one_process(folder, **{**variant, "compile": False})
    assert expected.values("train", "loss") == pytest.approx(eager.values("train", "loss"), rel=1e-3)
    for name, ranks, mode in (LAYOUTS[0], LAYOUTS[1], LAYOUTS[5]):
        run = train(folder, f"compiled-{name}-{len(references)}", ranks, **mode, **variant)
        assert run.digests() == expected.digests(), name


def test_what_does_not_decide_bits_changes_nothing(folder: Path) -> None:
    """These do not change bits: intervals of logging, evaluating and saving, file sizes, reading ahead."""
    expected = one_process(folder, reproducible=True)
    settings = {"log_every": 4, "eval_every": 2, "eval_steps": 3, "ckpt_every": 2, "max_shard_bytes": 300}
    run_ranks(2, fit, settings_for(folder, "else", parallel="fsdp", reproducible=True, **settings), read_ahead)
    run = Run(folder / "else")
    assert len(list(run.checkpoint.glob("*.safetensors"))) > 10
    assert run.digests() == expected.digests()


def read_ahead(_: Any) -> None:
    from tinytrain_dist.data import batches
    from tinytrain_dist.data.batches import Prefetcher

    batches.Prefetcher = functools.partial(Prefetcher, depth=7)  # type: ignore[misc, assignment]


LONG = {"reproducible": True, "total_steps": 30, "grad_clip_norm": 0.7, "eval_every": 7, "ckpt_every": 5}


def die(trainer: Any, step: int, in_save: bool) -> None:
    """Kill this rank with SIGKILL in the middle of a step or of a save."""
    from tinytrain_dist.checkpoint import manifest

    def kill(*args: Any) -> None:
        if trainer.step == step if not in_save else args[0].name == f"checkpoint-{step:08d}.tmp":
            os.kill(os.getpid(), signal.SIGKILL)
        elif in_save:
            write_bytes(*args)

    write_bytes = manifest.write_file
    if in_save and trainer.context.is_main:
        manifest.write_file = kill  # the tensors are written, the rest is not
    elif not in_save:
        trainer.train_step.model.register_forward_pre_hook(kill)


def test_killed_twice_and_moved_equals_thirty_steps_on_one_rank(folder: Path) -> None:
    """4 FSDP ranks until a SIGKILL, then 2 DDP ranks until a SIGKILL during a save, then 1 rank to the end."""
    expected = one_process(folder, **LONG)
    norms = expected.values("train", "grad_norm")
    assert min(norms) < 0.7 < max(norms), "clipping must be active in some steps only"
    for ranks, mode, step, in_save in ((4, "fsdp", 12, False), (2, "ddp", 20, True)):
        dying = functools.partial(die, step=step, in_save=in_save)
        with pytest.raises(AssertionError, match="SIGKILL"):
            run_ranks(ranks, fit, settings_for(folder, "moved", parallel=mode, **LONG), dying)
    left = sorted(path.name for path in (folder / "moved" / "checkpoints").glob("checkpoint-*"))
    assert left == ["checkpoint-00000010", "checkpoint-00000015", "checkpoint-00000020.tmp"]
    run = train(folder, "moved", 1, parallel="none", **LONG)
    assert run.digests() == expected.digests()
    assert run.values("train", "loss") == expected.values("train", "loss")


def drift(settings: dict[str, Any]) -> str:
    try:
        fit(settings)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_drift_is_refused_with_both_values_unless_allowed(folder: Path) -> None:
    train(folder, "drift", 1, parallel="none", reproducible=True, stop_at_step=2)
    other = settings_for(folder, "drift", parallel="none", reproducible=True, micro_batch_size=2, precision="bf16")
    message = run_ranks(1, drift, other)[0]
    assert "micro_batch_size: 1 in the checkpoint, 2 now" in message
    assert "precision: fp32 in the checkpoint, bf16 now" in message
    assert run_ranks(1, drift, {**other, "cpu_threads": 2, "allow_drift": True})[0] == "no error"


GOLDEN = [
    3.95781, 3.9003, 3.78238, 3.67609, 3.58015, 3.52844, 3.48184, 3.39122, 3.30237, 3.30887,
    3.2464, 3.19162, 3.14811, 3.11376, 3.04035, 3.03099, 3.03428, 2.99268, 3.01444, 3.02626,
]  # fmt: skip


def test_golden_curve(tmp_path: Path) -> None:
    run = train(tmp_path, "golden", 1, parallel="none", total_steps=20, micro_batch_size=4)
    losses = run.values("train", "loss")
    assert losses == pytest.approx(GOLDEN, rel=1e-4), (
        "the loss curve of a fixed run moved. If sampling, initial weights, schedule, loss, clipping or AdamW were "
        "meant to change, say so in CHANGELOG.md (every user's runs change with it) and replace GOLDEN by\n"
        f"{[round(loss, 5) for loss in losses]}\nOtherwise find the change that did it: git bisect run pytest -k golden"
    )


def break_tree(_: Any) -> None:
    """Sum in the order of ranks, as a ring all-reduce does."""
    from tinytrain_dist.parallel import tree_reduction

    def in_order(parts: torch.Tensor) -> torch.Tensor:
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    tree_reduction.tree_sum = in_order


def break_counter(_: Any) -> None:
    """Add micro-batches one after the other, as `.grad` does."""
    from tinytrain_dist.parallel.tree_reduction import BinaryCounter

    def add(self: BinaryCounter, block: range, tensors: list[torch.Tensor]) -> None:
        for _, left in self._sums:
            torch._foreach_add_(tensors, left)
        self._sums = [(block, tensors)]

    BinaryCounter.add = add  # type: ignore[method-assign]


def break_sampling(trainer: Any) -> None:
    """Make the drawn windows depend on the rank."""
    share = trainer.train_step.share(0)
    other = replace(share, slots=tuple(slot + 1000 * trainer.context.rank for slot in share.slots))
    trainer.train_step.share = lambda _: other


def break_initial_weights(trainer: Any) -> None:
    """Make the initial weights depend on the rank, by about one unit in the last place."""
    from tinytrain_dist.distributed.dtensor import local_tensor

    with torch.no_grad():
        for param in trainer.train_step.model.parameters():
            local_tensor(param).mul_(1 + trainer.context.rank * 2**-22)


def break_norm(trainer: Any) -> None:
    """Clip by the norm of the local shards."""
    from tinytrain_dist.distributed.dtensor import local_tensor

    def local_norm() -> torch.Tensor:
        squares = [local_tensor(param.grad).double().square().sum() for param in trainer.train_step.model.parameters()]
        return torch.stack(squares).sum()

    trainer.train_step.reduction.squared_norm = local_norm


def break_update(_: Any) -> None:
    """Do not pad tensors, so that torch's fused kernel uses scalar code at their ends."""
    from tinytrain_dist.optim import adamw

    adamw._pad_to_simd_width = lambda *pieces: lambda: None  # type: ignore[assignment]


BREAKS = [  # with fewer than four ranks or four micro-batches there is only one order of addition
    (break_tree, 4),
    (break_counter, 2),
    (break_sampling, 4),
    (break_initial_weights, 4),
    (break_norm, 4),
    (break_update, 4),
]


@pytest.mark.parametrize(("break_it", "ranks"), BREAKS, ids=[function.__name__ for function, _ in BREAKS])
def test_broken_ingredients_change_the_hash(folder: Path, break_it: Any, ranks: int) -> None:
    """Show that the equalities above can fail: without any one of these parts, the bits differ."""
    name = break_it.__name__
    run_ranks(ranks, fit, settings_for(folder, name, reproducible=True, parallel="fsdp"), break_it)
    assert Run(folder / name).digests() != one_process(folder, reproducible=True).digests()
