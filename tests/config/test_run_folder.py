"""Check the names in a run folder, and how runs, checkpoints and records are found on disk."""

import re
from pathlib import Path

import pytest

from tests.helpers.configs import write
from tinytrain_dist.config import run_folder
from tinytrain_dist.config.run_folder import RunFolder
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import CheckpointError, TinytrainError


def make_checkpoint(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    write(path / run_folder.MANIFEST_FILE, "{}")
    return path


def test_every_name_is_in_the_documented_tree():
    constants = {name: value for name, value in vars(run_folder).items() if re.fullmatch("[A-Z_]+", name)}
    names = [value for value in constants.values() if isinstance(value, str)]
    assert len(names) >= 18
    tree = str(run_folder.__doc__)
    assert [name for name in names if name not in tree] == []


def test_paths_of_the_layout():
    run = Path("RUN")
    assert run_folder.heartbeat_file(run, 3) == Path("RUN/logs/heartbeat/rank-00003.json")
    assert run_folder.heartbeat_folder(run) == Path("RUN/logs/heartbeat")
    assert run_folder.stacks_file(run, 12) == Path("RUN/logs/stacks/rank-00012.txt")
    assert run_folder.abort_file(run) == Path("RUN/logs/ending.json")
    assert run_folder.records_file(run / "logs") == Path("RUN/logs/metrics.jsonl")
    assert run_folder.checkpoint_name("checkpoint", 1000) == "checkpoint-00001000"
    assert run_folder.checkpoint_name("a-b", 123_456_789) == "a-b-123456789"


def test_a_run_is_found_by_any_of_its_files(tmp_path):
    assert RunFolder.at(tmp_path) is None
    assert RunFolder.at(tmp_path / "none") is None
    for name in ("config.toml", "state.json", "environment.json", "logs", "checkpoints"):
        folder = tmp_path / f"run-{name}"
        folder.mkdir()
        (folder / name).touch()
        assert RunFolder.at(folder) == RunFolder(folder, folder / "checkpoints", folder / "logs" / "metrics.jsonl")


def test_folders_and_prefix_come_from_the_settings_of_the_run(tmp_path):
    config = TrainingConfig(ckpt_dir="elsewhere/c", log_dir="elsewhere/l", log_save_prefix="numbers")
    write(tmp_path / "config.toml", config.to_toml())
    expected = RunFolder(tmp_path, Path("elsewhere/c"), Path("elsewhere/l/numbers.jsonl"))
    assert RunFolder.at(tmp_path) == expected
    assert run_folder.read_settings(tmp_path)["log_save_prefix"] == "numbers"


@pytest.mark.parametrize("text", ["seed = \n", "\x00"])
def test_a_run_with_broken_settings_can_be_read(tmp_path, text):
    write(tmp_path / "config.toml", text)
    assert run_folder.read_settings(tmp_path) == {}
    assert RunFolder.at(tmp_path) is not None


def test_settings_of_another_version_are_read_as_they_are(tmp_path):
    write(tmp_path / "config.toml", "seed = 1\n[later]\nsome_setting = 2\n[parallel]\ncompile = true\n")
    assert run_folder.read_settings(tmp_path) == {"seed": 1, "some_setting": 2, "compile": True}
    assert run_folder.read_settings(tmp_path / "none") == {}


def test_checkpoints_are_listed_by_step_and_only_committed_ones_count(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in (
        "checkpoint-00000010",
        "checkpoint-00000002",
        "checkpoint-00000030.tmp",
        "checkpoint-00000004.damaged",
    ):
        make_checkpoint(folder, name)
    (folder / "other").mkdir()
    run = run_folder.open_run(tmp_path)
    assert [run_folder.checkpoint_step(path) for path in run.step_folders()] == [2, 4, 10, 30]
    assert [path.name for path in run.committed()] == ["checkpoint-00000002", "checkpoint-00000010"]
    suffixes = [run_folder.name_suffix(path) for path in run.step_folders()]
    assert suffixes == ["", run_folder.DAMAGED_SUFFIX, "", run_folder.TEMPORARY_SUFFIX]
    assert run_folder.open_run(folder).folder == tmp_path  # the run of a folder of checkpoints


def test_what_a_checkpoint_is(tmp_path):
    assert run_folder.is_checkpoint(make_checkpoint(tmp_path, "any-name"))
    (tmp_path / "prefix-00000001").mkdir()
    assert run_folder.is_checkpoint(tmp_path / "prefix-00000001")
    write(make_checkpoint(tmp_path, "run") / "config.toml", "")  # a run, even if it contains other files
    assert not run_folder.is_checkpoint(tmp_path / "run")
    (tmp_path / "folder").mkdir()
    assert not run_folder.is_checkpoint(tmp_path / "folder")
    assert run_folder.checkpoint_step(tmp_path / "any-name") == -1
    assert run_folder.name_suffix(tmp_path / "any-name") == ""


def test_no_run_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match="contains neither a run nor a checkpoint"):
        run_folder.open_run(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        run_folder.open_run(tmp_path / "none")


def test_incomplete_and_foreign_lines_of_records_are_skipped(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        '{"kind": "train", "step": 1}\n{"step": 2}\n{"kind": "eval"}\n[3]\n{"kind": "eval", "st',
    )
    assert run_folder.read_records(path) == [{"kind": "train", "step": 1}]
    with pytest.raises(TinytrainError, match=r"no records of a run \(No such file"):
        run_folder.read_records(tmp_path / "none.jsonl")
