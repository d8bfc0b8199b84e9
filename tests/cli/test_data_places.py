"""`tinytrain data`: which of several settings and files decide what is read, for configurations and several folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.test_data import values, write_folder
from tests.helpers.token_files import save_tokens
from tests.helpers.tools import Cli


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of training and evaluation data with masks, whose meta.json gives 100 ids."""
    folder = write_folder(tmp_path / "data")
    for name in ("train", "val"):
        np.save(folder / f"{name}.mask.npy", np.load(folder / f"{name}.npy") % 3 > 0)
    return folder


def write_config(data: Path, *lines: str) -> Path:
    """Write a configuration that trains on a folder."""
    path = data.parent / "config.toml"
    files = [f'train_data = "{data}/train.npy"', f'val_data = "{data}/val.npy"', "context_len = 24", "batch_size = 4"]
    path.write_text("\n".join([*files, *lines]))
    return path


def test_the_settings_of_a_configuration_go_before_the_files_beside_the_tokens(tinytrain: Cli, data: Path) -> None:
    config = write_config(data, "vocab_size = 200")
    shown = values(tinytrain, config, "--decode", 2)
    assert [window["not_counted"] for window in shown["windows"]] == [[0], [0]], "loss_mask is not set"
    assert shown["window_notes"] == []
    vocabulary = values(tinytrain, config)["vocabulary"]
    used = len(np.unique(np.load(data / "train.npy")))
    assert (vocabulary["size"], vocabulary["unused"]) == (200, 200 - used)
    assert values(tinytrain, config, "--vocab-size", 150)["vocabulary"]["size"] == 150
    assert values(tinytrain, data)["vocabulary"]["size"] == 100


def test_given_evaluation_files_replace_those_of_a_place(tinytrain: Cli, data: Path, tmp_path: Path) -> None:
    other = save_tokens(tmp_path / "other.npy", [5] * 50)
    for place in (data, write_config(data, "vocab_size = 100")):
        assert list(values(tinytrain, place, "--val-data", other)["evaluation"]) == ["other.npy"]


def test_any_step_exists_if_epochs_decide_how_many_there_are(tinytrain: Cli, data: Path) -> None:
    config = write_config(data, "vocab_size = 100", "total_steps = 5")
    assert "--step: 6 is not in 1 .. 5 (total_steps)" in tinytrain("data", config, "--step", 6)[2]
    config = write_config(data, "vocab_size = 100", "epochs = 2", 'sampling = "shuffle"')
    assert len(values(tinytrain, config, "--step", 10**7)["windows"]) == 4


def test_the_first_folder_with_a_tokenizer_gives_the_texts_and_their_bytes(tinytrain: Cli, tmp_path: Path) -> None:
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    train = save_tokens(tmp_path / "without" / "t.npy", [0, 1, 1, 2])
    evaluation = save_tokens(tmp_path / "with" / "v.npy", [1, 1])
    special = [{"id": token, "content": f"<{token}>", "special": True} for token in (2, 3)]
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "bc": 1}}, "decoder": {"type": "ByteLevel"}}
    (tmp_path / "with" / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": special}))
    found = values(tinytrain, train, "--val-data", evaluation)
    assert (found["train"]["bytes"], found["evaluation"]["v.npy"]["bytes"]) == (5, 4)  # special tokens have none
    assert found["vocabulary"]["size"] == 4
    assert found["vocabulary"]["most_frequent"][0] == {"id": 1, "count": 2, "text": "bc"}
    assert found["vocabulary"]["special"] == [{"id": 2, "text": "<2>", "count": 1}], "<3> does not occur"


def test_documents_are_compared_only_if_those_of_both_splits_are_known(
    tinytrain: Cli, data: Path, tmp_path: Path
) -> None:
    unknown = save_tokens(tmp_path / "unknown.npy", np.load(data / "val.npy"))
    for train, evaluation in ((unknown, data / "val.npy"), (data / "train.npy", unknown)):
        options = (train, "--val-data", evaluation, "--context-len", 30)
        if evaluation == unknown:
            (data / "meta.json").unlink()  # it names a token that ends documents, also for other files
        found = values(tinytrain, *options)["evaluation"][evaluation.name]
        assert found["overlap"]["documents_in_train"] is None
        assert found["overlap"]["ngrams_found"] > 0, "n-grams are compared anyway"
