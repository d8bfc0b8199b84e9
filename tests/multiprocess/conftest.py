"""Fixtures for several test files: a folder for runs, and a run that is not disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.checkpoint_runs import RUN
from tests.helpers.training import Run, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with the settings RUN on two ranks. Token files have the same content in every folder."""
    return train(tmp_path_factory.mktemp("undisturbed"), "undisturbed", 2, **RUN)
