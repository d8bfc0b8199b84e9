"""Fixtures for the tests of the verbs: three tiny runs, a copy that a test may damage, and the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.tools import Cli
from tinytrain_dist.cli import main


@pytest.fixture(scope="session")
def folder(text_runs: Path) -> Path:
    """The folder with the three runs; not to be changed (see `run`)."""
    return text_runs


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A copy of the run `one` that a test may damage."""
    return Path(shutil.copytree(folder / "one", tmp_path / "run"))


@pytest.fixture
def tinytrain(capsys: pytest.CaptureFixture[str]) -> Cli:
    """A function that runs a command line and returns exit code, stdout and stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out, err

    return call
