"""Fixtures of the tests of the verbs: three tiny runs, a copy to break, and the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.tools import Cli, make_text_runs
from tinytrain_dist.cli import main


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs over the same byte-level text: `one`, `split` (many small files) and `other` (another lr)."""
    return make_text_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A copy of `one` that a test may break."""
    return Path(shutil.copytree(folder / "one", tmp_path / "run"))


@pytest.fixture
def tinytrain(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command line; its exit code, stdout and stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out, err

    return call
