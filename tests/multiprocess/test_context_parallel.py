"""Check runs whose ranks share sequences: they train as one process does, and to equal bits in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit_all, settings_for, train
from tinytrain_dist.errors import CheckpointError

pytestmark = pytest.mark.multiprocess

# with 4 ranks for each sequence, key heads are repeated
HEADS = {"num_heads": 4, "num_kv_heads": 2, "batch_size": 4, "total_steps": 4, "eval_every": 2, "ckpt_every": 4}
# What depends on the shares of the ranks: sources, masks, z-loss, Muon, the average, what is measured, and chunks of
# tokens that do not end where the columns of a rank do.
EVERYTHING: dict[str, Any] = {
    **HEADS,
    "optimizer": "muon",
    "ema_decay": 0.9,
    "z_loss": 1e-3,
    "stability_every": 2,
    "train_weights": (3.0, 1.0),
    "document_mask": True,
    "qk_norm": True,
    "tie_embeddings": True,
    "activation_checkpointing": "block",
    "loss_chunk_tokens": 5,
}
# ranks -> name, settings of the mesh
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"none-cp2": {"parallel": "none", "cp": 2}, "fsdp-cp2": {"parallel": "fsdp", "cp": 2}},
    4: {
        "ddp2-cp2": {"parallel": "ddp", "cp": 2},
        "hsdp2-cp2": {"parallel": "hsdp", "dp_shard": 1, "cp": 2},
        "none-cp4": {"parallel": "none", "cp": 4},
        "fsdp-cp4": {"parallel": "fsdp", "cp": 4},
    },
    6: {"ddp3-cp2": {"parallel": "ddp", "cp": 2}, "fsdp3-cp2": {"parallel": "fsdp", "cp": 2}},  # uneven shares
}
# Bits are compared in every layout with few settings, and in those that differ in code with all of them.
COMPARED: dict[str, tuple[str, ...]] = {
    "native": ("none-cp2", "fsdp-cp2", "ddp2-cp2", "hsdp2-cp2", "fsdp-cp4"),
    "exact": tuple(name for layouts in LAYOUTS.values() for name in layouts),
    "everything": ("none-cp2", "fsdp-cp2", "ddp2-cp2", "fsdp3-cp2", "none-cp4", "fsdp-cp4"),
}
MEASURED = ("stability", "activation_rms_by_layer", "attention_logit_max_by_layer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("context_parallel")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Run]:
    """Return the runs of COMPARED, by "KIND LAYOUT"; the layout "alone" is one process."""
    settings_for(folder, "any")  # makes the files
    for number, name in enumerate(("train", "val")):
        begins = np.random.default_rng(number).random(len(np.load(folder / f"{name}.npy"))) < 0.2
        begins[0] = True
        np.save(folder / f"{name}.documents.npy", np.flatnonzero(begins))
    files = {"train_data": (str(folder / "train.npy"), str(folder / "val.npy"))}
    kinds: dict[str, dict[str, Any]] = {
        "native": HEADS,
        "exact": {**HEADS, "reproducible": True, "activation_checkpointing": "selective"},
        "everything": {**EVERYTHING, **files, "reproducible": True},
    }
    for ranks, layouts in {1: {"alone": {"parallel": "none"}}, **LAYOUTS}.items():
        variants = [
            settings_for(folder, f"{kind} {name}", **settings, **mesh)
            for kind, settings in kinds.items()
            for name, mesh in layouts.items()
            if name in ("alone", *COMPARED[kind])
        ]
        run_ranks(ranks, fit_all, variants, timeout_seconds=300)
    return {path.name: Run(path) for path in folder.iterdir() if path.is_dir()}


@pytest.mark.parametrize("kind", ["native", "exact"])
def test_the_curve_is_that_of_one_process(runs: dict[str, Run], kind: str) -> None:
    alone = runs[f"{kind} alone"]
    for name in COMPARED[kind]:
        run = runs[f"{kind} {name}"]
        for value in ("loss", "grad_norm"):
            assert run.values("train", value) == pytest.approx(alone.values("train", value), rel=1e-5), name
        assert run.values("eval", "loss") == pytest.approx(alone.values("eval", "loss"), rel=1e-5), name
    losses = alone.values("train", "loss")
    assert losses[-1] < losses[0], "the model must learn, or equal losses say nothing"


@pytest.mark.parametrize("kind", ["exact", "everything"])
def test_all_layouts_with_the_same_cp_have_the_same_bits(runs: dict[str, Run], kind: str) -> None:
    for cp in (2, 4):
        first, *others = [name for name in COMPARED[kind] if name.endswith(f"cp{cp}")]
        expected = runs[f"{kind} {first}"]
        for name in others:
            run = runs[f"{kind} {name}"]
            assert run.digests() == expected.digests(), name
            for value in ("loss", "grad_norm", "tokens"):
                assert run.values("train", value) == expected.values("train", value), (name, value)
            assert run.values("eval", "loss") == expected.values("eval", "loss"), name


def test_metrics_are_those_of_whole_sequences(runs: dict[str, Run]) -> None:
    """Masks, losses by source, z-loss, and what is measured inside the model."""
    alone = runs["everything alone"]
    for name in COMPARED["everything"]:
        run = runs[f"everything {name}"]
        for value in ("loss", "grad_norm", "z_loss"):
            assert run.values("train", value) == pytest.approx(alone.values("train", value), rel=1e-3), name
        for value in ("loss", "ema_loss"):
            assert run.values("eval", value) == pytest.approx(alone.values("eval", value), rel=1e-3), name
        for group in ("source_loss", "source_share", *MEASURED):
            found = [record[group] for record in run.records if group in record]
            expected = [record[group] for record in alone.records if group in record]
            assert len(found) == len(expected) > 0
            for own, other in zip(found, expected, strict=True):
                assert own == pytest.approx(other, rel=2e-3), (name, group)


def test_the_largest_micro_batch_that_fits_is_tried_without_other_ranks(folder: Path, runs: dict[str, Run]) -> None:
    run = train(folder, "auto", 2, **{**HEADS, "parallel": "fsdp", "cp": 2, "micro_batch_size": "auto"})
    expected = runs["native alone"].values("train", "loss")
    assert run.values("train", "loss") == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_continues_with_another_cp(folder: Path, runs: dict[str, Run]) -> None:
    train(folder, "moving", 4, parallel="hsdp", dp_shard=1, cp=2, stop_at_step=2, **HEADS)
    run = train(folder, "moving", 1, parallel="none", **HEADS)
    expected = runs["native alone"].values("train", "loss")
    assert run.values("train", "loss") == pytest.approx(expected, rel=1e-5)


def refused(settings: dict[str, Any]) -> str:
    """On a rank: return why a run is refused."""
    from tests.helpers.training import fit

    try:
        fit(settings)
    except CheckpointError as error:
        return str(error)
    return "not refused"


def test_a_reproducible_run_does_not_change_its_cp_silently(folder: Path) -> None:
    train(folder, "kept", 2, parallel="fsdp", cp=2, reproducible=True, stop_at_step=2, **HEADS)
    alone = settings_for(folder, "kept", parallel="none", reproducible=True, **HEADS)
    assert "cp: 2 in the checkpoint, 1 now" in run_ranks(1, refused, alone)[0]
    assert run_ranks(1, refused, {**alone, "allow_drift": True})[0] == "not refused"


@pytest.mark.slow
def test_compiled_runs_have_equal_bits_too(folder: Path) -> None:
    settings = {**HEADS, "reproducible": True, "compile": True, "precision": "bf16"}
    for name, ranks in (("none-cp2", 2), ("fsdp-cp2", 2), ("ddp2-cp2", 4)):
        train(folder, f"compiled {name}", ranks, **settings, **LAYOUTS[ranks][name])
    alone = train(folder, "compiled alone", 1, parallel="none", **settings)
    expected = Run(folder / "compiled none-cp2")
    assert expected.values("train", "loss") == pytest.approx(alone.values("train", "loss"), rel=2e-3)
    for name in ("fsdp-cp2", "ddp2-cp2"):
        assert Run(folder / f"compiled {name}").digests() == expected.digests(), name
