"""`tinytrain new`: what the folder contains, and that nothing that exists is touched."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.tools import Cli
from tinytrain_dist.config.loading import load_config
from tinytrain_dist.utils.package_files import package_folder

CONFIGS = sorted(path.stem for path in package_folder("configs").glob("*.toml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_folder_has_all_that_a_user_edits(tinytrain: Cli, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a run"
    code, out, err = tinytrain("new", folder, "--from", name)
    assert code == 0, err
    assert str(folder) in out
    assert sorted(path.name for path in folder.iterdir()) == [".gitignore", "README.md", "config.toml", "slurm"]
    original = load_config(package_folder("configs") / f"{name}.toml")
    assert load_config(folder / "config.toml") == original
    readme = (folder / "README.md").read_text()
    assert original.target_dir in readme
    assert "configs/" not in readme + (folder / "config.toml").read_text()
    assert original.train_files[0].rpartition("/")[0] in readme, "the command that makes the data names their folder"


def test_a_prefix_of_a_name_is_enough_and_an_unknown_name_is_refused(tinytrain: Cli, tmp_path: Path) -> None:
    assert tinytrain("new", tmp_path / "a", "--from", "gpt2")[0] == 0
    code, _, err = tinytrain("new", tmp_path / "b", "--from", "llama")
    assert code == 2
    assert "'llama' fits llama_1b_hsdp, llama_350m_fsdp; give more of the name" in err
    (tmp_path / "gemma").mkdir()
    code, _, err = tinytrain("new", tmp_path / "b", "--from", tmp_path / "gemma")
    assert code == 2
    assert "give one of " + ", ".join(CONFIGS) in err
    assert not (tmp_path / "b").exists()


def test_what_exists_is_left_alone(tinytrain: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert tinytrain("new", tmp_path / "empty")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "empty").rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("mine")
    for existing in ("empty", "file"):
        code, _, err = tinytrain("new", tmp_path / existing)
        assert code == 2
        assert "exists already" in err
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    code, _, err = tinytrain("new", tmp_path / "dangling")
    assert (code, (tmp_path / "nowhere").exists()) == (2, False)
    assert "dangling exists already" in err
    assert before == {path: path.read_bytes() for path in (tmp_path / "empty").rglob("*") if path.is_file()}
    (tmp_path / "file" / "..").resolve()
    code, _, err = tinytrain("new", tmp_path / "file" / "inside")
    assert code in (1, 2)
    assert "error: " in err


def test_a_model_folder_gives_its_sizes(tinytrain: Cli, tmp_path: Path) -> None:
    from tests.helpers.models import KINDS
    from tinytrain_dist.model.huggingface_config import check_hf_config, to_hf_config

    model = tmp_path / "a model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(to_hf_config(KINDS["qwen3"])))
    code, _, err = tinytrain("new", tmp_path / "tune", "--from", model)
    assert code == 0, err
    config = load_config(tmp_path / "tune" / "config.toml")
    check_hf_config(config, model)  # raises an error if a size does not fit
    assert config.init_from == str(model)
    assert f"--tokenizer '{model}'" in (tmp_path / "tune" / "README.md").read_text()
    for change in ({"num_key_value_heads": "x"}, {"rms_norm_eps": -1}, {"tie_word_embeddings": 1.5}):
        (model / "config.json").write_text(json.dumps({**to_hf_config(KINDS["qwen3"]), **change}))
        code, _, err = tinytrain("new", tmp_path / "other", "--from", model)
        assert code == 2, change
        assert f"{model}/config.json" in err
    (model / "config.json").write_text(json.dumps({**to_hf_config(KINDS["qwen3"]), "model_type": "gemma"}))
    code, _, err = tinytrain("new", tmp_path / "other", "--from", model)
    assert code == 2
    assert "model_type: 'gemma' is not supported" in err
    assert not (tmp_path / "other").exists()


def test_a_name_that_cannot_be_written_into_files_is_refused(tinytrain: Cli, tmp_path: Path) -> None:
    code, _, err = tinytrain("new", f"{tmp_path}/bad\udcff")
    assert code == 2
    assert "is not valid UTF-8" in err
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_is_printed_also_enters_a_folder_whose_name_begins_with_a_dash(
    tinytrain: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = tinytrain("new", "--", "-x")
    assert code == 0
    command = re.search(r"next: (cd .*), then", out)
    assert command is not None
    assert subprocess.run(["bash", "-c", f"{command[1]} && test -f config.toml"], check=False).returncode == 0
