"""Train with Muon and with parameter groups on real ranks: layouts, resumes, skipped steps, and what is recorded.

Each layout is trained once, for all tests.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for, train
from tinytrain_dist.cli.main import main as tinytrain
from tinytrain_dist.errors import CheckpointError

pytestmark = pytest.mark.multiprocess

# 23 columns fill no whole SIMD vectors. With four shards, k_proj of 2 rows leaves two ranks without rows.
MUON: dict[str, Any] = {
    "optimizer": "muon",
    "param_groups": ("*embed_tokens*: lr_factor=2 weight_decay=0", "*norm*: lr_factor=0.5"),
    "d_ff": 23,
    "batch_size": 12,
    "micro_batch_size": 3,
    "reproducible": True,
    "ema_decay": 0.9,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"parallel": "none"}),
    "one, no accumulation": (1, {"parallel": "none", "micro_batch_size": 12}),
    "ddp2": (2, {"parallel": "ddp"}),
    "fsdp2": (2, {"parallel": "fsdp"}),
    "fsdp4": (4, {"parallel": "fsdp"}),
    "hsdp2x2": (4, {"parallel": "hsdp", "dp_shard": 2}),
}
NUM_MATRICES = 14
Train = Callable[..., Run]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Callable[[str], Run]:
    """Return a function that trains a layout on first use."""
    runs: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in runs:
            ranks, settings = LAYOUTS[name]
            run_ranks(ranks, fit, settings_for(folder, name, **{**MUON, **settings}), count_matrices)
            runs[name] = Run(folder / name)
        return runs[name]

    return get


def count_matrices(trainer: Any) -> None:
    """On a rank: append the shape of each matrix that it orthogonalizes to a file in the run folder."""
    from tinytrain_dist.optim import muon

    original = muon.orthogonalize
    rank = trainer.context.rank
    path = Path(trainer.config.target_dir) / f"orthogonalized-{rank}"

    def orthogonalize(matrix: torch.Tensor, steps: int) -> torch.Tensor:
        with open(path, "a") as file:
            file.write(f"{tuple(matrix.shape)}\n")
        return original(matrix, steps)

    muon.orthogonalize = orthogonalize  # type: ignore[assignment]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "accumulation" not in name and name != "one"])
def test_reproducible_runs_have_the_same_bits_on_any_layout(trained: Callable[[str], Run], layout: str) -> None:
    expected, run = trained("one"), trained(layout)
    assert run.digests() == expected.digests()
    assert run.values("train", "grad_norm") == expected.values("train", "grad_norm")
    norms = expected.values("train", "grad_norm")
    assert min(norms) < 0.75 < max(norms), "clipping must be active in some steps only"
    losses = expected.values("train", "loss")
    assert losses[-1] < losses[0]


def test_accumulation_is_the_same_batch(trained: Callable[[str], Run]) -> None:
    expected, run = trained("one"), trained("one, no accumulation")
    # orthogonalizing increases the differences of roundings where a singular value is small
    torch.testing.assert_close(run.weights(), expected.weights(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("layout", ["one", "ddp2", "fsdp4", "hsdp2x2"])
def test_each_matrix_is_orthogonalized_once_in_a_step(trained: Callable[[str], Run], layout: str) -> None:
    run, ranks, num_steps = trained(layout), LAYOUTS[layout][0], 6
    by_rank = []
    for rank in range(ranks):
        path = run.folder / f"orthogonalized-{rank}"
        by_rank.append(path.read_text().splitlines() if path.exists() else [])
    everything = [shape for shapes in by_rank for shape in shapes]
    assert len(everything) == num_steps * NUM_MATRICES
    assert sorted(set(everything)) == sorted(
        f"({rows}, {columns})" for rows, columns in {(4, 16), (2, 16), (16, 4), (23, 16), (16, 23)}
    )
    assert all(len(shapes) >= num_steps * (NUM_MATRICES // ranks - 1) for shapes in by_rank), "work is divided"


def test_the_state_says_which_optimizer_a_parameter_has(trained: Callable[[str], Run]) -> None:
    names = set(trained("fsdp2").digests())
    keys = {"exp_avg", "exp_avg_sq", "momentum_buffer"}

    def state_of(parameter: str) -> set[str]:
        return {key for key in keys if f"{parameter}.{key}" in names}

    assert state_of("model.layers.1.mlp.down_proj.weight") == {"momentum_buffer"}
    for parameter in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        assert state_of(parameter) == {"exp_avg", "exp_avg_sq"}


def test_the_groups_are_recorded_at_the_start(trained: Callable[[str], Run]) -> None:
    record = next(each for each in trained("ddp2").records if each["kind"] == "parameter_groups")
    found = [(each["group"], each["optimizer"], each["tensors"], each["lr_factor"]) for each in record["groups"]]
    assert found == [
        ("*embed_tokens*", "adamw", 1, 2.0),
        ("*norm*", "adamw", 5, 0.5),
        ("other matrices", "adamw", 1, 1.0),
        ("other matrices", "muon", NUM_MATRICES, 1.0),
    ]
    assert "*embed_tokens*" in record["text"]


@pytest.mark.parametrize(("ranks", "mode"), [(1, "none"), (2, "ddp"), (4, "fsdp")])
def test_saved_on_two_shards_resumed_on_any_layout(
    folder: Path, trained: Callable[[str], Run], ranks: int, mode: str
) -> None:
    expected = trained("fsdp2")
    name = f"from-fsdp2-to-{mode}{ranks}"
    copied = folder / name
    shutil.copytree(expected.folder, copied)
    shutil.rmtree(copied / "checkpoints" / "checkpoint-00000006")
    run = train(folder, name, ranks, **{**MUON, "parallel": mode})
    assert any(record["kind"] == "resumed" for record in run.records)
    assert run.digests() == expected.digests()


def test_a_native_run_on_three_ranks_continues_from_two_shards(folder: Path, trained: Callable[[str], Run]) -> None:
    expected = trained("one")
    shutil.copytree(trained("fsdp2").folder, folder / "three")
    shutil.rmtree(folder / "three" / "checkpoints" / "checkpoint-00000006")
    run = train(folder, "three", 3, **{**MUON, "parallel": "ddp", "reproducible": False, "micro_batch_size": 2})
    torch.testing.assert_close(run.weights(), expected.weights(), rtol=2e-3, atol=2e-4)


def make_loss_nan(trainer: Any) -> None:
    """On a rank: make the loss of step 3 NaN, and with it every gradient."""
    if trainer.context.rank == 0:
        trainer.train_step.model.register_forward_hook(
            lambda module, _, loss: loss * math.nan if module.training and trainer.step == 2 else loss
        )


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_step_that_is_not_finite_changes_no_bit_on_any_rank(folder: Path, mode: str) -> None:
    settings = {**MUON, "parallel": mode, "ckpt_every": 1, "val_data": None, "ema_decay": None}
    before = train(folder, f"sound-{mode}", 2, **settings, stop_at_step=2).digests()
    result = run_ranks(2, fit, settings_for(folder, f"nan-{mode}", **settings, stop_at_step=3), make_loss_nan)
    assert [each["skipped"] for each in result] == [1, 1]
    run = Run(folder / f"nan-{mode}")
    assert run.checkpoint.name == "checkpoint-00000003"
    assert run.digests() == before


def refusal(settings: dict[str, Any]) -> str:
    try:
        fit(settings)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_resume_with_another_optimizer_or_other_groups_is_refused_with_both_values(
    folder: Path, trained: Callable[[str], Run]
) -> None:
    shutil.copytree(trained("one").folder, folder / "changed")
    shutil.rmtree(folder / "changed" / "checkpoints" / "checkpoint-00000006")
    same = settings_for(folder, "changed", **{**MUON, "parallel": "none"})
    other = {**same, "optimizer": "adamw"}
    message = run_ranks(1, refusal, other)[0]
    assert "optimizer: muon in the checkpoint, adamw now" in message
    assert "set allow" not in message, "the state does not fit, whatever is allowed"
    assert run_ranks(1, refusal, {**other, "allow": "optimizer"})[0] == message
    message = run_ranks(1, refusal, {**same, "param_groups": ("*norm*: lr_factor=0.5",)})[0]
    assert "param_groups: ['*embed_tokens*: lr_factor=2 weight_decay=0', " in message
    assert "['*norm*: lr_factor=0.5'] now" in message
    assert "set allow = param_groups" in message
    changed = {**same, "param_groups": ("*norm*: lr_factor=0.5",), "allow": "param_groups"}
    assert run_ranks(1, refusal, changed)[0] == "no error"


def test_the_verbs_for_checkpoints_know_the_state(folder: Path, trained: Callable[[str], Run], tmp_path: Path) -> None:
    """Hash, verify and replay. The replay runs on one process what FSDP has trained on two."""
    printed = []
    for layout in ("one", "fsdp2"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert tinytrain(["hash", str(trained(layout).checkpoint)]) == 0
        printed.append([line.split() for line in out.getvalue().splitlines() if "checkpoint-" not in line])
        assert tinytrain(["verify", str(trained(layout).checkpoint)]) == 0
    assert printed[0] == printed[1]
    first = trained("fsdp2").folder / "checkpoints" / "checkpoint-00000003"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = tinytrain(["replay", str(first), "--steps", "3"])
    assert (code, "3 of 3 recorded steps are the same to the last bit" in out.getvalue()) == (0, True), out.getvalue()
