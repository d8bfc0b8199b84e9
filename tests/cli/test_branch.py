"""`tinytrain branch`: the new run is the run that would have been trained with this decay, and needs no parent."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.tools import Cli, newest, weights_file
from tests.helpers.training import TINY, VOCABULARY, Run, fit, fit_all
from tinytrain_dist.checkpoint.manifest import quick_problems
from tinytrain_dist.cli import branch
from tinytrain_dist.config.loading import load_config
from tinytrain_dist.config.schema import FIELDS, TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.training.run_data import open_training_data

WEIGHTS = ["0: 0.5 0.5", "5: 1 3", "12: 3 1"]  # the parent has 16 steps, the branch 7
KEPT = {"keep_last": 5, "ckpt_every": 2}


def write_sources(folder: Path) -> dict[str, Any]:
    """Write two sources, and return the settings of a run over two epochs of them in phases of weights."""
    rng = np.random.default_rng(7)
    for name, tokens in (("a", 500), ("b", 260)):
        np.save(folder / f"{name}.npy", rng.integers(0, VOCABULARY, tokens).astype("uint16"))
    return {
        **TINY,
        **KEPT,
        "vocab_size": VOCABULARY,
        "reproducible": True,
        "train_data": [str(folder / f"{name}.npy") for name in "ab"],
        "val_data": str(folder / "a.npy"),
        "train_weights": WEIGHTS,
        "sampling": "shuffle",
        "epochs": 2.0,
        "total_steps": FIELDS["total_steps"].default,  # as if it were not set
        "schedule": "wsd",
        "target_dir": str(folder / "parent"),
    }


@pytest.mark.multiprocess
def test_a_branch_is_the_run_with_this_decay_and_needs_no_parent(tinytrain: Cli, tmp_path: Path) -> None:
    settings = write_sources(tmp_path)
    as_branch = {"epochs": None, "total_steps": 7, "decay_iters": 3, "lr_min": 0.0, "train_weights": WEIGHTS[:2]}
    reference = settings | as_branch | {"target_dir": str(tmp_path / "reference")}
    run_ranks(1, fit_all, [settings | {"stop_at_step": 6}, reference])
    parent, target = tmp_path / "parent", tmp_path / "new"
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    code, out, err = tinytrain("branch", parent, "--at", 4, "--decay-iters", 3, "--to", target, "--lr-min", 0)
    assert (code, err) == (0, "")
    assert "falls from 0.01 to 0 over 3 steps, to step 7" in out
    assert f"next: tinytrain train {target}" in out
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before

    assert Run(target).values("train", "step") == [1, 2, 3, 4]
    config, whole = load_config(target / "config.toml"), load_config(parent / "config.toml")
    assert config.train_weights == tuple(WEIGHTS[:2])
    assert whole.total_steps == 16
    for step in (4, 5, 6):
        windows = [open_training_data(each).draw(config.seed, step, range(8)) for each in (config, whole)]
        assert np.array_equal(windows[0], windows[1])

    assert tinytrain("prune", parent, "--keep-last", 1)[0] == 0
    weights = tinytrain("hash", target)[1].split()[1]
    shutil.rmtree(parent)
    run_ranks(2, fit, config.to_dict())
    run, expected = Run(target), Run(tmp_path / "reference")
    assert run.checkpoint.name == "checkpoint-00000007"
    assert run.digests() == expected.digests()
    for key in ("step", "loss", "grad_norm", "lr"):
        assert run.values("train", key) == expected.values("train", key)
    recorded = json.loads((target / "branch.json").read_text())
    assert (recorded["run"], recorded["step"], recorded["digests"]["weights"]) == (str(parent), 4, weights)
    assert [record["step"] for record in run.records if record["kind"] in ("branched", "resumed")] == [4, 4]

    code, out, err = tinytrain("branch", target, "--at", 4, "--decay-iters", 9)  # a branch of a branch
    assert (code, err) == (0, "")
    again = tmp_path / "new-at-4-decay-9"
    assert json.loads((again / "branch.json").read_text())["run"] == str(target)
    assert load_config(again / "config.toml").total_steps == 13
    kinds = [record["kind"] for record in Run(again).records]
    assert [kind for kind in kinds if kind in ("branched", "resumed")] == ["branched", "branched"]


def test_a_branch_has_the_batch_sizes_that_begin_before_its_end(tmp_path: Path) -> None:
    warmup = ("0: 2", "5: 4", "12: 8")
    parent = TrainingConfig(
        batch_size=8, batch_size_warmup=warmup, total_steps=16, schedule="constant", vocab_size=VOCABULARY
    )
    state = {"config": parent.resolved(), "data": {}, "step": 3}
    sizes = []
    for decay in (10, 8, 1):
        options = branch.BranchOptions(tmp_path, at=3, decay_iters=decay)
        config = branch._configuration(options, tmp_path, state, tmp_path / "new", [])
        sizes.append((config.batch_size, config.batch_size_warmup))
    assert sizes == [(8, warmup), (4, warmup[:2]), (2, None)]


def test_a_run_whose_rate_has_reached_0_is_branched_earlier(tmp_path: Path) -> None:
    parent = TrainingConfig(schedule="linear", lr_min=0.0, total_steps=8, warmup_iters=1, vocab_size=VOCABULARY)
    state = {"config": parent.resolved(), "data": {}, "step": 8}
    options = branch.BranchOptions(tmp_path, at=8, decay_iters=2)
    with pytest.raises(
        ConfigError, match=r"is 0\.0 \(schedule = linear\).*; give an earlier step with --at, or branch"
    ):
        branch._configuration(options, tmp_path, state, tmp_path / "new", [])


def test_a_rate_that_would_jump_is_refused_and_the_advice_is_right(tinytrain: Cli, run: Path) -> None:
    """The runs of this fixture have schedule = cosine."""
    code, _, err = tinytrain("branch", run, "--at", 3, "--decay-iters", 5)
    assert code == 2
    rate = re.search(r"after step 3 is (\S+) \(schedule = cosine\), so it would jump; add --lr-max (\S+) to", err)
    assert rate is not None
    assert rate[1] == rate[2]
    arguments = ("branch", run, "--at", 3, "--decay-iters", 5, "--lr-max", rate[2], "--decay-shape", "sqrt")
    code, _, err = tinytrain(*arguments, "--weight-decay", 0.05)
    assert code == 2
    assert "weight_decay: 0.05 is where the branch would begin" in err
    decay = err.rpartition("add --weight-decay ")[2].strip()
    code, out, _ = tinytrain(*arguments, "--weight-decay", decay, "--weight-decay-schedule", "lr")
    assert code == 0
    target = run.with_name("run-at-3-decay-5")
    assert str(target) in out
    config = load_config(target / "config.toml")
    assert (config.schedule, config.decay_shape, config.total_steps) == ("wsd", "sqrt", 8)
    assert (config.lr_max, config.weight_decay, config.weight_decay_schedule) == (float(rate[1]), float(decay), "lr")
    assert tinytrain("status", target)[1].startswith("state      preempted: branched from")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--at", 5, "--decay-iters", 2), "has no checkpoint of step 5; give one of those that it has: --at 3, 6"),
        (("--at", 3, "--decay-iters", 0), "--decay-iters: 0 must be at least 1"),
        (("--at", 3), "--decay-iters is missing"),
        (("--at", 3, "--decay-iters", 2, "--total-steps", 9), "total_steps: follows from the options"),
        (("--at", 3, "--decay-iters", 2, "--seed", 9), "seed: 0 in the checkpoint, 9 now"),
        (("--at", 3, "--decay-iters", 2, "x.toml"), "x.toml: one argument too many"),
    ],
)
def test_what_cannot_be_branched_is_said(tinytrain: Cli, run: Path, arguments: Any, message: str) -> None:
    beside = sorted(run.parent.iterdir())
    code, _, err = tinytrain("branch", run, *arguments)
    assert code == 2
    assert message in err
    assert sorted(run.parent.iterdir()) == beside


def branch_at_the_end(tinytrain: Cli, run: Path) -> tuple[int, str, str]:
    """Branch the run after its last step, where the rate is lr_min."""
    rates = ("--lr-max", 0.001, "--lr-min", 0)
    return tinytrain("branch", run, "--at", 6, "--decay-iters", 2, *rates, "--to", run / "new")


def test_damaged_checkpoints_and_existing_folders_are_refused(tinytrain: Cli, run: Path) -> None:
    (run / "new").mkdir()
    (run / "new" / "file").touch()
    code, _, err = branch_at_the_end(tinytrain, run)
    assert (code, f"--to: {run / 'new'} exists already" in err) == (2, True)
    (run / "new" / "file").unlink()  # an empty folder will do
    data = weights_file(newest(run)).read_bytes()
    weights_file(newest(run)).write_bytes(data[:-1])
    code, _, err = branch_at_the_end(tinytrain, run)
    assert (code, "bytes were written" in err) == (2, True)
    weights_file(newest(run)).write_bytes(data)
    assert branch_at_the_end(tinytrain, run)[0] == 0


@pytest.mark.parametrize("linked", [True, False])
def test_files_are_shared_where_the_file_system_allows_it(
    tinytrain: Cli, run: Path, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (newest(run) / "kept.json").write_text("{}")
    if not linked:
        monkeypatch.setattr(branch.os, "link", refuse)
    assert branch_at_the_end(tinytrain, run)[0] == 0
    copied = newest(run / "new")
    assert weights_file(copied).samefile(weights_file(newest(run))) == linked
    assert quick_problems(copied) == []
    assert not (copied / "kept.json").exists()


def test_a_checkpoint_that_is_removed_meanwhile_leaves_nothing(
    tinytrain: Cli, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def remove_after(source: Path, target: Path) -> None:
        link(source, target)
        shutil.rmtree(source.parent)

    monkeypatch.setattr(branch.os, "link", remove_after)
    code, _, err = branch_at_the_end(tinytrain, run)
    assert (code, "was removed while it was copied" in err) == (2, True)
    assert not list(run.glob("new*"))
