"""The moving average of the weights: on any number of ranks, resumed, evaluated, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.helpers.tools import Cli
from tests.helpers.training import TINY, Run, train
from tinytrain_dist.checkpoint.load_model import load_model
from tinytrain_dist.checkpoint.safetensors_io import TensorReader
from tinytrain_dist.cli import main
from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.data.window_sampling import EVAL_STREAM

pytestmark = pytest.mark.multiprocess

SETTINGS: dict[str, Any] = {"reproducible": True, "ema_decay": 0.6, "ckpt_every": 1, "keep_last": 6}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"parallel": "ddp"}),
    "fsdp": (2, {"parallel": "fsdp"}),
    "hsdp": (4, {"parallel": "hsdp", "dp_replicate": 2, "dp_shard": 2}),
}


class AverageRun(NamedTuple):
    """An undisturbed run on one rank, in the folder of all runs."""

    folder: Path
    run: Run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> AverageRun:
    folder = tmp_path_factory.mktemp("average")
    return AverageRun(folder, train(folder, "whole", 1, **SETTINGS))


def tensors(run: Run, step: int, kind: str) -> dict[str, torch.Tensor]:
    reader = TensorReader(run.folder / "checkpoints" / f"checkpoint-{step:08d}", kind)
    return {name: reader.read(name) for name in reader.files}


def ema_losses(run: Run) -> dict[float, float]:
    """Return the loss of the average by step; in a resumed run, the same step may be evaluated twice."""
    return dict(zip(run.values("eval", "step"), run.values("eval", "ema_loss"), strict=True))


def test_the_average_is_that_of_the_formula(whole: AverageRun) -> None:
    averages = tensors(whole.run, 1, "optimizer")
    for step in range(2, TINY["total_steps"] + 1):
        decay = min(SETTINGS["ema_decay"], (1 + step) / (10 + step))
        saved = tensors(whole.run, step, "optimizer")
        for name, weight in tensors(whole.run, step, "model").items():
            expected = decay * averages[f"{name}.ema"].double() + (1 - decay) * weight.double()
            torch.testing.assert_close(saved[f"{name}.ema"].double(), expected, rtol=1e-6, atol=1e-8)
        averages = saved


def test_the_weights_are_those_of_a_run_without_an_average(whole: AverageRun) -> None:
    plain = train(whole.folder, "plain", 1, **SETTINGS | {"ema_decay": None})
    digests = whole.run.digests()
    assert plain.digests() == {name: digest for name, digest in digests.items() if not name.endswith(".ema")}
    assert plain.values("eval", "loss") == whole.run.values("eval", "loss")
    # it goes on with an average that begins with its weights
    train(whole.folder, "plain", 1, **SETTINGS | {"total_steps": 6, "ema_every": 3})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_and_a_resume_give_the_same_average(whole: AverageRun, layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    train(whole.folder, layout, world_size, **SETTINGS | settings, stop_at_step=4)
    resumed = train(whole.folder, layout, world_size, **SETTINGS | settings)
    assert resumed.digests() == whole.run.digests()
    expected, found = ema_losses(whole.run), ema_losses(resumed)
    assert {step: found[step] for step in expected} == expected
    assert resumed.values("train", "loss") == whole.run.values("train", "loss")  # the weights came back


def test_the_logged_loss_is_that_of_the_average(whole: AverageRun) -> None:
    model = load_model(whole.run.checkpoint, torch.device("cpu"), average=True)
    dataset = TokenDataset([str(whole.folder / "val.npy")], TINY["context_len"])
    windows = dataset.read(*dataset.draw(0, 0, range(TINY["batch_size"]), EVAL_STREAM)).tokens
    logits = model(windows[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten().long())
    assert ema_losses(whole.run)[6] == pytest.approx(float(loss), rel=1e-5)
    assert ema_losses(whole.run)[6] != whole.run.values("eval", "loss")[-1]


@pytest.fixture
def tinytrain(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*args: object) -> tuple[int, str, str]:
        return main.main([str(arg) for arg in args]), *capsys.readouterr()

    return call


def test_the_average_is_exported_and_evaluated(whole: AverageRun, tinytrain: Cli, tmp_path: Path) -> None:
    assert tinytrain("export", whole.run.folder, tmp_path / "out", "--ema", "--no-check")[0] == 0
    saved, exported = tensors(whole.run, 6, "optimizer"), TensorReader(tmp_path / "out", "model")
    assert all(torch.equal(exported.read(name), saved[f"{name}.ema"]) for name in exported.files)
    val = str(whole.folder / "val.npy")
    texts = [tinytrain("evaluate", whole.run.folder, "--data", val, *options)[1] for options in ([], ["--ema"])]
    assert texts[0] != texts[1]
    one, other = (whole.run.folder / "checkpoints" / f"checkpoint-0000000{step}" for step in (5, 6))
    code, text, _ = tinytrain("average", one, other, "--ema", "--out", tmp_path / "mean")
    assert (code, text.startswith("the mean of the moving averages of the weights in 2 checkpoints")) == (0, True)
    mean, before = TensorReader(tmp_path / "mean", "model"), tensors(whole.run, 5, "optimizer")
    for name in mean.files:
        expected = 0.5 * before[f"{name}.ema"].double() + 0.5 * saved[f"{name}.ema"].double()
        assert torch.equal(mean.read(name), expected.float())


def test_a_new_run_begins_with_a_mean_but_none_resumes_from_it(
    whole: AverageRun, tinytrain: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "mean"
    assert tinytrain("average", whole.run.folder, "--last", 2, "--out", out)[0] == 0
    with pytest.raises(Exception, match="is a mean of 2 checkpoints without the state of an optimizer"):
        train(whole.folder, "refused", 1, **SETTINGS, resume=str(out))
    begun = train(whole.folder, "begun", 1, **SETTINGS | {"init_from": str(out), "ema_decay": 0.99, "ema_every": 2})
    mean = TensorReader(out, "model")
    averages = tensors(begun, 1, "optimizer")  # the average has not changed yet
    assert all(torch.equal(averages[f"{name}.ema"], mean.read(name)) for name in mean.files)
