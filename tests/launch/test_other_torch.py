"""Check launch/test.sh and launch/setup.sh with another version of torch, and the stages of all checks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY
from tinytrain_dist.launch import checks

# In place of Python: it makes environments that contain itself, and writes down how pip and pytest are called.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
    *"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" && echo "$*" >>"$CALLS" ;;
    *"-m pip"*) echo "$*" >>"$CALLS" ;;
    *launch/environment.py*)
        # the real script, which takes this program for the Python that runs it
        exec "$REAL_PYTHON" -c "import runpy, sys; sys.executable = '$0'; sys.argv = ['environment.py', *sys.argv[1:]]
runpy.run_path('$2', run_name='__main__')" "${@:3}"
        ;;
    *launch/checks.py*) echo "${@:2}" >>"$CALLS" ;;
    *m.requires*) printf 'Typing_Extensions>=4.10\\nsetuptools<82\\nnvidia-cudnn==9; sys_platform == "linux"\\n' ;;
    *version_info\\[:2\\]*) echo "$FAKE_VERSION" ;;
    *importlib*) exit 1 ;;
esac
exit 0
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "a checkout"
    shutil.copytree(REPOSITORY / "launch", root / "launch")
    shutil.copytree(REPOSITORY / "tinytrain_dist" / "launch", root / "tinytrain_dist" / "launch")
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    pins = "# tested\nnumpy==2.4.6\nsetuptools==84.2.1\ntorch==2.13.0\ntyping-extensions==4.16.0\n"
    (root / "constraints.txt").write_text(pins)
    python = root / "fake" / "python3"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return root


def run_checks(checkout: Path, *args: str, **variables: str) -> tuple[int, str, list[str]]:
    """Run launch/test.sh with the fake Python; return the exit code, the errors, and the calls of programs."""
    calls = checkout / "calls"
    calls.write_text("")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    env = {**kept, "PATH": f"{checkout}/fake:{os.environ['PATH']}", "TORCH_BUILD": "cpu", "CALLS": str(calls)}
    env |= {"REAL_PYTHON": sys.executable, "FAKE_VERSION": "{} {}".format(*sys.version_info[:2]), **variables}
    script = checkout / "launch" / "test.sh"
    done = subprocess.run([script, *args], env=env, cwd=checkout.parent, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, calls.read_text().splitlines()


def test_another_torch_gets_an_environment_of_its_own(checkout: Path) -> None:
    code, errors, calls = run_checks(checkout, "-k", "loss", "--torch", "2.15.0")
    folder = checkout / ".venv-torch-2.15.0"
    assert code == 0, errors
    made, torch, package, checks_call = calls
    assert made.endswith(f"-m venv {folder}")
    assert torch.split()[-1].startswith("torch==2.15.0")
    assert package.endswith(f"-c {folder}/constraints.txt -e .[test]")
    assert checks_call.endswith("checks.py -k loss --torch 2.15.0")
    pins = (folder / "constraints.txt").read_text().splitlines()
    assert pins == ["numpy==2.4.6", "torch==2.15.0"], "without the pins of what torch itself needs"
    assert not (checkout / ".venv").exists()

    assert run_checks(checkout, "--torch=2.15.0")[2] == [checks_call.replace("-k loss --torch ", "--torch=")]
    python = f"{checkout}/fake/python3"
    assert len(run_checks(checkout, "--torch", "2.15.0", PYTHON=python)[2]) == 1, "the same version of Python"
    calls = run_checks(checkout, "--torch", "2.15.0", PYTHON=python, FAKE_VERSION="3 99")[2]
    assert calls[0].endswith(f"-m venv --clear {folder}"), "another version of Python than the environment has"
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--torch", "2.15"], "--torch is '2.15'; expected a version of three numbers, such as 2.13.0."),
        (["--torch=../2.15.0"], "--torch is '../2.15.0'; expected a version of three numbers, such as 2.13.0."),
        (["--torch"], "--torch is ''; expected a version of three numbers, such as 2.13.0."),
        (["--torch", "2.9.1"], "--torch is 2.9.1, but pyproject.toml allows torch>="),
    ],
)
def test_a_wrong_version_is_told_in_one_sentence(checkout: Path, args: list[str], sentence: str) -> None:
    code, errors, calls = run_checks(checkout, *args)
    assert (code, calls) == (1, [])
    assert errors.startswith(f"setup: {sentence}")
    assert errors.count("\n") == 1
    assert not list(checkout.glob(".venv*"))


def names_and_markers(*args: str) -> tuple[list[str], list[str]]:
    planned = checks.stages(args)
    words = list(planned[-1].command)
    assert words[3:8] == ["-n", str(checks.TEST_PROCESSES), "--dist", "loadfile", "--no-loadscope-reorder"]
    return [stage.name for stage in planned], words[8:]


def test_another_torch_means_the_tests_alone_without_slow_ones() -> None:
    every = ["ruff check", "ruff format", "mypy", "shellcheck", "pytest"]
    assert names_and_markers() == (every, [])
    assert names_and_markers("-k", "a", "--fast") == (every, ["-m", "not slow", "-k", "a"])
    markers = ["-m", "not slow and not slurm"]
    assert names_and_markers("--fast", "--torch", "2.15.0", "-x") == (["pytest"], [*markers, "-x"])
    assert names_and_markers("--torch=2.15.0", "-m", "") == (["pytest"], [*markers, "-m", ""]), "the last -m counts"
    assert {"launch/test.sh", "slurm/train.sbatch", ".ci/run"} <= set(checks.shell_scripts(REPOSITORY))


def test_a_failing_stage_does_not_end_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(name: str, code: str) -> checks.Stage:
        return checks.Stage(name, "a second", [sys.executable, "-c", code])

    monkeypatch.setenv("PYTHON", "/the/python/that/made/the/environment")
    look = "import pathlib, os; pathlib.Path('seen').write_text(os.environ['OMP_NUM_THREADS'] + os.environ['PYTHON'])"
    assert checks.run_all([stage("a", "exit(3)"), stage("b", look)], tmp_path) == 1
    assert (tmp_path / "seen").read_text() == os.environ["OMP_NUM_THREADS"] + sys.executable
    assert capsys.readouterr().out.endswith("launch/test.sh: FAILED in 1 of 3 stages: [a]\n")
    assert checks.run_all([stage("b", "")], tmp_path) == 0
    assert capsys.readouterr().out.endswith("launch/test.sh: all 2 stages passed\n")
