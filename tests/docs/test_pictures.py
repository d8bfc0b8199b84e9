"""Check that the drawn pictures are current, and that the picture of the packages has the layers of the other test."""

from __future__ import annotations

import runpy
from pathlib import Path

from tests.architecture.test_architecture import LAYERS

DOCS = Path(__file__).resolve().parents[2] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "scripts" / "pictures.py"))


def test_the_pictures_are_current() -> None:
    for name, draw in SCRIPT["PICTURES"].items():
        assert (DOCS / name).read_text(encoding="utf-8") == draw(), "run docs/scripts/pictures.py, and commit"


def test_the_packages_are_drawn_in_their_layers() -> None:
    drawn = [{name.removesuffix(".py") for name in names} for names in SCRIPT["LAYERS"][1:]]
    expected = [layer for layer in reversed(LAYERS) if not layer & {"programs", "scripts"}]
    assert drawn == expected
