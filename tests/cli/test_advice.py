"""Follow the advice of verbs and launchers literally, as it is printed. Settings: tests/config/test_advice.py."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY
from tests.helpers.tools import Cli
from tests.helpers.training import config_file, write_tokens
from tinytrain_dist.config.schema import FIELDS, HELP_COMMAND

TEXT = "The loss falls, and falls, and falls again.\n"


def advised(text: str, pattern: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match[1]


def test_a_picture_of_several_runs_has_a_name(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = (folder / "one", folder / "other")
    code, _, err = tinytrain("plot", *runs)
    assert code == 2
    option, name = advised(err, "add (--out \\S+)").split()
    assert tinytrain("plot", *runs, option, tmp_path / name)[0] == 0


def test_export_replaces_nothing(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code, _, err = tinytrain("export", folder / "one", tmp_path / "out", "--no-check")
    assert (code, "give another folder or delete it" in err) == (2, True)
    (tmp_path / "out").rmdir()
    assert tinytrain("export", folder / "one", tmp_path / "out", "--no-check")[0] == 0


def test_a_plan_in_one_mode_may_have_settings_that_others_refuse(tinytrain: Cli) -> None:
    words = ("--vocab-size", 300, "--device", "cpu", "--devices-per-node", 2, "--num-layers", 1, "--batch-size", 2)
    code, out, err = tinytrain("plan", *words, "--parallel", "ddp", "--fingerprint-every", 5)
    assert (code, "ddp 2 x 1 (this run)" in out) == (0, True), err


def test_a_mode_that_fits_is_named_with_what_must_be_left_out(tinytrain: Cli) -> None:
    config = str(REPOSITORY / "configs" / "llama_1b_hsdp.toml")
    words = (config, "--vocab-size", 32000, "--devices-per-node", 8, "--device", "rtx4090", "--nodes", 1)
    small = ("--micro-batch-size", 1, "--activation-checkpointing", "block", "--loss-chunk-tokens", 512)
    mesh = ("--dp-replicate", 4, "--dp-shard", 2, "--parallel", "hsdp", "--num-layers", 46)
    code, out, err = tinytrain("plan", *words, *small, *mesh)
    assert code == 1, out + err
    advice = advised(out, "DOES NOT FIT in memory; it fits (.*?):")
    changes = dict(re.findall(r"(\w+) = (\w+)", advice))
    changes |= dict.fromkeys(re.findall(r"\w+", advice.partition("without ")[2].replace(" and ", " ")), "None")
    assert changes, advice
    given = [word for name, value in changes.items() for word in (f"--{name}", value)]
    code, out, err = tinytrain("plan", *words, *small, *mesh, *given)
    assert code == 0, out + err


def test_one_short_document_cannot_be_cut(tinytrain: Cli, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    source = tmp_path / "text.txt"
    source.write_text(TEXT * 2)
    code, _, err = tinytrain("prepare", source, "--out", tmp_path / "data")
    assert (code, "give more text" in err, "--max-document-bytes" in err) == (2, True, False)
    source.write_text("\n".join(f"{number}. {TEXT}" for number in range(40)))
    code, _, err = tinytrain("prepare", source, "--out", tmp_path / "data")
    option = advised(err, "set (--max-document-bytes [0-9]+)").split()
    assert tinytrain("prepare", source, "--out", tmp_path / "data", *option)[0] == 0


def test_other_tokens_are_prepared_again_by_the_command_that_is_given(tinytrain: Cli, tmp_path: Path) -> None:
    """The folders have a space in their names."""
    pytest.importorskip("tokenizers")
    texts = {}
    for name, size in (("a b", 300), ("c d", 290)):
        texts[name] = tmp_path / f"{name}.txt"
        texts[name].write_text("".join(f"{number} {name} {TEXT}" for number in range(300)))
        code, _, err = tinytrain("prepare", texts[name], "--out", tmp_path / name, "--vocab-size", size)
        assert code == 0, err
    files = ("--train-data", tmp_path / "a b" / "train.npy", "--val-data", tmp_path / "c d" / "val.npy")
    plan = ("plan", *files, "--device", "cpu", "--num-layers", 1, "--context-len", 32)
    code, _, err = tinytrain(*plan)
    assert code == 2
    words = shlex.split(advised(err, "`tinytrain (prepare [^`]*)`"))
    assert tinytrain(*(texts["c d"] if word == "TEXT" else word for word in words))[0] == 0
    assert tinytrain(*plan)[0] == 0


@pytest.mark.multiprocess
def test_a_pipe_in_place_of_the_records_is_moved_away(tmp_path: Path) -> None:
    config = config_file(tmp_path, total_steps=2, parallel="none")
    records = tmp_path / "run" / "logs" / "metrics.jsonl"
    records.parent.mkdir(parents=True)
    os.mkfifo(records)
    command = [sys.executable, "-m", "tinytrain_dist.train", config]

    def train() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300)

    done = train()
    text = f"error: {records}: is a named pipe, but the run needs a file there; move it away, or set another target_dir"
    assert (done.returncode, text in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
    records.rename(tmp_path / "away")
    assert train().returncode == 0


@pytest.mark.multiprocess
def test_a_replay_of_no_logged_step_says_how_many_are_needed(tmp_path: Path) -> None:
    write_tokens(tmp_path)
    config = config_file(tmp_path, total_steps=4, log_every=3, ckpt_every=1, keep_last=9, parallel="none")
    python = [sys.executable, "-m"]
    subprocess.run([*python, "tinytrain_dist.train", config], cwd=REPOSITORY, check=True, capture_output=True)
    checkpoint = str(tmp_path / "run" / "checkpoints" / "checkpoint-00000001")
    replay = [*python, "tinytrain_dist", "replay", checkpoint]
    done = subprocess.run([*replay, "--steps", "1"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    steps = advised(done.stderr, "give (--steps [0-9]+)").split()
    done = subprocess.run([*replay, *steps], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:20]) == (0, "1 of 1 recorded step"), done.stderr


def test_the_command_that_lists_all_settings_works_from_any_folder(tmp_path: Path) -> None:
    """Also the program of a checkout, which its documentation names."""
    program, *words = HELP_COMMAND.split()
    assert program == "tinytrain"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    commands = (
        [sys.executable, "-m", "tinytrain_dist", *words],
        [str(REPOSITORY / "launch" / "train.py"), "--help"],
    )
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, "--max-skipped-steps" in done.stdout) == (0, True), done.stderr


def messages() -> list[str]:
    """Return all texts in the package that are no docstrings; {} stands for a value."""
    found = []
    for path in sorted((REPOSITORY / "tinytrain_dist").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
                found.append(node.value)
    return found


def test_settings_and_extras_that_messages_name_exist() -> None:
    """A setting is what has an underscore and follows a word of advice, or `x = value`."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = messages()
    extras = {extra for text in texts for extra in re.findall(r"tinytrain_dist\[(\w+)\]", text)}
    assert extras == extras & project["optional-dependencies"].keys() != set()
    settings = {name for text in texts for name in re.findall(r"\b(?:set|lower|raise) ([a-z]+_[a-z_]+)\b", text)}
    settings |= {name for text in texts for name in re.findall(r"\bset ([a-z_]+) = ", text)}
    assert len(settings) > 10
    assert settings <= FIELDS.keys()
