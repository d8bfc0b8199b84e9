"""Finding the newest valid checkpoint of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from tinytrain_dist import CheckpointError
from tinytrain_dist.checkpoint.discovery import find_checkpoint, present_rules, read_trainer_state
from tinytrain_dist.checkpoint.manifest import quick_problems
from tinytrain_dist.checkpoint.sharded_io import write_checkpoint
from tinytrain_dist.checkpoint.state_collection import collect_shards
from tinytrain_dist.config.run_folder import open_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two checkpoints."""
    shards, _ = collect_shards(nn.Linear(3, 2), None)
    for step in (2, 4):
        write_checkpoint(tmp_path / "checkpoints" / f"checkpoint-{step:08d}", shards, {"step": step})
    return tmp_path


def model_file(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"checkpoint-{step:08d}" / "model-00001-of-00001.safetensors"


def test_the_newest_of_a_run_is_found_and_one_that_is_named(run: Path) -> None:
    assert find_checkpoint(run).name == "checkpoint-00000004"
    named = run / "checkpoints" / "checkpoint-00000002"
    assert find_checkpoint(named, "model") == named
    assert read_trainer_state(named) == {"step": 2}


def test_sizes_are_always_checked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model_file(run, 4)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    expected = f"{path}: has {len(data) - 1:,} bytes, but {len(data):,} bytes were written"
    assert quick_problems(path.parent) == [expected]
    assert find_checkpoint(run).name == "checkpoint-00000002"
    assert expected in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="bytes, but"):
        find_checkpoint(path.parent)
    path.unlink()
    assert quick_problems(path.parent) == [f"{path}: is missing, but {len(data):,} bytes were written"]


def test_bytes_are_read_only_if_a_kind_is_given(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model_file(run, 4)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert find_checkpoint(run).name == "checkpoint-00000004"
    assert find_checkpoint(run, "optimizer").name == "checkpoint-00000004"
    assert capsys.readouterr().err == ""
    assert find_checkpoint(run, "model").name == "checkpoint-00000002"
    assert "checkpoint-00000004" in capsys.readouterr().err


def test_a_run_without_a_valid_checkpoint_is_an_error(run: Path) -> None:
    for step in (2, 4):
        model_file(run, step).unlink()
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoint\(s\) is valid"):
        find_checkpoint(run)
    empty = run / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        find_checkpoint(empty)


def test_a_state_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trainer_state\.json cannot be read"):
        read_trainer_state(tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"step": 1})[:-1])
    with pytest.raises(CheckpointError, match=r"trainer_state\.json cannot be read"):
        read_trainer_state(tmp_path)


def test_the_sound_checkpoint_stays_if_the_newest_state_has_no_readable_step(run: Path) -> None:
    shards, _ = collect_shards(nn.Linear(3, 2), None)
    state = {"step": "six", "report": {"sound_step": 5}}
    write_checkpoint(run / "checkpoints" / "checkpoint-00000006", shards, state)
    assert present_rules(open_run(run), {}).sound_step == 5
    path = run / "checkpoints" / "checkpoint-00000008"
    write_checkpoint(path, shards, {"step": 8})
    (path / "trainer_state.json").write_text("")
    assert present_rules(open_run(run), {}).sound_step == 5, "a damaged one says nothing"


def test_looking_at_sizes_does_not_import_torch(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tinytrain_dist.checkpoint.discovery import find_checkpoint; "
        "find_checkpoint(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", "a listing of runs would wait seconds for it"
