"""Check that dashboards.md names every key of the records of a run, and that its example reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.training import Run
from tinytrain_dist.metrics.trackers.tags import EVENTS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "dashboards.md").read_text(encoding="utf-8")


@pytest.mark.multiprocess
def test_every_key_of_the_records_is_on_the_page(text_runs: Path) -> None:
    keys = {key for record in Run(text_runs / "one").records for key in (*record, record["kind"])}
    assert {"loss", "eval", "saved", "samples", "bits_per_byte"} <= keys, "the run should have all kinds of records"
    assert {key for key in keys if f"`{key}`" not in PAGE} == set()
    assert {kind for kind in EVENTS if f"`{kind}`" not in PAGE} == set()


@pytest.mark.multiprocess
def test_the_example_reads_the_losses(text_runs: Path) -> None:
    defined: dict[str, Any] = {}
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(program, defined)
    run = Run(text_runs / "one")
    assert [loss for _, loss in defined["losses"](run.folder)] == run.values("train", "loss")
    state = json.loads((run.folder / "state.json").read_text(encoding="utf-8"))
    assert state["state"] in PAGE
