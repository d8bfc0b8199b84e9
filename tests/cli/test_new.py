"""`tinytrain new`: what the folder contains, and that nothing that exists is touched."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tools import Cli
from tinytrain_dist.cli import proposed_run
from tinytrain_dist.config.loading import load_config
from tinytrain_dist.errors import ConfigError
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
    assert '--prompt "Once upon a time"`; all commands' in readme
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
    assert (config.loss_mask, config.packing) == (False, "none")
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    code, _, err = tinytrain("new", tmp_path / "chat", "--from", model)
    assert code == 0, err
    chat = load_config(tmp_path / "chat" / "config.toml")
    assert (chat.loss_mask, chat.document_mask, chat.packing) == (True, True, "best_fit")
    assert chat.train_data == "data/chat/train.npy"
    readme = (tmp_path / "chat" / "README.md").read_text()
    assert "tinytrain prepare chat.jsonl --chat --tokenizer" in readme
    assert "--prompt PROMPT`, where PROMPT is what the chat template writes" in readme
    for change in ({"num_key_value_heads": "x"}, {"rms_norm_eps": -1}, {"tie_word_embeddings": 1.5}):
        (model / "config.json").write_text(json.dumps({**to_hf_config(KINDS["qwen3"]), **change}))
        code, _, err = tinytrain("new", tmp_path / "other", "--from", model)
        assert code == 2, change
        assert f"{model}/config.json" in err
    (model / "config.json").write_text(json.dumps({**to_hf_config(KINDS["qwen3"]), "model_type": "gemma"}))
    code, _, err = tinytrain("new", tmp_path / "other", "--from", model)
    assert code == 2
    assert "model_type: 'gemma' is not supported" in err
    (model / "config.json").write_text("{")
    code, _, err = tinytrain("new", tmp_path / "other", "--from", model)
    assert (code, f"--from: {model}/config.json cannot be read (" in err) == (2, True), err
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


def prepared(folder: Path, tokens: int = 3000) -> Path:
    """Make a folder as `tinytrain prepare` does: token files and a meta.json."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for side in ("train", "val"):
        np.save(folder / f"{side}.npy", rng.integers(0, 50, tokens, dtype=np.uint16))
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 50, "eos_id": 0}))
    return folder


def test_a_run_is_proposed_for_a_time_on_gpus(tinytrain: Cli, tmp_path: Path) -> None:
    data = prepared(tmp_path / "data", 10**7)
    options = ("--hours", "0.1", "--devices-per-node", 4, "--device", "a100", "--data", data)
    code, out, err = tinytrain("new", tmp_path / "run", *options)
    assert code == 0, err
    assert len(out.splitlines()) == 12, "ten lines of reasoning, and what was made"
    content = (tmp_path / "run" / "config.toml").read_text()
    assert all(f"# {line}" in content for line in out.splitlines()[:10])
    config = load_config(tmp_path / "run" / "config.toml")
    assert config.train_files == (str(data / "train.npy"),)
    assert config.val_files == (str(data / "val.npy"),)
    assert (config.vocab_size, config.batch_size % 4) == (50, 0)
    assert not config.loss_mask
    for side in ("train", "val"):
        (data / f"{side}.mask.npy").touch()
    assert tinytrain("new", tmp_path / "masked", *options)[0] == 0
    masked = load_config(tmp_path / "masked" / "config.toml")
    assert (masked.loss_mask, masked.document_mask, masked.packing) == (True, True, "best_fit")
    readme = (tmp_path / "run" / "README.md").read_text()
    assert str(data) in readme
    assert "--nodes 1 --gpus-per-node 4" in readme


@pytest.mark.multiprocess
def test_a_run_is_proposed_for_this_machine_by_timing_its_steps(
    tinytrain: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposed_run, "MEASURED_SECONDS", 0.1)
    data = prepared(tmp_path / "data")
    (data / "val.npy").unlink()
    options = ("--hours", 0.01, "--devices-per-node", 2, "--device", "cpu", "--data", data)
    code, out, err = tinytrain("new", tmp_path / "run", *options)
    assert code == 0, err
    assert "measured" in out
    config = load_config(tmp_path / "run" / "config.toml")
    assert config.val_data is None
    assert 0 < config.total_steps * config.batch_size * config.context_len <= 4 * 3000 + config.batch_size * 2048


def test_steps_are_timed_with_the_masks_of_the_proposed_run(
    tinytrain: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, timed = prepared(tmp_path / "data"), []

    def no_command(config: Path, *_: object) -> None:
        timed.append(load_config(config))
        raise ConfigError("nothing is timed here")

    monkeypatch.setattr(proposed_run, "local_command", no_command)
    options = ("--hours", 0.01, "--devices-per-node", 1, "--device", "cpu", "--data", data)
    for run in ("plain", "masked"):
        assert "nothing is timed here" in tinytrain("new", tmp_path / run, *options)[2]
        for side in ("train", "val"):
            np.save(data / f"{side}.mask.npy", np.ones(3000, np.uint8))
    plain, masked = timed
    assert (plain.loss_mask, plain.document_mask, plain.packing) == (False, False, "none")
    assert (masked.loss_mask, masked.document_mask, masked.packing) == (True, True, "best_fit")
    assert masked.val_data is None, "evaluations are not timed"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--hours", "1"], "--hours: needs --data"),
        (["--hours", "0", "--data", "data"], "--hours: 0.0 must be more than 0"),
        (["--hours", "nan", "--data", "data"], "--hours: nan must be more than 0"),
        (["--hours", "1e5", "--data", "data"], "--hours: 100000.0 must be more than 0 and at most 8760"),
        (["--hours", "1", "--data", "data", "--from", "quickstart"], "--from, --hours"),
        (["--data", "data"], "need --hours"),
        (["--hours", "1", "--data", "nowhere"], "has neither train.npy nor train-*.npy"),
        (["--hours", "1", "--data", "data", "--device", "cpu", "--nodes", "2"], "measured on this machine"),
        (["--hours", "1", "--data", "data", "--device", "h1000"], "the nearest names are"),
        (["--hours", "1", "--data", "data", "--device", "h100", "--nodes", "0"], "--nodes: 0 must be at least 1"),
    ],
)
def test_what_cannot_be_proposed_is_a_sentence(
    tinytrain: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared(tmp_path / "data")
    code, _, err = tinytrain("new", tmp_path / "run", *options)
    assert code == 2
    assert expected in err
    assert "plan" not in err, "it is another command"
    assert not (tmp_path / "run").exists()
