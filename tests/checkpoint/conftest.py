"""Fixtures for several test files: a small folder of tensors, and a copy that a test may damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.tensor_folders import some_tensors, write_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("whole"), some_tensors(), 200)


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))
