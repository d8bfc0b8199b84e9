"""Check that a named pipe in place of a file of a checkpoint is reported; opening it would wait for ever."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinytrain_dist.checkpoint import discovery, manifest, verify
from tinytrain_dist.checkpoint.safetensors_io import TensorReader
from tinytrain_dist.config.run_folder import MANIFEST_FILE, TRAINER_STATE_FILE
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.model.huggingface_config import check_hf_config
from tinytrain_dist.utils.atomic_files import read_json_object


def to_pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def first_value(folder: Path) -> Any:
    reader = TensorReader(folder, "model")
    return reader.read(next(iter(reader.files)))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (MANIFEST_FILE, manifest.read_manifest),
        (TRAINER_STATE_FILE, discovery.read_trainer_state),
        ("model.safetensors.index.json", first_value),
        ("model-00001-of-*.safetensors", first_value),
    ],
)
def test_each_reader_reports_it(folder: Path, name: str, read: Callable[[Path], Any]) -> None:
    path = to_pipe(next(iter(folder.glob(name)), folder / name))
    with pytest.raises(CheckpointError, match=f"{path.name} is a named pipe, not a regular file"):
        read(folder)


def test_verify_names_the_file(folder: Path) -> None:
    path = to_pipe(next(folder.glob("model-00001-of-*.safetensors")))
    assert str(path) in " ".join(verify.find_damage(folder))


def test_a_model_folder_to_start_from(tmp_path: Path) -> None:
    to_pipe(tmp_path / "config.json")
    with pytest.raises(ValueError, match="is a named pipe, not a regular file"):
        check_hf_config(None, tmp_path)  # type: ignore[arg-type]


def test_small_files_of_a_run_count_as_missing(tmp_path: Path) -> None:
    assert read_json_object(to_pipe(tmp_path / "state.json")) == {}
