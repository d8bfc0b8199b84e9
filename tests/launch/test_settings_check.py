"""Check that settings are checked before processes start, and that a mistake is reported once and not retried."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import AGENT, REPOSITORY, TORCHRUN, launch_training
from tests.helpers.training import config_file
from tests.launch.test_elastic_agent import nodes
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.launch.settings_check import runs_verb, training_arguments, training_config

TRAIN = str(REPOSITORY / "launch" / "train.py")


@pytest.mark.parametrize(
    ("args", "settings"),
    [
        (["--standalone", "--nproc-per-node", "2", TRAIN, "a.toml", "--seed", "1"], ["a.toml", "--seed", "1"]),
        (["--standalone", "-m", "tinytrain_dist.train", "a.toml"], ["a.toml"]),
        (["--module", "tinytrain_dist.train"], []),
        (["--standalone", "own.py", "a.toml"], None),
        (["-m", "tinytrain_dist.cli.doctor", "a.toml"], None),
        (["--rdzv-id", "tinytrain_dist.train", "own.py"], None),
        ([], None),
    ],
)
def test_our_program_is_found_among_the_arguments(args: list[str], settings: list[str] | None) -> None:
    assert training_arguments(args) == settings


def test_a_verb_is_found_among_the_arguments() -> None:
    assert runs_verb(["--standalone", "-m", "tinytrain_dist.cli.doctor", "a.toml"])
    assert not runs_verb(["-m", "tinytrain_dist.train", "a.toml"])
    assert not runs_verb(["own.py", "tinytrain_dist.cli.doctor"])


def test_the_script_is_found_by_a_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY / "launch")
    assert training_arguments(["train.py", "x"]) == ["x"]
    with pytest.raises(ConfigError, match="seed: expected a whole number, got 'x'"):
        training_config(["train.py", "--seed", "x"])


def test_a_wrong_setting_is_explained_once_and_last_and_starts_no_process(tmp_path: Path) -> None:
    command = [sys.executable, *AGENT, "--standalone", "--nproc-per-node=3", "--max-restarts=2", TRAIN]
    done = subprocess.run(
        [*command, "--lr-max", "1,5", "--sed", "1"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: 2 problems in the command line",
        "  lr_max: expected a number, got '1,5'",
        "  sed: unknown setting; did you mean seed?",
    ]


@pytest.mark.multiprocess
def test_under_plain_torchrun_only_rank_0_explains(tmp_path: Path) -> None:
    done = launch_training(["--lr-max", "1,5"], 2, tmp_path, launcher=TORCHRUN)
    assert done.returncode != 0
    assert done.stdout.count("lr_max: expected a number, got '1,5'") == 1


RECORD_STARTS = """
import os
if "RANK" in os.environ:
    with open(os.environ["STARTS"], "a") as file:
        print(os.environ["TORCHELASTIC_RESTART_COUNT"], file=file)
"""


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which each Python process of a rank records the number of its restart."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(RECORD_STARTS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{REPOSITORY}")
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    return tmp_path / "starts"


@pytest.mark.multiprocess
def test_a_mistake_that_only_ranks_can_find_is_not_retried(tmp_path: Path, starts: Path) -> None:
    config = config_file(tmp_path, batch_size=1)
    done = launch_training([config], 2, tmp_path, launcher=AGENT, torchrun_args=["--max-restarts=3"])
    assert done.returncode == 2
    assert done.stdout.count("are fewer than") == 1, done.stdout
    assert set(starts.read_text().split()) == {"0"}
    assert done.stdout.rstrip().splitlines()[-1].lstrip().startswith("batch_size: 1")


@pytest.mark.multiprocess
def test_a_mistake_on_several_nodes_is_not_retried(tmp_path: Path, starts: Path) -> None:
    config = config_file(tmp_path, train_data=str(tmp_path / "none.npy"), vocab_size=53)
    with contextlib.ExitStack() as stack:
        agents = nodes(tmp_path, config, stack, "2", "--max-restarts=3")
        assert [agent.wait(60) for agent in agents] == [2, 2], agents[0].output()
        for agent in agents:
            assert agent.output().count("none.npy: no such token file") == 1
            assert agent.output().rstrip().splitlines()[-1].startswith("error: ")
    assert set(starts.read_text().split()) == {"0"}


COUNTING = """
import os, pathlib, sys
with open("starts", "a") as file:
    print(os.environ["RANK"], file=file)
sys.exit({code})
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(("code", "starts"), [(2, 1), (3, 2)])
def test_only_the_exit_code_of_a_wrong_command_line_is_final(tmp_path: Path, code: int, starts: int) -> None:
    script = tmp_path / "own.py"
    script.write_text(COUNTING.format(code=code))
    done = launch_training([], 1, tmp_path, launcher=AGENT, script=script, torchrun_args=["--max-restarts=1"])
    assert done.returncode == code
    assert len((tmp_path / "starts").read_text().splitlines()) == starts
    assert f"ended with exit code {code}, without an error message" in done.stdout.splitlines()[-1]
