"""read_a_run.ipynb: its cells run on a trained run, and the stored file has no outputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.examples.programs import EXAMPLES
from tests.helpers.training import Run

NOTEBOOK = json.loads((EXAMPLES / "read_a_run.ipynb").read_text(encoding="utf-8"))


def test_the_stored_file_is_a_notebook_without_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) >= 5
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_its_cells_plot_a_run(
    text_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(text_runs / "one")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
    run = Run(text_runs / "one")
    train_line, eval_line = names["loss_figure"].axes[0].lines
    assert list(train_line.get_ydata()) == run.values("train", "loss")
    assert list(train_line.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(eval_line.get_ydata()) == run.values("eval", "loss")
    (speed_line,) = names["speed_figure"].axes[0].lines
    assert list(speed_line.get_ydata()) == run.values("train", "tokens_per_second")
    assert "6 records of training, 2 evaluations" in capsys.readouterr().out
    assert math.isnan(names["column"]([{"loss": None}], "loss")[0])
    pyplot.close("all")
