"""`tinytrain average`: the mean of the weights of several checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.tools import Cli, flip_bit, newest, weights_file
from tests.helpers.training import fit_all, settings_for
from tinytrain_dist.checkpoint.load_model import load_model
from tinytrain_dist.checkpoint.safetensors_io import TensorReader


@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
def test_the_mean_is_that_of_the_formula(
    tinytrain: Cli, folder: Path, tmp_path: Path, weights: tuple[float, ...]
) -> None:
    one, other = newest(folder / "one"), newest(folder / "other")
    options = ["--weights", *weights] if weights else []
    code, text, err = tinytrain("average", one, other, "--out", tmp_path / "mean", *options)
    assert code == 0, err
    assert text.startswith("the mean of the weights in 2 checkpoints")
    assert str(one) in text
    shares = (0.25, 0.75) if weights else (0.5, 0.5)
    mean, first, second = (TensorReader(path, "model") for path in (tmp_path / "mean", one, other))
    assert mean.files.keys() == first.files.keys()
    for name in first.files:
        expected = first.read(name).double() * shares[0] + second.read(name).double() * shares[1]
        assert torch.equal(mean.read(name), expected.float())


def test_the_mean_is_a_checkpoint_for_the_commands(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    out, one, other = tmp_path / "mean", newest(folder / "one"), newest(folder / "other")
    assert tinytrain("average", one, other, "--out", out)[0] == 0
    assert tinytrain("verify", out)[1].startswith("ok")
    assert tinytrain("hash", out)[1].startswith("weights")
    assert tinytrain("sample", out, "--prompt", "a", "--max-new-tokens", 3)[0] == 0
    assert tinytrain("export", out, tmp_path / "exported", "--no-check")[0] == 0
    assert load_model(out, torch.device("cpu")).model_config == load_model(one, torch.device("cpu")).model_config
    state = json.loads((out / "trainer_state.json").read_text())
    assert [source["checkpoint"] for source in state["averaged"]] == [str(one), str(other)]
    assert tinytrain("hash", one)[1].split()[1] == state["averaged"][0]["weights"]


def test_the_newest_checkpoints_of_a_run_are_averaged(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    code, text, _ = tinytrain("average", folder / "one", "--last", 2, "--out", tmp_path / "mean")
    assert code == 0
    committed = sorted((folder / "one" / "checkpoints").iterdir())[-2:]
    assert all(str(path) in text for path in committed)


@pytest.mark.parametrize(
    ("places", "options", "expected"),
    [
        (["one"], [], "at least two checkpoints"),
        (["one", "one"], [], "named twice"),
        (["one", "other"], ["--weights", 1], "1 weight(s) for 2 checkpoints"),
        (["one", "other"], ["--weights", 1, -1], "must be at least 0"),
        (["one", "other"], ["--weights", "nan", 1], "must be at least 0"),
        (["one", "other"], ["--weights", 1e308, 1e308], "with a finite sum"),
        (["one", "other"], ["--weights", 0, 0], "not all 0"),
        (["one"], ["--last", 99], "99 checkpoints were asked for"),
        (["one"], ["--last", 0], "--last: 0"),
        (["one", "other"], ["--ema"], "has no moving average"),
    ],
)
def test_what_cannot_be_averaged_is_a_sentence(
    tinytrain: Cli, folder: Path, tmp_path: Path, places: list[str], options: list[object], expected: str
) -> None:
    paths = [folder / place for place in places]
    code, _, err = tinytrain("average", *paths, "--out", tmp_path / "mean", *options)
    assert code == 2
    assert expected in err
    assert not (tmp_path / "mean").exists()


@pytest.mark.multiprocess
def test_equal_shapes_do_not_make_the_same_model(tinytrain: Cli, tmp_path: Path) -> None:
    runs: dict[str, dict[str, object]] = {
        "plain": {},
        "longer": {"context_len": 16},
        "capped": {"logit_soft_cap": 30.0},
        "theta": {"rope_theta": 500.0},
    }
    short = {"total_steps": 1, "warmup_iters": 0, "eval_every": 99, "parallel": "none"}
    run_ranks(1, fit_all, [settings_for(tmp_path, name, **short, **changes) for name, changes in runs.items()])
    for name, named in {"capped": "model_type llama and", "theta": "rope_theta 10000.0 and 500.0"}.items():
        code, _, err = tinytrain("average", tmp_path / "plain", tmp_path / name, "--out", tmp_path / "mean")
        assert code == 2
        assert "of different models by their config.json (" in err
        assert named in err
    assert tinytrain("average", tmp_path / "plain", tmp_path / "longer", "--out", tmp_path / "mean")[0] == 0


def test_a_damaged_checkpoint_leaves_nothing_behind(tinytrain: Cli, folder: Path, run: Path, tmp_path: Path) -> None:
    flip_bit(weights_file(newest(run)))
    code, _, err = tinytrain("average", newest(run), newest(folder / "other"), "--out", tmp_path / "out" / "mean")
    assert code == 2
    assert "is not what was saved" in err
    assert list((tmp_path / "out").iterdir()) == []
    code, _, err = tinytrain("average", folder / "one", folder / "other", "--out", run)
    assert "exists already" in err
