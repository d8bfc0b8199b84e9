"""The data of a run: one training dataset, one dataset per evaluation file, and what identifies them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.training import settings_for
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.window_sampling import EVAL_STREAM
from tinytrain_dist.errors import DataError
from tinytrain_dist.training.run_data import RunData, open_run_data


def opened(folder: Path, **settings: object) -> RunData:
    return open_run_data(TrainingConfig(**{**settings_for(folder, "run"), "vocab_size": 53, **settings}))


def test_several_training_files_are_one_dataset_and_evaluation_files_are_apart(tmp_path: Path) -> None:
    data = opened(tmp_path)
    np.save(tmp_path / "more.npy", np.load(tmp_path / "val.npy"))
    both = [str(tmp_path / "train.npy"), str(tmp_path / "more.npy")]
    mixed = opened(tmp_path, train_data=both, val_data=[str(tmp_path / "val.npy"), str(tmp_path / "more.npy")])
    assert list(data.evaluation) == ["val.npy"]
    assert list(mixed.evaluation) == ["val.npy", "more.npy"]
    assert len(mixed.train.windows) == 2


def test_the_fingerprint_of_one_file_is_no_list_as_in_older_checkpoints(tmp_path: Path) -> None:
    one = opened(tmp_path).fingerprint()["train"]
    assert one["file"] == "train.npy"
    assert one["tokens"] == 4000
    both = [str(tmp_path / "train.npy"), str(tmp_path / "val.npy")]
    several = opened(tmp_path, train_data=both, val_data=None).fingerprint()["train"]
    assert [entry["file"] for entry in several] == ["train.npy", "val.npy"]
    assert several[0] == one


def test_bytes_per_token_are_taken_from_the_folder_of_any_file(tmp_path: Path) -> None:
    assert opened(tmp_path).bytes_per_token is None
    np.save(tmp_path / "token_bytes.npy", np.arange(53))
    table = opened(tmp_path).bytes_per_token
    assert table is not None
    assert table.tolist() == list(range(53))


def test_prompts_are_the_first_ids_of_the_first_evaluation_windows(tmp_path: Path) -> None:
    data = opened(tmp_path)
    prompts = data.evaluation_prompts(3, 5)
    dataset = data.evaluation["val.npy"]
    windows = dataset.read(*dataset.draw(0, 0, range(3), EVAL_STREAM)).tokens
    assert prompts.tolist() == windows[:, :5].tolist()


def test_an_id_outside_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size 9"):
        opened(tmp_path, vocab_size=9)
