"""Runs on token files with masks and document starts: the loss counts what the files say, wherever it is computed."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.ranks import REPOSITORY, run_ranks
from tests.helpers.training import TINY, VOCABULARY, Run, config_file, fit, settings_for
from tinytrain_dist.checkpoint.load_model import load_model
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.window_sampling import EVAL_STREAM, TRAIN_STREAM, window_starts
from tinytrain_dist.errors import CheckpointError, DataError
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.training.run_data import open_run_data

pytestmark = pytest.mark.multiprocess

CONTEXT_LEN = TINY["context_len"]
SETTINGS: dict[str, Any] = {"reproducible": True, "loss_mask": True, "document_mask": True}
BYTES_PER_TOKEN = np.arange(VOCABULARY) % 5 + 1


@dataclass
class Text:
    """The content of a token file and of the files beside it."""

    ids: npt.NDArray[np.uint16]
    mask: npt.NDArray[np.uint8]
    begins: npt.NDArray[np.bool_]

    @torch.no_grad()
    def loss(self, model: TransformerLM, begin: int, end: int) -> tuple[float, int, int]:
        """Return the summed loss, the tokens and the bytes of targets begin + 1 .. end, document by document."""
        total, tokens, num_bytes = 0.0, 0, 0
        edges = [begin, *(begin + 1 + np.flatnonzero(self.begins[begin + 1 : end + 1])).tolist(), end + 1]
        for first, after in itertools.pairwise(edges):
            ids = torch.from_numpy(self.ids[first:after].astype(np.int64))
            counts = torch.from_numpy(self.mask[first + 1 : after].astype(bool))
            if counts.any():
                losses = F.cross_entropy(model(ids[None, :-1])[0].double(), ids[1:], reduction="none")
                total += float(losses[counts].detach().sum())
                tokens += int(counts.sum())
                num_bytes += int(BYTES_PER_TOKEN[ids[1:][counts].numpy()].sum())
        return total, tokens, num_bytes

    def mean_loss(self, model: TransformerLM, step: int, seed: int, stream: int) -> tuple[float, float]:
        """Return the loss per token, and the bits per byte, over the windows of a global batch."""
        starts = window_starts(seed, step, range(TINY["batch_size"]), len(self.ids) - CONTEXT_LEN, stream)
        windows = [self.loss(model, start, start + CONTEXT_LEN) for start in starts.tolist()]
        total, tokens, num_bytes = (sum(values) for values in zip(*windows, strict=True))
        return total / tokens, total / math.log(2) / num_bytes


@dataclass
class MaskedRuns:
    texts: dict[str, Text]
    settings: dict[str, Any]
    one: Run
    two: Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> MaskedRuns:
    """The same run on one process and on two; its files have documents of random lengths, and stretches not counted."""
    folder = tmp_path_factory.mktemp("masked")
    settings = settings_for(folder, "one", parallel="none", **SETTINGS)
    np.save(folder / "token_bytes.npy", BYTES_PER_TOKEN)
    texts = {}
    for number, name in enumerate(("train", "val")):
        ids = np.load(folder / f"{name}.npy")
        generator = np.random.default_rng(number)
        mask = np.repeat(generator.random(len(ids) // 20) < 0.4, 20).astype(np.uint8)
        begins = generator.random(len(ids)) < 0.15
        begins[0] = True
        texts[name] = Text(ids, mask, begins)
        np.save(folder / f"{name}.mask.npy", mask)
        np.save(folder / f"{name}.documents.npy", np.flatnonzero(begins))
    run_ranks(1, fit, settings)
    run_ranks(2, fit, {**settings, "target_dir": str(folder / "two"), "parallel": "ddp"})
    return MaskedRuns(texts, settings, Run(folder / "one"), Run(folder / "two"))


def test_two_ranks_compute_the_bits_of_one(runs: MaskedRuns) -> None:
    assert runs.two.digests() == runs.one.digests()
    for kind, name in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss"), ("eval", "bits_per_byte")):
        assert runs.two.values(kind, name) == runs.one.values(kind, name), name


def test_losses_are_those_of_the_documents_one_by_one_over_the_tokens_that_count(runs: MaskedRuns) -> None:
    initial = TransformerLM(TrainingConfig(**{**runs.settings, "vocab_size": VOCABULARY}))
    loss, _ = runs.texts["train"].mean_loss(initial, 0, 0, TRAIN_STREAM)
    assert runs.one.values("train", "loss")[0] == pytest.approx(loss, rel=1e-6)
    trained = load_model(runs.one.checkpoint, torch.device("cpu"))
    loss, bits_per_byte = runs.texts["val"].mean_loss(trained, 0, 0, EVAL_STREAM)
    assert runs.one.values("eval", "loss")[-1] == pytest.approx(loss, rel=1e-6)
    assert runs.one.values("eval", "bits_per_byte")[-1] == pytest.approx(bits_per_byte, rel=1e-6)


def tinytrain(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinytrain_dist", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_evaluate_scores_each_token_that_counts_once_within_its_document(runs: MaskedRuns) -> None:
    val, model = runs.texts["val"], load_model(runs.one.checkpoint, torch.device("cpu"))
    edges = [*range(0, len(val.ids) - 1, CONTEXT_LEN), len(val.ids) - 1]
    windows = [val.loss(model, begin, end) for begin, end in itertools.pairwise(edges)]
    total, tokens, num_bytes = (sum(values) for values in zip(*windows, strict=True))
    done = tinytrain("evaluate", runs.one.folder, "--data", runs.settings["val_data"])
    assert done.returncode == 0, done.stderr
    assert f"{tokens:,} tokens in {len(windows):,} window(s)" in done.stdout
    assert f"over {num_bytes:,} bytes" in done.stdout
    loss = re.search(r"^loss +([\d.]+)", done.stdout, re.MULTILINE)
    assert loss is not None
    assert float(loss[1]) == pytest.approx(total / tokens, abs=1.1e-5)


def test_a_replay_has_the_same_bits(runs: MaskedRuns) -> None:
    done = tinytrain("replay", runs.one.folder / "checkpoints" / "checkpoint-00000003", "--steps", 2)
    assert (done.returncode, done.stdout) == (0, "2 of 2 recorded steps are the same to the last bit\n"), done.stderr


# --- files that are missing or changed -----------------------------------------------------------------------------


def test_a_file_that_a_setting_needs_and_that_is_missing_is_named(runs: MaskedRuns, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", runs.texts["train"].ids)
    base = {**TINY, "vocab_size": VOCABULARY, "train_data": str(tmp_path / "t.npy"), "parallel": "none"}
    with pytest.raises(DataError, match=r"t\.npy: has no mask file \(.*t\.mask\.npy\), but loss_mask = true needs one"):
        open_run_data(TrainingConfig(**base, loss_mask=True))
    with pytest.raises(DataError, match=r"has no .*t\.documents\.npy, .* run `tinytrain prepare` again"):
        open_run_data(TrainingConfig(**base, document_mask=True))
    open_run_data(TrainingConfig(**base))


def refusal(settings: dict[str, Any]) -> str:
    try:
        fit(settings)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_resume_with_other_masks_is_refused(runs: MaskedRuns) -> None:
    longer = {**runs.settings, "total_steps": 7}
    message = run_ranks(1, refusal, {**longer, "document_mask": False})[0]
    assert "document_mask: True in the checkpoint, False now" in message
    mask = Path(runs.settings["train_data"]).with_name("train.mask.npy")
    content = mask.read_bytes()
    try:
        np.save(mask, 1 - runs.texts["train"].mask)
        message = run_ranks(1, refusal, longer)[0]
    finally:
        mask.write_bytes(content)
    assert "train_data" in message
    assert "document_mask" not in message
    assert json.loads((runs.one.checkpoint / "trainer_state.json").read_text())["data"]["train"]["mask"] in message


def test_a_run_names_bad_values_in_a_sentence_at_the_start_and_later(tmp_path: Path) -> None:
    config = config_file(tmp_path, parallel="none", compile=False, loss_mask=True, document_mask=True)
    for kind, values in (("mask", [1] * 4000), ("documents", [0])):
        np.save(tmp_path / f"val.{kind}.npy", np.array(values, np.uint8))
    many = 1 << 28  # twice what the start checks of a mask
    np.lib.format.open_memmap(tmp_path / "train.npy", "w+", np.uint16, (many,)).flush()  # zeros, which take no room
    mask = np.lib.format.open_memmap(tmp_path / "train.mask.npy", "w+", np.uint8, (many,))
    mask[: 1 << 20], mask[many // 2 :] = 1, 2
    mask.flush()
    np.save(tmp_path / "train.documents.npy", [0, 50, 40])
    done = tinytrain("train", config, "--nproc", 1)
    assert f"train.documents.npy: does not hold ascending positions from 0 to less than {many} (number 2" in done.stderr
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    np.save(tmp_path / "train.documents.npy", [0])
    done = tinytrain("train", config, "--nproc", 1)
    place = r"train\.mask\.npy: has the value 2 at position \d+, but a mask holds only 0 and 1; make it again"
    assert re.search(rf"after step \d+: DataError: .*{place}", done.stderr), done.stderr
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
