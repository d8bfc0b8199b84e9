"""Pictures need matplotlib; without it the message says what to install."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.tools import Cli


@pytest.mark.parametrize("args", [["plot", "{run}"], ["schedule", "--out", "{run}/lr.png"]])
def test_a_picture_without_matplotlib_names_what_to_install(
    tinytrain: Cli, run: Path, monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = tinytrain(*(arg.format(run=run) for arg in args))
    assert code == 2
    assert "pip install 'tinytrain_dist[plot]'" in err
